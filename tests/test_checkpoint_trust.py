"""A stranger's checkpoint: its text runs no code, opens nothing, asks for no memory, and sets no limit of mine."""

import functools
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kinoray.cli import main
from kinoray.config.file import config_from_mapping, to_yaml
from kinoray.config.shared import (
    ClipConfig,
    DecodeConfig,
    ModelConfig,
    SampleConfig,
    ViewConfig,
    digest,
)
from kinoray.errors import CheckpointCorrupt, CheckpointMismatch, ConfigError, KinorayError, ModelError
from kinoray.label.config import LabelConfig
from kinoray.label.open import open_labelling
from kinoray.network.build import SHORT_NAMES, build_model
from kinoray.network.checkpoint import CheckpointMeta, load_meta, load_model, load_model_state, save_checkpoint
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.tune.config import parse_space
from kinoray.tune.results import require_own_trials
from small_sets import COLOURS, colour_video

LOCAL = Storage()
CLIP = ClipConfig(sample=SampleConfig(num_segments=2, frames_per_segment=2), view=ViewConfig(resize_px=64, crop_px=64))
LABELS = ("a", "b", "c")
TINY: dict[str, Any] = {"backbone": "tiny", "heads": 4}
NETWORK = """
from pathlib import Path
from tiny_models import MeanColour
Path("{marker}").touch()
def net(num_classes, depth=1):
    return MeanColour(num_classes, 0, 0.0)
dependencies = []
"""


@functools.cache
def _state() -> dict[str, torch.Tensor]:
    return build_model(ModelConfig(options=TINY), len(LABELS)).state_dict()


def make_checkpoint(folder: Path, factory: str, options: Mapping[str, Any], **changes: Any) -> str:
    """A checkpoint that names this network, with the weights of a small VCM-SDD; nothing of the network is called."""
    meta = CheckpointMeta(
        model=ModelConfig(factory=factory, options=dict(options)), clip=CLIP, labels=LABELS, epoch=1, step=1, samples=1
    )
    save_checkpoint(LOCAL, str(folder), model_state=_state(), meta=replace(meta, **changes))
    return str(folder)


def rewrite(uri: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON of a checkpoint, and make its digest right again, as its author can."""
    path = Path(uri) / "checkpoint.json"
    document = json.loads(path.read_bytes())
    change(document)
    body = {name: document[name] for name in ("format", "files", "meta")}
    path.write_text(json.dumps({**body, "digest": digest(body)}))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What a stranger's code leaves behind."""
    return tmp_path / "was-here"


@pytest.fixture
def stranger(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a hubconf.py and a package of the same content, which can be imported."""
    folder = tmp_path / "stranger"
    (folder / "stranger_net").mkdir(parents=True)
    for name in ("hubconf.py", "stranger_net/__init__.py"):
        (folder / name).write_text(NETWORK.format(marker=marker))
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("stranger_net", None)


FOREIGN: list[tuple[str, dict[str, Any]]] = [
    ("torch.hub:load", {"repo_or_dir": "STRANGER", "model": "net", "source": "local"}),
    ("torch.hub:load", {"repo_or_dir": "someone/repo", "model": "net", "source": "github", "trust_repo": True}),
    ("torch.hub:download_url_to_file", {"url": "http://127.0.0.1:1/x", "dst": "MARKER"}),
    ("torch:load", {"f": "MARKER", "weights_only": False}),
    ("os:system", {"command": "touch MARKER"}),
    ("os:mkdir", {"path": "MARKER"}),
    ("subprocess:Popen", {"args": ["touch", "MARKER"]}),
    ("subprocess:run", {"args": ["touch", "MARKER"]}),
    ("builtins:eval", {}),
    ("builtins:exec", {}),
    ("runpy:run_path", {"path_name": "STRANGER/hubconf.py"}),
    ("stranger_net:net", {}),
    ("stranger_net:", {}),
    ("stranger_net", {}),
    ("hubconf:net", {}),
    ("antigravity:geohash", {}),
    ("this:s", {}),
    ("vcm_sdd:VCMSDD", {}),
    ("vcm_sdd:InputSpec", {}),
    ("vcm_sdd.weights:read_state", {"path": "MARKER"}),
    ("vcm_sdd.network:vcm_sdd", TINY),
    ("video_baselines:ClipClassifier", {}),
    ("video_baselines.tsn:tsn", {}),
    ("vcm_sdd:vcm_sdd.func", {}),
    ("vcm_sdd:vcm_sdd.__globals__", {}),
    ("vcm_sdd:__builtins__", {}),
    ("VCM_SDD", TINY),
    ("Vcm_sdd:vcm_sdd", TINY),
    (" vcm_sdd", TINY),
    ("vcm_sdd ", TINY),
    ("vcm_sdd\n", TINY),
    ("vcm_sdd: vcm_sdd", TINY),
    ("vcm_sdd::vcm_sdd", TINY),
    ("vcm_sdd:vcm_sdd:vcm_sdd", TINY),
    (".vcm_sdd:vcm_sdd", TINY),
    ("\uff56cm_sdd:vcm_sdd", TINY),
    ("vcm_sdd\x00:vcm_sdd", TINY),
    ("../vcm_sdd:vcm_sdd", TINY),
    ("/tmp/x.py:net", {}),
    ("", {}),
    (":", {}),
    ("a" * 10_000 + ":net", {}),
]


def imported() -> set[str]:
    return {name for name in sys.modules if not name.startswith("encodings.")}  # text is decoded in new ways


@pytest.mark.parametrize(
    ("factory", "options"), FOREIGN, ids=[f"{i}-{name[:30]!r}" for i, (name, _) in enumerate(FOREIGN)]
)
@pytest.mark.usefixtures("offline")
def test_a_checkpoint_chooses_no_code(
    factory: str, options: dict[str, Any], tmp_path: Path, stranger: Path, marker: Path
) -> None:
    words = {"STRANGER": str(stranger), "MARKER": str(marker)}
    given = json.loads(json.dumps(options).replace("STRANGER", words["STRANGER"]).replace("MARKER", words["MARKER"]))
    uri = make_checkpoint(tmp_path / "checkpoint", factory, given)
    before = imported()
    with pytest.raises((ConfigError, CheckpointCorrupt)) as caught:
        load_model(LOCAL, uri)
    assert imported() == before
    assert not marker.exists()
    message = str(caught.value)
    assert uri in message
    assert len(message) < 1000
    assert message.isprintable()
    if isinstance(caught.value, ConfigError):
        assert message.endswith(f"add --allow-factory {factory}")


@pytest.mark.parametrize(
    "allowed", [("stranger_net:other",), ("STRANGER_NET:net",), ("stranger_net",), ("*",), ("vcm_sdd",)]
)
def test_what_is_allowed_is_the_whole_name(
    allowed: tuple[str, ...], tmp_path: Path, stranger: Path, marker: Path
) -> None:
    uri = make_checkpoint(tmp_path / "checkpoint", "stranger_net:net", {})
    with pytest.raises(ConfigError, match="add --allow-factory stranger_net:net"):
        load_model(LOCAL, uri, allowed)
    assert not marker.exists()


@pytest.mark.parametrize("factory", [["torch.hub:load"], {"a": 1}, None, 5, True, ["vcm_sdd"]])
def test_a_factory_that_is_no_text_is_refused(factory: object, tmp_path: Path) -> None:
    uri = make_checkpoint(tmp_path / "checkpoint", "vcm_sdd", TINY)
    rewrite(uri, lambda document: document["meta"]["model"].update(factory=factory))
    with pytest.raises(CheckpointMismatch, match=r"model\.factory must be text"):
        load_model(LOCAL, uri)


def test_every_network_that_ships_is_built_by_its_short_and_its_full_name(tmp_path: Path) -> None:
    for number, factory in enumerate(("vcm_sdd", "vcm_sdd:vcm_sdd")):
        model, meta = load_model(LOCAL, make_checkpoint(tmp_path / str(number), factory, TINY))
        assert meta.model.factory == factory
        assert type(model).__name__ == "VCMSDD"
    for name, target in SHORT_NAMES.items():
        assert target in (f"vcm_sdd:{name}", f"video_baselines:{name}")


@pytest.mark.parametrize(
    "value",
    [
        "timm:hf-hub:someone/net",
        "timm:hf_hub:someone/net",
        "timm:local-dir:/etc",
        "timm:../../etc/passwd",
        "http://127.0.0.1:1/net",
        "/etc/passwd",
        "s3://bucket/net",
        "tiny\n",
        "",
        "x" * 1000,
        ["tiny"],
        {"a": "tiny"},
        10**400,
        -(2**40),
    ],
)
@pytest.mark.usefixtures("offline")
def test_an_option_in_a_checkpoint_is_no_file_and_no_address(value: object, tmp_path: Path) -> None:
    uri = make_checkpoint(tmp_path / "checkpoint", "vcm_sdd", {**TINY, "backbone": value})
    with pytest.raises(CheckpointCorrupt, match=r"must be a number, true, false or a plain name|does not fit 64 bits"):
        load_model(LOCAL, uri)


VIDEOMAE: dict[str, Any] = {
    "model_type": "videomae",
    "image_size": 32,
    "num_frames": 4,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SCALING = {"rgb_mean": [0.5] * 3, "rgb_std": [0.5] * 3}


@pytest.mark.parametrize(
    "change",
    [
        {"config": {**VIDEOMAE, "hidden_act": "/etc/passwd"}},
        {"config": {**VIDEOMAE, "hidden_act": "http://127.0.0.1:1/x"}},
        {"config": {**VIDEOMAE, "_attn_implementation": "eager"}},
        {"config": {**VIDEOMAE, "auto_map": {"AutoConfig": "evil.C"}, "__class__": "x"}},
        {"config": {**VIDEOMAE, "a b": 1}},
        {"config": {**VIDEOMAE, "hidden_size": 10**12}},
        {"config": {**VIDEOMAE, "layer_norm_eps": {"a": {"b": {"c": 1}}}}},
        {"config": {**VIDEOMAE, **{f"entry{number}": 1 for number in range(1001)}}},
        {"config": [[[[1]]]]},
        {"rgb_mean": ["../x"] * 3},
        {"recipe": {"frames": "s3://bucket/x"}},
        {"drop_path": {"a": 1}},  # only the four that are JSON may be
    ],
    ids=lambda change: str(change)[:40],
)
@pytest.mark.parametrize("factory", ["huggingface", "video_baselines:huggingface", "image_text"])
@pytest.mark.usefixtures("offline")
def test_json_of_a_published_config_is_plain_and_bounded(
    factory: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = make_checkpoint(tmp_path / "checkpoint", factory, {"config": VIDEOMAE, **SCALING, **change})
    monkeypatch.setattr("kinoray.network.checkpoint.build_outline", None)  # refused before anything is built
    with pytest.raises(CheckpointCorrupt, match="must be a number, true, false or a plain name"):
        load_model(LOCAL, uri)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "llama"}, "model_type must be one of timesformer, "),
        ({"model_type": "evil"}, "model_type must be one of timesformer, "),
        ({"model_type": None}, "model_type must be one of timesformer, "),
        ({"auto_map": {"AutoModelForVideoClassification": "evil.M"}}, "config.auto_map is not an entry of a videomae"),
        ({"attn_implementation": "someone.kernel"}, "config.attn_implementation is not an entry"),
        ({"quantization_config": {}}, "config.quantization_config is not an entry"),
        ({"trust_remote_code": True}, "config.trust_remote_code is not an entry"),
        ({"name_or_path": "someone"}, "config.name_or_path is not an entry"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers must be at most 128"),
        ({"image_size": 2**16, "patch_size": 1}, "numbers, over"),
        ({"hidden_size": 2**30}, r"config.hidden_size must be 1 \.\. 1,048,576"),
        ({"hidden_act": "no_such"}, "no_such"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"patch_size": 0}, r"config.patch_size must be 1 \.\. 1,048,576, got 0"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.usefixtures("offline")
def test_a_config_builds_what_the_installed_library_declares_and_nothing_else(
    entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="needs the package transformers")
    uri = make_checkpoint(tmp_path / "checkpoint", "huggingface", {"config": {**VIDEOMAE, **entries}, **SCALING})
    with pytest.raises((ConfigError, ModelError), match=message):
        load_model(LOCAL, uri)


@pytest.mark.parametrize("value", [{"model_type": "videomae"}, [1, 2]])
def test_other_networks_take_no_json(value: object, tmp_path: Path) -> None:
    uri = make_checkpoint(tmp_path / "checkpoint", "tsn", {"config": value})
    with pytest.raises(CheckpointCorrupt, match="must be a number, true, false or a plain name"):
        load_model(LOCAL, uri)


@pytest.mark.usefixtures("offline")
def test_start_weights_in_a_checkpoint_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.pth")  # to open it would be to wait for ever
    for name, value in (("backbone_weights", str(tmp_path / "weights.pth")), ("backbone_weights", "imagenet")):
        uri = make_checkpoint(tmp_path / "checkpoint", "vcm_sdd", {**TINY, name: value})
        assert load_model(LOCAL, uri)[1].model.options[name] == value


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        ("vcm_sdd", {**TINY, "flow_channels": 2**30}),
        ("vcm_sdd", {"backbone": "resnext101_64x4d"}),
        ("vcm_sdd", {**TINY, "radius": 2**30}),
        ("vcm_sdd", {**TINY, "heads": 2**30}),
        ("mvit_v2_s", {"frames": 2**30, "crop_px": 2**25}),
        ("slowfast", {"fusion_ratio": 2**30, "nonlocal_blocks": 2**30}),
        ("vcm_sdd", {**TINY, "num_classes": 3}),
        ("vcm_sdd", {**TINY, "no_such": 3}),
        ("tsn", {"backbone": "timm:no_such_net"}),
        ("eco", {"dropout": True}),
    ],
)
def test_options_ask_for_no_more_memory_than_the_weights_have(
    factory: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(config: ModelConfig, num_classes: int) -> object:
        if torch.empty(0).device.type != "meta":
            raise AssertionError("built before its size was known")
        return build_model(config, num_classes)

    uri = make_checkpoint(tmp_path / "checkpoint", factory, options)
    monkeypatch.setattr("kinoray.network.checkpoint.build_model", no_memory)
    with pytest.raises((CheckpointMismatch, ConfigError, ModelError)):
        load_model(LOCAL, uri)


@pytest.mark.parametrize("labels", [LABELS[:2], (*LABELS, "d"), tuple(f"c{i}" for i in range(10_000))])
def test_the_classes_must_be_those_of_the_classifier(labels: tuple[str, ...], tmp_path: Path) -> None:
    uri = make_checkpoint(tmp_path / "checkpoint", "vcm_sdd", TINY, labels=labels)
    with pytest.raises(CheckpointMismatch, match=rf"rgb_classifier.bias is \[3\], the model's is \[{len(labels)}\]"):
        load_model(LOCAL, uri)


# The JSON and the files


def no_path(document: dict[str, Any]) -> None:
    document["files"]["../../x"] = document["files"]["model.safetensors"]


def set_meta(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["meta"].update(values)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (set_meta(labels=[]), CheckpointMismatch),
        (set_meta(labels="abc"), CheckpointMismatch),
        (set_meta(labels=["a", ["b"], "c"]), CheckpointMismatch),
        (set_meta(epoch=-1), CheckpointMismatch),
        (set_meta(step=10**400), CheckpointCorrupt),
        (set_meta(metrics={"val_top1": "1"}), CheckpointMismatch),
        (set_meta(metrics={"val_top1": float("nan")}), (CheckpointMismatch, CheckpointCorrupt)),
        (set_meta(metrics=[1]), CheckpointMismatch),
        (set_meta(origin="torchvision"), CheckpointMismatch),
        (set_meta(origin={"sha256": 5}), CheckpointMismatch),
        (set_meta(origin={"run": "x"}), CheckpointMismatch),
        (set_meta(origin={"fed": []}), CheckpointMismatch),
        (set_meta(model_digest="0" * 16), CheckpointCorrupt),
        (set_meta(clip={"flow": {"bound_px": 10**400}}), CheckpointCorrupt),
        (lambda document: document["meta"].pop("labels"), CheckpointMismatch),
        (lambda document: document.update(meta=[]), CheckpointMismatch),
        (lambda document: document.update(files=[]), CheckpointCorrupt),
        (lambda document: document.update(files={}), CheckpointCorrupt),
        (no_path, CheckpointCorrupt),
        (lambda document: document["files"].update({"model.safetensors": "x"}), CheckpointCorrupt),
        (lambda document: document["files"]["model.safetensors"].update(size_bytes=-1), CheckpointCorrupt),
        (lambda document: document["files"]["model.safetensors"].update(size_bytes="1"), CheckpointCorrupt),
        (lambda document: document["files"]["model.safetensors"].update(size_bytes=2**60), CheckpointCorrupt),
        (lambda document: document["files"]["model.safetensors"].update(sha256=["x"]), CheckpointCorrupt),
        (lambda document: document.update(format=[["x" * 10_000]]), CheckpointMismatch),
    ],
)  # fmt: skip
def test_every_value_has_its_type(change: Callable[[dict[str, Any]], object], error: Any, tmp_path: Path) -> None:
    uri = make_checkpoint(tmp_path / "checkpoint", "vcm_sdd", TINY)
    rewrite(uri, change)
    with pytest.raises(error) as caught:
        load_model(LOCAL, uri)
    assert uri in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "", "[]", "5", "null", "{}", '{"format": 1}', "\xff"]
)
def test_other_json_is_a_corrupt_checkpoint(text: str, tmp_path: Path) -> None:
    uri = make_checkpoint(tmp_path / "checkpoint", "vcm_sdd", TINY)
    (Path(uri) / "checkpoint.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointCorrupt, match=r"checkpoint\.json"):
        load_meta(LOCAL, uri)


def header_of(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


ONE = b'{"a":{"dtype":"F32","shape":%s,"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    ("content", "size_bytes"),
    [
        (b"", 0),
        (b"abc", 3),
        (struct.pack("<Q", 2**62), 8),
        (struct.pack("<Q", 2**25), 2**40),
        (header_of(b"[" * 200_000), 2**18),
        (header_of(b"{}"), 2**40),
        (header_of(ONE % b"[1]"), 2**40),
        (header_of(ONE % b"[-1]"), 2**40),
        (header_of(ONE % b'["x"]'), 2**40),
        (header_of(ONE % b"[281474976710656]"), 2**40),
        (header_of(ONE % (b"[" + b"1," * 30 + b"1]")), 2**40),
        (header_of(ONE % b"5"), 2**40),
        (header_of(ONE % b"[2]") + bytes(4), None),
        (header_of(ONE.replace(b"F32", b"F99") % b"[1]") + bytes(4), None),
        (header_of(ONE % b"[1]") + bytes(3), None),
    ],
)
def test_a_bomb_of_weights_is_refused_before_it_is_read(content: bytes, size_bytes: int | None, tmp_path: Path) -> None:
    uri = make_checkpoint(tmp_path / "checkpoint", "vcm_sdd", TINY)
    path = Path(uri) / "model.safetensors"
    path.write_bytes(content)
    if size_bytes:
        os.truncate(path, size_bytes)  # sparse: it takes no room

    def name_it(document: dict[str, Any]) -> None:
        entry = {"size_bytes": path.stat().st_size, "sha256": hashlib.sha256(content).hexdigest()}
        document["files"] = {"model.safetensors": entry}
        model = asdict(load_meta_of(document).model)
        document["meta"]["model_digest"] = digest([entry["sha256"], model])

    rewrite(uri, name_it)
    with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors"):
        load_model_state(LOCAL, uri)


@pytest.mark.parametrize("labels", [["a"] * (2**20 + 1), ["a", "b", "c" * 5000]], ids=["many", "long"])
def test_classes_are_few_and_their_names_short(labels: list[str], tmp_path: Path) -> None:
    uri = make_checkpoint(tmp_path / "checkpoint", "vcm_sdd", TINY)
    rewrite(uri, set_meta(labels=labels))
    with pytest.raises(CheckpointMismatch, match=r"labels must name 1 \.\. 1,048,576 classes of at most 4,096 charact"):
        load_meta(LOCAL, uri)


def load_meta_of(document: dict[str, Any]) -> CheckpointMeta:
    return config_from_mapping(CheckpointMeta, document["meta"])


# What a job makes of it


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    for label in COLOURS:
        (tmp_path / "videos" / f"{label}.mp4").write_bytes(colour_video(label, 0))
    return tmp_path / "videos"


def label_settings(videos: Path, checkpoint: str, **changes: Any) -> LabelConfig:
    return LabelConfig(source=str(videos), checkpoint=checkpoint, out=str(videos.parent / "out"), **changes)


@pytest.mark.parametrize("verb", [["label"], ["label", "--plan"], ["evaluate"], ["calibrate"], ["bench"]], ids=" ".join)
def test_every_verb_that_takes_a_checkpoint_refuses_a_strangers_network(
    verb: list[str], tmp_path: Path, videos: Path, stranger: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *rest = verb
    for factory, options in (
        ("stranger_net:net", {}),
        ("torch.hub:load", {"repo_or_dir": str(stranger), "model": "net"}),
    ):
        uri = make_checkpoint(tmp_path / "checkpoint", factory, options)
        code = main([name, *rest, str(videos), "--checkpoint", uri, "--out", str(tmp_path / "out"), "--workers", "1"])
        said = capsys.readouterr().err
        assert code == 2
        assert f"{uri} names the network {factory}, which does not ship with kinoray" in said
        assert f"add --allow-factory {factory}\n" in said
        assert not marker.exists()
        assert "stranger_net" not in sys.modules
    assert not (tmp_path / "out").exists()


def test_a_plan_builds_and_imports_nothing(
    tmp_path: Path, videos: Path, stranger: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a network is built")

    own = make_checkpoint(tmp_path / "own", "stranger_net:net", {})
    ships = make_checkpoint(tmp_path / "ships", "vcm_sdd", TINY)
    for name in (
        "kinoray.network.checkpoint.build_model",
        "kinoray.network.checkpoint.build_outline",
        "kinoray.network.build.build_model",
    ):
        monkeypatch.setattr(name, refuse)
    for uri in (own, ships):
        config = label_settings(videos, uri, plan=True, allow_factory=("stranger_net:net",))
        assert open_labelling(config, "label").plan.num_rows == 3
    assert not marker.exists()
    assert "stranger_net" not in sys.modules


def test_a_plan_and_a_labelling_mean_the_same_table(tmp_path: Path, videos: Path) -> None:
    config = label_settings(videos, make_checkpoint(tmp_path / "checkpoint", "vcm_sdd", TINY))
    planned = open_labelling(replace(config, plan=True), "label")
    assert planned.ledger.root == open_labelling(config, "label").ledger.root


def test_an_allowed_network_is_named_before_it_is_imported(
    tmp_path: Path, videos: Path, stranger: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = make_checkpoint(tmp_path / "checkpoint", "stranger_net:net", {"depth": 2})
    (stranger / "stranger_net" / "__init__.py").write_text("raise ImportError('of the stranger')")
    config = label_settings(videos, uri, allow_factory=("other:net", "stranger_net:net"))
    with pytest.raises(ConfigError, match="of the stranger"):
        open_labelling(config, "label")
    expected = f"label: imports stranger_net:net with options {{'depth': 2}}, which {uri} names and you allow\n"
    assert expected in capsys.readouterr().out


def test_limits_and_back_end_are_the_users_and_numbers_are_the_checkpoints(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = DecodeConfig(
        backend="torchcodec", deadline_s=1e9, max_memory_mb=2**40, max_frames=2**50, max_pixels=2**50, max_bytes=2**60
    )
    mild = make_checkpoint(tmp_path / "mild", "vcm_sdd", TINY)
    wild = make_checkpoint(tmp_path / "wild", "vcm_sdd", TINY, clip=replace(CLIP, decode=theirs))
    of_mild, of_wild = (open_labelling(label_settings(videos, uri), "label") for uri in (mild, wild))
    assert of_wild.job.clip == of_mild.job.clip == CLIP
    assert of_wild.ledger.root == of_mild.ledger.root
    said = capsys.readouterr().out
    assert said.count("videos are decoded by pyav; the network was trained with torchcodec") == 1
    assert "--decode.backend torchcodec" in said

    own = DecodeConfig(max_frames=7, deadline_s=3.0)
    tighter = open_labelling(label_settings(videos, wild, decode=own), "label")
    assert (tighter.job.clip.decode.max_frames, tighter.job.clip.decode.deadline_s) == (7, 3.0)
    assert tighter.ledger.root != of_wild.ledger.root  # a limit decides which videos have a row


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (replace(CLIP, view=ViewConfig(resize_px=10**6, crop_px=64)), "decode.max_pixels must be at least"),
        (replace(CLIP, sample=SampleConfig(num_segments=10**9)), "decode.max_memory_mb must be at least"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_a_clip_of_a_checkpoint_opens_nothing_and_has_a_bound(
    clip: ClipConfig, message: str, tmp_path: Path, videos: Path
) -> None:
    uri = make_checkpoint(tmp_path / "checkpoint", "vcm_sdd", TINY, clip=clip)
    for plan in (True, False):
        with pytest.raises(ConfigError, match=message):
            open_labelling(label_settings(videos, uri, plan=plan), "label")


# Run folders of others


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("mine.yaml", "run.json"),
        ("mine.yaml", "sweep.json"),
        ("config.yaml", ""),  # whoever made the folder left out what shows that it is a run's
        ("best.yaml", ""),
        ("mine.yaml", "a link to itself"),
    ],
)
def test_the_config_in_a_run_folder_is_not_the_users_word(
    name: str, beside: str, tmp_path: Path, stranger: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(catalog="set", out=str(tmp_path / "run"), model=ModelConfig(factory="stranger_net:net"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text(to_yaml(config))
    command = ["train", "--config", str(folder / name), "--print-config"]
    if name == "mine.yaml":
        assert main(command) == 0  # a file of the user's own
    if beside == "a link to itself":
        (folder / "run.json").symlink_to("run.json")
    elif beside:
        (folder / beside).touch()
    (tmp_path / "link.yaml").symlink_to(folder / name)
    for path in (folder / name, tmp_path / "link.yaml"):
        assert main(["train", "--config", str(path), "--print-config"]) == 2
        assert "add --model.factory stranger_net:net" in capsys.readouterr().err
    assert main([*command, "--model.factory", "stranger_net:net"]) == 0
    assert main([*command, "--model.factory=stranger_net:net"]) == 0
    assert main([*command, "--model.factory", "tsn"]) == 0
    assert not marker.exists()


def test_trials_of_a_sweeps_folder_hold_only_what_its_space_has(tmp_path: Path) -> None:
    axes = parse_space({"optim.lr": "log:1e-4..1e-2", "model.factory": "tsn,tsm"})

    def write(settings: object) -> None:
        LOCAL.put(str(tmp_path / "trials" / "t1" / "trial.json"), json.dumps({"settings": settings}).encode())

    for good in ({}, {"optim.lr": 1e-3}, {"optim.lr": 1e-4, "model.factory": "tsm"}):
        write(good)
        require_own_trials(LOCAL, str(tmp_path), axes)
    bad: list[object] = [{"model.factory": "os:system"}, {"optim.lr": 5}, {"optim.lr": "1e-3"}, {"optim.lr": True}]
    bad += [{"model.options.weights": "/x"}, {"clip.decode.deadline_s": 1e9}, [], "x"]
    for settings in bad:
        write(settings)
        with pytest.raises(KinorayError, match=r"trial\.json"):
            require_own_trials(LOCAL, str(tmp_path), axes)


# As a user types it


@pytest.mark.slow
def test_a_hubconf_does_not_run(tmp_path: Path, videos: Path, stranger: Path, marker: Path) -> None:
    options = {"repo_or_dir": str(stranger), "model": "net", "source": "local"}
    uri = make_checkpoint(tmp_path / "checkpoint", "torch.hub:load", options)
    for plan in ([], ["--plan"]):
        command = [sys.executable, "-m", "kinoray", "label", str(videos), "--checkpoint", uri]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / "out"), *plan], capture_output=True, text=True, cwd=stranger, check=False
        )
        assert done.returncode == 2
        assert "add --allow-factory torch.hub:load" in done.stderr
        assert not marker.exists()


@pytest.mark.ray
def test_a_network_of_my_own_labels_in_workers(tmp_path: Path, videos: Path, stranger: Path, marker: Path) -> None:
    """Ray's workers import it as well: the flag goes with the job."""
    state = {"classify.weight": torch.zeros(3, 3), "classify.bias": torch.tensor([0.0, 1.0, 0.0])}
    meta = load_meta(LOCAL, make_checkpoint(tmp_path / "checkpoint", "stranger_net:net", {}))
    save_checkpoint(LOCAL, str(tmp_path / "checkpoint"), model_state=state, meta=meta)
    command = [sys.executable, "-m", "kinoray", "label", str(videos), "--checkpoint", str(tmp_path / "checkpoint")]
    command += ["--out", str(tmp_path / "out"), "--workers", "1", "--allow-factory", "stranger_net:net"]
    path = os.pathsep.join([str(stranger), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "label: imports stranger_net:net, which" in done.stdout
    assert "3 inputs = 3 labelled + 0 quarantined" in done.stdout
    assert marker.exists()
