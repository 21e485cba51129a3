"""Hugging Face's video classifiers: tiny ones, written by save_pretrained, beside the library's own model."""

import json
import math
import os
import pickle
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from kinoray.config.shared import ModelConfig
from kinoray.network import ClipRecipe
from kinoray.network.build import build_model, classifier_names, depths
from vcm_sdd.preprocess import preprocess
from vcm_sdd.weights import WeightsMismatch
from video_baselines.huggingface import huggingface, known_model_types
from video_baselines.huggingface_folder import HubNetwork, read_folder

transformers = pytest.importorskip("transformers", reason="needs the package transformers")

NAMES = ("running", "jumping", "a long name, with a comma")
VIT = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "videomae": {**VIT, "image_size": 32, "num_frames": 4, "num_hidden_layers": 2},
    "timesformer": {**VIT, "image_size": 32, "num_frames": 4, "num_hidden_layers": 2},
    "vivit": {**VIT, "image_size": 32, "num_frames": 4, "num_hidden_layers": 2},
    "vjepa2": {
        "crop_size": 32,
        "frames_per_clip": 4,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_pooler_layers": 1,
        "pred_hidden_size": 24,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
        "pred_num_mask_tokens": 1,
    },
    "videoprism_vision_model": {
        **VIT,
        "image_size": 36,
        "num_frames": 4,
        "num_spatial_layers": 1,
        "num_temporal_layers": 1,
        "num_auxiliary_layers": 1,
    },
}
SQUARE = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 36}}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "videomae": ("VideoMAEImageProcessor", SQUARE),
    "timesformer": ("VideoMAEImageProcessor", {**SQUARE, "image_mean": [0.45] * 3, "image_std": [0.225] * 3}),
    "vivit": ("VivitImageProcessor", SQUARE),
    "vjepa2": ("VJEPA2VideoProcessor", {"crop_size": 32}),
    "videoprism_vision_model": (
        "LlavaOnevisionVideoProcessor",
        {"size": {"height": 36, "width": 36}, "do_normalize": False},
    ),
}


def tiny(model_type: str) -> Any:
    """A model of the library with random weights, norms and biases too."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type, **CONFIGS[model_type], id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)}
    )
    model = transformers.AutoModelForVideoClassification.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def save(folder: Path, model_type: str, **options: Any) -> tuple[Any, Any]:
    model = tiny(model_type)
    model.save_pretrained(folder, **options)
    kind, entries = PROCESSORS[model_type]
    processor = getattr(transformers, kind)(**entries)
    processor.save_pretrained(folder)
    return model, processor


@pytest.fixture(scope="module", params=list(CONFIGS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, HubNetwork]:
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = save(folder, request.param)
    return model, processor, read_folder(folder)


def rebuilt(network: HubNetwork) -> Any:
    """As a checkpoint does it: options through JSON, weights through a strict load."""
    options = json.loads(json.dumps(network.options))
    model = huggingface(num_classes=len(network.class_names), **options).eval()
    model.load_state_dict(network.state, strict=True)
    return model


def test_every_video_classifier_of_the_library_is_tried_here() -> None:
    assert set(known_model_types()) == set(CONFIGS)


def test_logits_are_the_librarys_own_averaged_over_clips(saved: tuple[Any, Any, HubNetwork]) -> None:
    model, _, network = saved
    side = network.spec.crop_px
    rgb = torch.randn(2, 3, 4, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        single = [model(**{model.main_input_name: rgb[:, s]}).logits.reshape(2, 3) for s in range(3)]
        found = rebuilt(network)(rgb=rgb, flow=None)
    assert single[0].std() > 1e-3
    torch.testing.assert_close(found, torch.stack(single).mean(dim=0), rtol=0, atol=1e-5)


def test_class_names_weights_and_spec_survive(saved: tuple[Any, Any, HubNetwork]) -> None:
    model, _, network = saved
    assert network.class_names == NAMES
    assert network.ignored == ()
    again = rebuilt(network)
    assert again.input_spec == network.spec
    theirs = {f"rgb_net.net.{name}": tensor for name, tensor in model.state_dict().items()}
    assert list(again.state_dict()) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.state_dict().items())


def test_frames_are_fed_as_the_librarys_processor_feeds_them(saved: tuple[Any, Any, HubNetwork]) -> None:
    _, processor, network = saved
    frames = torch.randint(0, 256, (4, 50, 81, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    arguments = {"do_sample_frames": False} if hasattr(processor, "do_sample_frames") else {}
    answer = processor([frame.numpy() for frame in frames], return_tensors="pt", **arguments)
    theirs = next(iter(answer.values()))[0]
    ours = preprocess(frames, network.spec)
    off = (theirs - ours).abs() * torch.tensor(network.spec.rgb_std)[:, None, None] * 255
    # ViViT's image processor resizes with Pillow, which rounds some pixels the other way.
    levels = 1 if type(processor).__name__ == "VivitImageProcessor" else 0
    assert off.max() <= levels + 1e-2


def test_another_number_of_classes_changes_the_classifier_only(saved: tuple[Any, Any, HubNetwork]) -> None:
    _, _, network = saved
    config = ModelConfig(factory="video_baselines.huggingface:huggingface", options=network.options)
    names = classifier_names(build_model(config, 7), config, 7)
    assert names == {"rgb_net.net.classifier.weight", "rgb_net.net.classifier.bias"}


def test_every_layer_has_a_depth_of_its_own(saved: tuple[Any, Any, HubNetwork]) -> None:
    model = rebuilt(saved[2])
    config = saved[0].config
    layers = [getattr(config, f"num_{kind}_layers", 0) for kind in ("hidden", "spatial", "temporal")]
    found = depths(model)
    assert set(found.values()) == set(range(sum(layers) + 2))
    assert found["rgb_net.net.classifier.weight"] == 0
    deepest = {name for name, depth in found.items() if depth == sum(layers) + 1}
    assert all("embeddings" in name for name in deepest)
    assert any("patch_embeddings" in name for name in deepest)
    for name, depth in found.items():
        number = re.search(r"\.(?:encoder\.layer|layers|spatial_layers|temporal_layers)\.(\d+)\.", name)
        if number and "predictor" not in name:
            behind = config.num_temporal_layers if "spatial_layers" in name else 0
            inside = layers[2] if "temporal_layers" in name else layers[1] if "spatial_layers" in name else layers[0]
            assert depth == behind + inside - int(number.group(1)), name


def test_every_weight_that_may_train_does(saved: tuple[Any, Any, HubNetwork]) -> None:
    _, _, network = saved
    model = rebuilt(network).train()
    side = network.spec.crop_px
    rgb = torch.randn(2, 1, 4, 3, side, side, generator=torch.Generator().manual_seed(1))
    model(rgb=rgb, flow=None).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    frozen = {name.split(".")[3] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen <= {"predictor"}


@pytest.mark.parametrize(
    ("model_type", "recipe", "mean", "std"),
    [
        ("videomae", {"resize": "shortest", "resize_px": (36, 36), "crop_px": 32}, 0.5, 0.5),
        ("timesformer", {"resize": "shortest", "resize_px": (36, 36), "crop_px": 32}, 0.45, 0.225),
        # 1 / 127.5, minus 1, then (x - 0.5) / 0.5 once more: x / 255 of 0.75 is its zero.
        ("vivit", {"resize": "shortest", "resize_px": (36, 36), "crop_px": 32}, 0.75, 0.25),
        ("vjepa2", {"resize": "shortest", "resize_px": (36, 36), "crop_px": 32}, None, None),
        (
            "videoprism_vision_model",
            {"resize": "exact", "resize_px": (36, 36), "interpolation": "bicubic"},
            0.0,
            1.0,
        ),
    ],
)
def test_recipes_are_the_processors(
    tmp_path: Path, model_type: str, recipe: dict[str, Any], mean: float | None, std: float | None
) -> None:
    save(tmp_path, model_type)
    spec = read_folder(tmp_path).spec
    assert spec.recipe == ClipRecipe(frames=4, **recipe)
    if mean is None:
        assert (spec.rgb_mean, spec.rgb_std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    else:
        assert spec.rgb_mean == pytest.approx((mean,) * 3, abs=1e-9)
        assert spec.rgb_std == pytest.approx((std,) * 3, abs=1e-9)


@pytest.mark.parametrize(
    ("entries", "scaling"),
    [
        pytest.param({"feature_extractor_type": "VideoMAEFeatureExtractor"}, (0.5, 0.5), id="version 4, early"),
        pytest.param({"image_processor_type": "VideoMAEImageProcessorFast"}, (0.5, 0.5), id="version 4, fast"),
        pytest.param({"video_processor_type": "VideoMAEVideoProcessor"}, (0.5, 0.5), id="version 5"),
        pytest.param({"video_processor_type": "VivitVideoProcessor"}, (0.75, 0.25), id="ViViT, version 5"),
        pytest.param(
            {"image_processor_type": "VivitImageProcessor", "offset": False, "rescale_factor": 1 / 255},
            (0.5, 0.5),
            id="ViViT without offset",
        ),
        pytest.param(
            {"image_processor_type": "VideoMAEImageProcessor", "do_rescale": False, "image_mean": [127.5] * 3},
            (0.5, 0.5 / 255),
            id="not rescaled",
        ),
    ],
)
@pytest.mark.parametrize("size", [{"shortest_edge": 36}, 36], ids=["dict", "number"])
@pytest.mark.parametrize("nested", [False, True], ids=["", "processor_config.json"])
def test_processors_of_other_versions_say_the_same(
    tmp_path: Path, entries: dict[str, Any], scaling: tuple[float, float], size: object, nested: bool
) -> None:
    save(tmp_path, "videomae")
    (tmp_path / "preprocessor_config.json").unlink()
    entries = {"size": size, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, **entries}
    body = {"image_processor": entries} if nested else entries
    file = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / file).write_text(json.dumps(body))
    spec = read_folder(tmp_path).spec
    assert (spec.rgb_mean[0], spec.rgb_std[0]) == pytest.approx(scaling, rel=1e-6)
    assert (spec.recipe.resize, spec.recipe.resize_px, spec.recipe.crop_px) == ("shortest", (36, 36), 32)


def test_a_processor_that_does_more_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "videomae")
    (tmp_path / "preprocessor_config.json").unlink()
    entries = {"size": {"height": 32, "width": 32}, "do_pad": True, "pad_size": {"height": 40, "width": 40}}
    transformers.ViTImageProcessor(**entries).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does more to frames than resize, crop and scale them"):
        read_folder(tmp_path)


def test_published_lengths_have_their_papers_strides(tmp_path: Path) -> None:
    save(tmp_path, "videomae")
    config = json.loads((tmp_path / "config.json").read_text())
    model = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**{**config, "num_frames": 16}))
    model.save_pretrained(tmp_path)
    recipe = read_folder(tmp_path).spec.recipe
    assert (recipe.frames, recipe.stride, recipe.fps) == (16, 4, None)


def test_no_other_entry_reaches_a_processor(tmp_path: Path) -> None:
    save(tmp_path, "videomae")
    spec = read_folder(tmp_path).spec
    others = {"device": "cuda:99", "preprocess": "x", "__class__": "x", "repo_path": "a/b", "do_sample_frames": True}
    edit(tmp_path / "preprocessor_config.json", **others)
    assert read_folder(tmp_path).spec == spec


# --- files


def test_shards_and_bins_hold_the_same_weights_as_one_file(tmp_path: Path) -> None:
    model, _ = save(tmp_path / "one", "timesformer")
    save(tmp_path / "shards", "timesformer", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    save(tmp_path / "bin", "timesformer")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    one, shards, binary = (read_folder(tmp_path / name) for name in ("one", "shards", "bin"))
    for name, tensor in one.state.items():
        assert torch.equal(tensor, shards.state[name])
        assert torch.equal(tensor, binary.state[name])


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    model, _ = save(tmp_path, "videomae")
    model.half().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    assert {tensor.dtype for tensor in read_folder(tmp_path).state.values()} == {torch.float32}


class Runs:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_a_bin_that_is_more_than_tensors_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "videomae")
    (tmp_path / "model.safetensors").unlink()
    for body in (pickle.dumps({"a": Runs(tmp_path / "ran")}), b"not a file of torch"):
        (tmp_path / "pytorch_model.bin").write_bytes(body)
        with pytest.raises(ValueError, match=r"weights: .*pytorch_model\.bin cannot be read as tensors only"):
            read_folder(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_code_that_a_folder_offers_is_not_run(tmp_path: Path) -> None:
    save(tmp_path, "videomae")
    (tmp_path / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    offers = {"AutoConfig": "evil.C", "AutoModelForVideoClassification": "evil.M"}
    edit(tmp_path / "config.json", auto_map=offers)
    edit(tmp_path / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.P"})
    network = read_folder(tmp_path)
    assert "auto_map" not in network.options["config"]
    assert not (tmp_path / "ran").exists()


def test_reading_a_folder_and_building_its_network_asks_no_other_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "videomae")

    def refuse(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    rebuilt(read_folder(tmp_path))


@pytest.mark.parametrize(
    ("entry", "value"),
    [("_attn_implementation", "someone/kernel"), ("quantization_config", {}), ("auto_map", {}), ("new_in_v6", 1)],
)
def test_options_take_only_what_the_config_declares(entry: str, value: object) -> None:
    config = {"model_type": "videomae", **CONFIGS["videomae"], entry: value}
    with pytest.raises(ValueError, match=f"config.{entry} is not an entry of a videomae config"):
        huggingface(num_classes=3, config=config, rgb_mean=(0.5,) * 3, rgb_std=(0.5,) * 3)


def test_entries_that_the_library_does_not_know_are_named(tmp_path: Path) -> None:
    save(tmp_path, "videomae")
    edit(tmp_path / "config.json", new_in_v6=1, attn_implementation="someone/kernel", qkv_bias=True)
    network = read_folder(tmp_path)
    assert "new_in_v6" in network.ignored
    assert "qkv_bias" not in network.ignored  # VideoMAE's older name of qv_bias
    assert set(network.options["config"]) >= {"qv_bias", "hidden_size"}
    assert not {"new_in_v6", "attn_implementation", "_attn_implementation"} & set(network.options["config"])


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, "videomae")
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    for change, message in (
        ({"extra.thing": torch.zeros(2)}, "1 not known: extra.thing"),
        ({"classifier.bias": torch.zeros(5)}, "1 of another shape: classifier.bias"),
        ({"classifier.bias": None}, "1 missing: classifier.bias"),
    ):
        changed = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(WeightsMismatch, match=message):
            read_folder(tmp_path)


def test_a_network_without_a_classifier_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "videomae")
    tiny("videomae").videomae.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", id2label={"0": "a", "1": "b"})
    with pytest.raises(WeightsMismatch, match=r"missing: classifier\.bias, classifier\.weight"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("config.json", {"model_type": "llama"}, "config.model_type must be one of timesformer, .*, got 'llama'"),
        ("config.json", {"hidden_size": "wide"}, "config.json is not one of videomae: .*hidden_size"),
        ("config.json", {"id2label": {"0": "a", "2": "b"}}, "id2label must map the ids 0 to 1 to names"),
        ("config.json", {"id2label": None}, "id2label must name the classes"),
        ("config.json", {"image_size": 64}, "makes frames of 32 px, the network is made for 64 px"),
        ("preprocessor_config.json", {"image_processor_type": "Nobody"}, "must name one of .*, got 'Nobody'"),
        ("preprocessor_config.json", {"image_processor_type": "pipeline"}, "must name one of .*, got 'pipeline'"),
        ("preprocessor_config.json", {"crop_size": {"height": 32, "width": 36}}, "kinoray crops squares"),
        # Of the library, and these read what they are told: a file or a repository of the hub; a program's options.
        (
            "preprocessor_config.json",
            {"image_processor_type": "OneFormerImageProcessor", "repo_path": "a/b", "class_info_file": "/etc/passwd"},
            "must name one of .*, got 'OneFormerImageProcessor'",
        ),
        (
            "preprocessor_config.json",
            {"image_processor_type": "LayoutLMv2ImageProcessor", "apply_ocr": True, "tesseract_config": "-l x"},
            "must name one of .*, got 'LayoutLMv2ImageProcessor'",
        ),
        ("preprocessor_config.json", {"video_processor_type": ["a"]}, r"must name one of .*, got \['a'\]"),
        ("preprocessor_config.json", {"image_processor": ["a"]}, r"its processor must be an object, got \['a'\]"),
        ("preprocessor_config.json", {"video_processor": "a"}, "its processor must be an object, got 'a'"),
        ("preprocessor_config.json", {"image_std": [0.5, 0, 0.5]}, r"image_std must be .*, got \[0\.5, 0, 0\.5\]"),
        ("preprocessor_config.json", {"image_mean": [0.5] * 5}, "image_mean must be a finite number, or three"),
        ("preprocessor_config.json", {"image_mean": "0.5"}, "image_mean must be .*, got '0.5'"),
        ("preprocessor_config.json", {"image_mean": 10**400}, "image_mean must be a finite number"),
        ("preprocessor_config.json", {"image_std": math.nan}, "image_std must be .*, got nan"),
        ("preprocessor_config.json", {"rescale_factor": 0}, "rescale_factor must be a number above 0, got 0"),
        ("preprocessor_config.json", {"resample": 77}, "resample must be a filter of Pillow, 0 .. 5, got 77"),
        ("preprocessor_config.json", {"do_resize": "no"}, "do_resize must be true or false, got 'no'"),
        ("preprocessor_config.json", {"size": {"shortest_edge": -1}}, r"size must be sides of 1 \.\. 2048 px"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 60000}}, r"size must be sides of 1 \.\. 2048 px"),
        ("preprocessor_config.json", {"size": {"side": 1}}, r"size must be sides of 1 \.\. 2048 px"),
        ("preprocessor_config.json", {"crop_size": 10**9}, r"crop_size must be sides of 1 \.\. 2048 px"),
        ("config.json", {"tubelet_size": 0}, r"config.tubelet_size must be 1 \.\. 1,048,576, got 0"),
        ("config.json", {"num_attention_heads": 0}, r"config.num_attention_heads must be 1 \.\. 1,048,576, got 0"),
        ("config.json", {"num_attention_heads": 5}, "config: its network cannot be built|not a multiple"),
        ("config.json", {"intermediate_size": -8}, r"config.intermediate_size must be 1 \.\. 1,048,576, got -8"),
        ("config.json", {"hidden_act": "nobody"}, "config.hidden_act must be an activation .*, got 'nobody'"),
        # Each would take gigabytes before the first weight is compared.
        ("config.json", {"hidden_size": 16384, "intermediate_size": 2**20, "num_hidden_layers": 64}, "of each other"),
        ("config.json", {"hidden_size": 2**20, "num_frames": 64, "tubelet_size": 1}, "numbers, over 8,388,608"),
    ],
)
def test_folders_that_cannot_be_fed_are_refused(
    tmp_path: Path, file: str, entries: dict[str, Any], message: str
) -> None:
    save(tmp_path, "videomae")
    edit(tmp_path / file, **entries)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    save(tmp_path, "videomae")
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=f"has no {file}"):
        read_folder(tmp_path)


def test_a_shard_outside_of_the_folder_is_not_read(tmp_path: Path) -> None:
    save(tmp_path, "timesformer", max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={**places, next(iter(places)): "../elsewhere.safetensors"})
    with pytest.raises(ValueError, match=r"shards lie beside their index, got '\.\./elsewhere"):
        read_folder(tmp_path)


def test_weights_of_another_size_are_refused_before_they_are_read(tmp_path: Path) -> None:
    save(tmp_path, "videomae")
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    with file.open("r+b") as opened:
        opened.truncate(200 * 2**30)
    with pytest.raises(ValueError, match=r"model\.safetensors has 214,748,364,800 bytes, nearly all of them holes"):
        read_folder(tmp_path)
    file.write_bytes(content + b"x" * 2**25)
    with pytest.raises(WeightsMismatch, match="they cannot be of each other"):
        read_folder(tmp_path)


@pytest.mark.timeout(60)
def test_only_regular_files_are_opened_and_only_those_that_are_needed(tmp_path: Path) -> None:
    save(tmp_path, "timesformer", max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    os.mkfifo(tmp_path / "model-extra.safetensors")
    (tmp_path / "model-zero.safetensors").symlink_to("/dev/zero")
    assert list(read_folder(tmp_path).files) == shards
    shards[0].unlink()
    os.mkfifo(shards[0])
    with pytest.raises(ValueError, match=f"{shards[0].name} is not a regular file"):
        read_folder(tmp_path)


# --- training


@pytest.mark.parametrize("model_type", ["timesformer", "vjepa2"])
def test_drop_path_is_active_in_training_only(model_type: str) -> None:
    config = {"model_type": model_type, **CONFIGS[model_type]}
    torch.manual_seed(0)
    model = huggingface(num_classes=3, config=config, rgb_mean=(0.5,) * 3, rgb_std=(0.5,) * 3, drop_path=0.9)
    rgb = torch.randn(4, 1, 4, 3, 32, 32)
    with torch.inference_mode():
        model.eval()
        assert torch.equal(model(rgb=rgb, flow=None), model(rgb=rgb, flow=None))
        model.train()
        assert not torch.equal(model(rgb=rgb, flow=None), model(rgb=rgb, flow=None))


def test_drop_path_is_refused_where_the_network_has_none() -> None:
    config = {"model_type": "videomae", **CONFIGS["videomae"]}
    with pytest.raises(ValueError, match="drop_path: videomae has no stochastic depth"):
        huggingface(num_classes=3, config=config, rgb_mean=(0.5,) * 3, rgb_std=(0.5,) * 3, drop_path=0.1)
