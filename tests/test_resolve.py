"""What may stand where a network is asked for: parsed from text alone, and refused before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from kinoray.cluster.submit import check_settings
from kinoray.errors import CheckpointNotFound, ConfigError
from kinoray.network.resolve import Source, is_published, parse_source, torchvision_weights
from video_baselines.weight_sets import weight_sets


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run, a checkpoint, a folder of save_pretrained, and files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first" / "checkpoints").mkdir(parents=True)
    for name, file in (("whole", "checkpoint.json"), ("saved", "config.json"), ("empty", "x.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    for name in ("weights.pth", "weights.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "kind", "name", "variant"),
    [
        ("runs/first", "checkpoint", "runs/first", ""),
        ("whole", "checkpoint", "whole", ""),
        ("empty", "checkpoint", "empty", ""),  # find_checkpoint says what it lacks
        ("s3://bucket/runs/first", "checkpoint", "s3://bucket/runs/first", ""),
        ("torchvision:mvit_v2_s", "torchvision", "mvit_v2_s", "KINETICS400_V1"),
        ("torchvision:swin3d_b:DEFAULT", "torchvision", "swin3d_b", "KINETICS400_V1"),
        ("torchvision:swin3d_b:KINETICS400_IMAGENET22K_V1", "torchvision", "swin3d_b", "KINETICS400_IMAGENET22K_V1"),
        ("hf:MCG-NJU/videomae-base", "hf", "MCG-NJU/videomae-base", ""),
        ("hf:owner/name@v1.0", "hf", "owner/name", "v1.0"),
        ("hf:saved", "hf", "{here}/saved", ""),
        ("hf:./saved", "hf", "{here}/saved", ""),
        ("i3d", "i3d", "i3d", ""),
    ],
)
def test_sources_are_what_their_text_says(text: str, kind: str, name: str, variant: str, places: Path) -> None:
    found = parse_source(text, "checkpoint")
    assert found == Source(kind=kind, name=name.format(here=places), variant=variant)  # type: ignore[arg-type]
    assert is_published(text) == (kind != "checkpoint")


def test_files_and_backbones_are_taken_where_the_network_is_named(places: Path) -> None:
    for name in ("weights.pth", "weights.safetensors"):
        assert parse_source(name, "source") == Source(kind="file", name=str(places / name))
    backbone = parse_source("timm:vit_small_patch16_224", "init_from")
    assert backbone == Source(kind="timm", name="vit_small_patch16_224")
    backbone = parse_source("timm:resnet18:weights.pth", "init_from")
    assert backbone == Source(kind="timm", name="resnet18", variant=str(places / "weights.pth"))


def test_a_checkpoint_of_that_name_wins(places: Path) -> None:
    for name in ("i3d", "hf:saved"):
        (places / name).mkdir()
        (places / name / "checkpoint.json").write_text("{}")
        assert parse_source(name, "checkpoint") == Source(kind="checkpoint", name=name)
        assert not is_published(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "mvit_v2_s",
            r"mvit_v2_s is neither a checkpoint nor a run folder: it is not there \(did you mean torchvision:",
        ),
        (
            "kinetics400",
            "is not there; what can be given: a checkpoint or run folder .*torchvision:mvit_v2_s, i3d, hf:",
        ),
        ("torchvison:mvit_v2_s", r"\(did you mean torchvision:mvit_v2_s\?\)"),
        ("runs/frist", r"\(did you mean runs/first\?\)"),
        ("MCG-NJU/videomae-base", r"\(did you mean hf:MCG-NJU/videomae-base\?\)"),
        ("I3D", "what can be given"),
        ("tsm", r"it is not there, and tsm is a network without weights \(kinoray train SET --model.factory tsm --out"),
        ("gone.pth", "is not there"),
        ("notes.txt", "is a file, but no weights"),
        ("torchvision:mvit", r"no video weights of 'mvit' \(did you mean mvit_v2_s\?\); it has mc3_18, "),
        ("torchvision:", "no video weights of ''"),
        ("torchvision:resnet50", "no video weights of 'resnet50'"),
        ("torchvision:s3d:IMAGENET", r"s3d has no weight set 'IMAGENET'; it has KINETICS400_V1"),
        ("hf:", "neither a folder nor a repository; expected"),
        ("hf:gone", "hf:gone is neither a folder nor a repository: there is no folder gone here; expected a folder"),
        ("hf:gone@v1", "neither a folder nor a repository: there is no folder gone here"),
        ("hf:../gone", "is no such folder"),
        ("hf:empty", "is a folder without a config.json"),
        ("hf:a/b/c", "neither a folder nor a repository"),
        ("hf:a/b@", "neither a folder nor a repository"),
        ("hf:https://x/y", "neither a folder nor a repository"),
        ("saved", "looks like a folder of Hugging Face's save_pretrained: give it as hf:saved"),
        ("weights.pth", "kinoray import .*weights.pth --model.factory NAME --labels FILE --out DIR"),
        ("timm:resnet18", "is a backbone, which has no classes of its own: kinoray train SET --model.factory tsn"),
        ("timm:a/b", "names no network of timm"),
        ("timm:resnet18:gone.pth", "gone.pth is not a file"),
        ("i3d\n", "must name a network"),
        ("", "must name a network"),
    ],
)
def test_what_cannot_be_resolved_says_what_can(text: str, message: str) -> None:
    with pytest.raises((ConfigError, CheckpointNotFound), match=message) as caught:
        parse_source(text, "checkpoint")
    assert str(caught.value).startswith("checkpoint")
    assert str(caught.value).isprintable()


def test_weights_of_torchvision_are_read_from_its_sources_as_its_metadata_has_them() -> None:
    found = {(one.network, one.name): one.top1 for sets in torchvision_weights().values() for one in sets}
    assert found == {(one.factory, one.name): one.top1 for one in weight_sets()}
    defaults = {
        network: [one.name for one in sets if one.is_default] for network, sets in torchvision_weights().items()
    }
    assert set(map(tuple, defaults.values())) == {("KINETICS400_V1",)}


@pytest.mark.parametrize(
    "arguments",
    [
        ("label", "videos", "--checkpoint", "torchvision:mvit", "--out", "o"),
        ("evaluate", "set", "--checkpoint", "mvit_v2_s", "--out", "o"),
        ("calibrate", "set", "--checkpoint", "hf:./gone", "--out", "o"),
        ("bench", "set", "--checkpoint", "weights.pth", "--out", "o"),
        ("train", "set", "--init-from", "runs/frist", "--out", "o"),
        ("tune", "set", "--init-from", "torchvision:i3d", "--out", "o", "--num-trials", "2"),
        ("import", "torchvision:i3d", "--out", "o"),
        ("import", "whole", "--out", "o"),
        ("import",),
    ],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[-2:]),
)
def test_a_wrong_source_is_answered_before_torch_is_imported(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys, time\n"
        "from kinoray.cli import main\n"
        f"code = main({list(arguments)!r})\n"
        "print('LOADED', sorted({'torch', 'ray', 'torchvision', 'transformers'} & set(sys.modules)))\n"
        "print('CODE', code, 'SECONDS', time.process_time())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "LOADED []" in done.stdout
    words = done.stdout.split()
    assert float(words[-1]) < 1
    if arguments == ("import",):
        assert words[-3] == "0"
        assert "torchvision:swin3d_b:KINETICS400_IMAGENET22K_V1  81.6" in done.stdout
    else:
        assert words[-3] in ("1", "2")
        assert done.stderr.count("\n") == 1


def test_a_submitted_job_is_told_to_import_first(places: Path) -> None:
    for name in ("checkpoint", "init_from"):
        for text in ("i3d", "torchvision:mvit_v2_s", "hf:owner/name"):
            with pytest.raises(ConfigError, match=rf"{name} must be s3://.*; kinoray import {text} --out s3://BUCKET"):
                check_settings({name: text})
    with pytest.raises(ConfigError, match=r"when submitted, got 'i3d'$"):
        check_settings({"source": "i3d"})
