"""Classes from words: tiny CLIP, SigLIP, SigLIP 2 and X-CLIP, written by save_pretrained, beside the library's own."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import kinoray
import test_huggingface as hub
from kinoray.cli import main
from kinoray.config.shared import ModelConfig
from kinoray.errors import CheckpointMismatch, ConfigError, KinorayError, ModelError
from kinoray.label.config import LabelConfig
from kinoray.label.predict import Model
from kinoray.network.build import build_model, classifier_names
from kinoray.network.checkpoint import load_meta, load_model
from kinoray.network.published import checkpoint_of, embed_text
from kinoray.network.scorer import ScorerConfig, check_scorer
from kinoray.storage.objects import Storage
from small_sets import colour_video
from vcm_sdd.preprocess import preprocess
from video_baselines import image_text_folder
from video_baselines.image_text import TEXT_TYPES
from video_baselines.image_text_folder import PROMPTS

transformers = pytest.importorskip("transformers", reason="needs the package transformers")

LOCAL = Storage()
NAMES = ("riding a bike", "running", "red_circle")
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
TEXT = {**TOWER, "hidden_size": 16, "max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {"projection_dim": 20, "vision_config": {**TOWER, "image_size": 32, "patch_size": 8}},
    "siglip": {"vision_config": {**TOWER, "image_size": 32, "patch_size": 8}},
    "siglip2": {"vision_config": {**TOWER, "patch_size": 8, "num_patches": 16}},
    "xclip": {
        "projection_dim": 16,
        "prompt_num_attention_heads": 2,
        "prompt_layers": 1,
        "prompt_alpha": 1.0,
        "vision_config": {
            **TOWER,
            "image_size": 32,
            "patch_size": 8,
            "num_frames": 4,
            "mit_hidden_size": 16,
            "mit_intermediate_size": 32,
            "mit_num_attention_heads": 2,
        },
    },
}
SQUARE = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPImageProcessor", SQUARE),
    "siglip": ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}}),
    "siglip2": ("Siglip2ImageProcessor", {"patch_size": 8, "max_num_patches": 16}),
    "xclip": ("VideoMAEImageProcessor", SQUARE),
}


def tokenizer_of(kind: str) -> Any:
    """One token a letter, by CLIP's class or by SigLIP 2's (the first SigLIP's own needs another package)."""
    if kind.startswith("siglip"):
        words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *LETTERS]
        made = transformers.Siglip2Tokenizer(
            vocab={word: number for number, word in enumerate(words)},
            merges=[],
            add_bos_token=False,
            add_eos_token=True,
            padding_side="right",
            model_input_names=["input_ids"],
        )
        assert len(made("a b")["input_ids"]) == 4
        return made
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


def save(folder: Path, kind: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and processor, with random weights, in a folder."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(kind)
    text = {**TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    if kind.startswith("siglip"):
        text["projection_size"] = TOWER["hidden_size"]
    config = transformers.AutoConfig.for_model(kind, text_config=text, **CONFIGS[kind])
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(model.logit_scale, 3.0)
    processor = getattr(transformers, PROCESSORS[kind][0])(**PROCESSORS[kind][1])
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return model, tokenizer, processor


def classes_file(folder: Path, *lines: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(lines) + "\n")
    return str(folder / "classes.txt")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module", params=list(TEXT_TYPES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    folder = tmp_path_factory.mktemp(request.param) / "saved"
    return folder, *save(folder, request.param)


def imported(folder: Path, into: Path, *lines: str, **settings: Any) -> tuple[Any, Any, str]:
    """The network of a folder for these classes, built again from its checkpoint alone."""
    classes = classes_file(into, *(lines or NAMES))
    uri = checkpoint_of(f"hf:{folder}", "checkpoint", lambda line: None, classes=classes, **settings)
    return *load_model(LOCAL, uri), uri


def texts_of(name: str, kind: str) -> list[str]:
    return [said.replace("{}", name.replace("_", " ")) for said in (("{}",) if kind == "xclip" else PROMPTS)]


def text_features(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """By the library, one text after the other."""
    options = {"padding": "max_length", "max_length": 64} if "siglip" in model.config.model_type else {}
    with torch.inference_mode():
        fed = [tokenizer([text], return_tensors="pt", **options) for text in texts]
        return torch.cat([model.get_text_features(**one).pooler_output for one in fed])


def clip_of(spec: Any, num_frames: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Square frames uint8 [T, Y, X, 3], and as the network is fed them [1, T, 1, 3, P, P]."""
    frames = torch.randint(0, 256, (num_frames, 60, 60, 3), generator=torch.Generator().manual_seed(seed)).byte()
    return frames, preprocess(frames, spec)[None, :, None]


@pytest.mark.usefixtures("offline")
def test_logits_are_the_librarys_own_over_the_mean_of_frames_and_prompts(
    saved: tuple[Path, Any, Any, Any], tmp_path: Path
) -> None:
    folder, theirs, tokenizer, processor = saved
    kind = theirs.config.model_type
    model, meta, _ = imported(folder, tmp_path)
    assert (meta.labels, meta.scores) == (NAMES, "softmax")
    texts = [text_features(theirs, tokenizer, texts_of(name, kind)) for name in NAMES]
    frames, rgb = clip_of(model.input_spec, 4, seed=1)
    with torch.inference_mode():
        found = model(rgb=rgb, flow=None)[0]
        if kind == "xclip":
            words = tokenizer([texts_of(name, kind)[0] for name in NAMES], return_tensors="pt", padding=True)
            fed = processor([frame.numpy() for frame in frames], return_tensors="pt").pixel_values
            expected = theirs(**words, pixel_values=fed).logits_per_video[0]
        else:
            fed = processor(images=[frame.permute(2, 0, 1) for frame in frames], return_tensors="pt")
            pictures = F.normalize(theirs.get_image_features(**fed).pooler_output, dim=-1)
            video = F.normalize(pictures.mean(dim=0), dim=-1)
            classes = torch.stack([F.normalize(F.normalize(one, dim=-1).mean(dim=0), dim=-1) for one in texts])
            expected = np.exp(3.0) * classes @ video + getattr(theirs, "logit_bias", 0.0)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_frame_is_scored_as_the_librarys_pipeline_scores_the_picture(kind: str, tmp_path: Path) -> None:
    theirs, tokenizer, processor = save(tmp_path / "saved", kind)
    pipeline = transformers.pipeline(
        "zero-shot-image-classification", model=theirs, tokenizer=tokenizer, image_processor=processor, device="cpu"
    )
    model, _, _ = imported(tmp_path / "saved", tmp_path, prompts=("This is a photo of {}.",))
    frames, rgb = clip_of(model.input_spec, 1, seed=2)
    from PIL import Image

    names = [name.replace("_", " ") for name in NAMES]
    answer = pipeline(Image.fromarray(frames[0].numpy()), candidate_labels=names)
    expected = [next(one["score"] for one in answer if one["label"] == name) for name in names]
    with torch.inference_mode():
        logits = model(rgb=rgb, flow=None)[0]
    found = logits.softmax(dim=0) if kind == "clip" else logits.sigmoid()
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


def test_a_checkpoint_has_no_text_tower_and_needs_no_folder(saved: tuple[Path, Any, Any, Any], tmp_path: Path) -> None:
    folder, theirs, _, _ = saved
    kind = theirs.config.model_type
    shutil.copytree(folder, tmp_path / "saved")
    model, meta, uri = imported(tmp_path / "saved", tmp_path)
    shutil.rmtree(tmp_path / "saved")
    again, _ = load_model(LOCAL, uri)
    _, rgb = clip_of(model.input_spec, 4, seed=3)
    with torch.inference_mode():
        assert torch.equal(again(rgb=rgb, flow=None), model(rgb=rgb, flow=None))
    names = set(model.state_dict())
    assert not {name for name in names if "text_" in name}
    whole = {f"rgb_net.net.{name}" for name in theirs.state_dict() if not name.startswith("text_")}
    assert names == whole | {"rgb_net.classifier.weight"}
    config = ModelConfig(factory="image_text", options=meta.model.options)
    assert classifier_names(build_model(config, 7), config, 7) == {"rgb_net.classifier.weight"}
    assert meta.origin is not None
    assert meta.origin.fed["prompts"] == {name: texts_of(name, kind) for name in NAMES}
    sample, view = meta.clip.sample, meta.clip.view
    assert (sample.num_segments, sample.frames_per_segment) == ((4, 1) if kind == "xclip" else (8, 1))
    assert (view.crop_px, view.resize) == (32, "stretch" if kind == "siglip" else "short_side")


def test_embeddings_are_unit_vectors_in_the_space_of_texts(saved: tuple[Path, Any, Any, Any], tmp_path: Path) -> None:
    folder, theirs, tokenizer, _ = saved
    (tmp_path / "a.mp4").write_bytes(colour_video("red", 1))
    classes = classes_file(tmp_path, *NAMES)
    with kinoray.load(f"hf:{folder}", classes=classes, embeddings=True, all_scores=True) as model:
        answer = model.predict(tmp_path / "a.mp4")
    assert answer.label in NAMES
    assert answer.embedding is not None
    vector = answer.embedding.astype(np.float64)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=2e-3)  # as float16 has it
    for place in (f"hf:{folder}", model.checkpoint):
        text = embed_text(LOCAL, place, "a red circle")
        assert text.dtype == np.float32
        assert text.shape == vector.shape
        expected = F.normalize(text_features(theirs, tokenizer, ["a red circle"])[0], dim=-1)
        np.testing.assert_allclose(text, expected.numpy(), rtol=0, atol=1e-5)


def test_embeddings_are_those_of_the_classifier_whatever_else_has_as_many_outputs(tmp_path: Path) -> None:
    save(tmp_path / "saved", "clip")
    names = [f"number {number}" for number in range(TOWER["hidden_size"])]
    (tmp_path / "a.mp4").write_bytes(colour_video("red", 1))
    with kinoray.load(f"hf:{tmp_path / 'saved'}", classes=classes_file(tmp_path, *names), embeddings=True) as model:
        answer = model.predict(tmp_path / "a.mp4")
    assert answer.embedding is not None
    assert answer.embedding.shape == (CONFIGS["clip"]["projection_dim"],)


def test_bf16_moves_no_logit_by_the_rounding_of_a_cosine(tmp_path: Path) -> None:
    save(tmp_path / "saved", "clip")
    model, _, _ = imported(tmp_path / "saved", tmp_path)
    part = model.rgb_net
    features = torch.randn(2, CONFIGS["clip"]["projection_dim"], generator=torch.Generator().manual_seed(1))
    part._pictures = lambda frames: features  # the tower itself rounds; what follows it must not
    frames = torch.zeros(1, 2, 3, 32, 32)
    with torch.inference_mode():
        expected = part(frames)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = part(frames)
    assert torch.equal(found, expected)


# --- classes and prompts


def model_digest(folder: Path, into: Path, *lines: str, **settings: Any) -> str:
    return load_meta(LOCAL, imported(folder, into, *lines, **settings)[2]).model_digest


def test_other_words_are_another_network_and_the_same_are_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save(folder, "clip")
    first = model_digest(folder, tmp_path / "a", "walk", "run")
    assert model_digest(folder, tmp_path / "b", "walk", "", "  run  ") == first
    others = [
        model_digest(folder, tmp_path / "a", "walk", "jump"),
        model_digest(folder, tmp_path / "a", "run", "walk"),
        model_digest(folder, tmp_path / "a", "walk", "run: someone who runs"),
        model_digest(folder, tmp_path / "a", "walk", "run", prompts=("{}",)),
    ]
    assert len({first, *others}) == 5
    shutil.rmtree(tmp_path / "cache")
    assert model_digest(folder, tmp_path / "c", "walk", "run") == first


def test_a_line_may_say_its_own_text_and_prompts_are_averaged(tmp_path: Path) -> None:
    theirs, tokenizer, _ = save(tmp_path / "saved", "clip")
    model, meta, _ = imported(tmp_path / "saved", tmp_path, "up", "down: falling: fast", prompts=("{}", "go {} now"))
    assert meta.labels == ("up", "down")
    up = F.normalize(text_features(theirs, tokenizer, ["up", "go up now"]), dim=-1).mean(dim=0)
    expected = torch.stack([F.normalize(up, dim=-1), *F.normalize(text_features(theirs, tokenizer, ["falling: fast"]))])
    torch.testing.assert_close(model.rgb_net.classifier.weight, expected, rtol=0, atol=1e-5)


LONG = "a" * 70


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        ((), (), r"classes: .*classes.txt names no class; it must have one a line"),
        (("a", "b", "a: again"), (), r"classes: .*classes.txt names 'a' twice"),
        (("a", "b:"), (), r"classes: .*classes.txt says nothing of 'b:'"),
        (("a", LONG), (), r"classes: 'a video of a+\.' has \d+ tokens, its text tower takes 64: say it in fewer words"),
        (("a", f"b: {LONG}"), (), r"classes: 'a+' has 72 tokens, its text tower takes 64"),
        (("a", "b"), ("--prompts", "a video"), r"prompts must each have \{\} where the name .*, got 'a video'"),
        (("a", "b"), ("--labels", "LABELS"), r"labels must be left out with classes"),
    ],
)
def test_words_that_cannot_be_are_refused_in_one_line(
    lines: tuple[str, ...], flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "saved", "clip")
    (tmp_path / "LABELS").write_text("a\nb\n")
    flags = tuple(str(tmp_path / flag) if flag == "LABELS" else flag for flag in flags)
    classes = classes_file(tmp_path, *lines)
    capsys.readouterr()
    named = ["--classes", classes, "--out", str(tmp_path / "out")]
    assert main(["import", f"hf:{tmp_path / 'saved'}", *named, *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said)
    assert not (tmp_path / "out").exists()


def test_networks_with_classes_of_their_own_take_none_and_those_without_need_some(tmp_path: Path) -> None:
    classes = classes_file(tmp_path, *NAMES)
    hub.save(tmp_path / "closed", "videomae")
    with pytest.raises(ConfigError, match=r"classes: .*/closed is of type 'videomae', which does not compare pictures"):
        checkpoint_of(f"hf:{tmp_path / 'closed'}", "checkpoint", print, classes=classes)
    closed = checkpoint_of(f"hf:{tmp_path / 'closed'}", "checkpoint", print)
    for source in (closed, "torchvision:r3d_18"):
        with pytest.raises(ConfigError, match=r"classes must be left out with .*, which has classes of its own"):
            checkpoint_of(source, "checkpoint", print, classes=classes)
    with pytest.raises(ConfigError, match=r"prompts must be left out without classes"):
        checkpoint_of(closed, "checkpoint", print, prompts=("{}",))
    with pytest.raises(ConfigError, match=r"does not compare pictures with texts; a text is looked for among"):
        embed_text(LOCAL, closed, "a")
    save(tmp_path / "open", "clip")
    with pytest.raises(ConfigError, match=r"classes: hf:.*/open compares pictures with texts and has no classes"):
        checkpoint_of(f"hf:{tmp_path / 'open'}", "checkpoint", print)


def test_early_exit_and_segment_scores_are_refused_since_frames_are_one_answer(tmp_path: Path) -> None:
    save(tmp_path / "saved", "clip")
    model, _, _ = imported(tmp_path / "saved", tmp_path)
    with pytest.raises(ConfigError, match="looks at all of them together"):
        check_scorer(model, ScorerConfig(segment_logits=True), 3)


# --- folders of strangers


def without_text_tower(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    save_file({name: x for name, x in state.items() if "text_" not in name}, folder / "model.safetensors")


def edit_text(**entries: Any) -> Any:
    def edit(folder: Path) -> None:
        text = json.loads((folder / "config.json").read_text())["text_config"]
        hub.edit(folder / "config.json", text_config={**text, **entries})

    return edit


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_text_tower, "has no text tower in its weights: save the whole CLIPModel"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "has no tokenizer.json: save the tokenizer beside the model",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read as a tokenizer"),
        (lambda folder: hub.edit(folder / "config.json", text_config=[1]), "text_config must be an object"),
        (edit_text(vocab_size=2**40), r"config.vocab_size must be 1 \.\. 1,048,576"),
        (edit_text(max_position_embeddings=2**40), r"config.max_position_embeddings must be 1 \.\."),
        (edit_text(num_hidden_layers=10**6), "config.num_hidden_layers must be at most 128"),
        (edit_text(vocab_size=20), "weights of .* do not fit CLIPModel: .* of another shape"),
        (edit_text(eos_token_id=7), "ends no text with token 7, where the text tower looks for its feature"),
    ],
)
def test_a_folder_that_is_no_whole_network_is_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path / "saved", "clip")
    spoil(tmp_path / "saved")
    with pytest.raises(ModelError, match=message):
        imported(tmp_path / "saved", tmp_path)
    assert not list((tmp_path / "cache" / "kinoray" / "networks").glob("hf-*"))


def test_a_tokenizer_of_another_network_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "saved", "clip")
    tokenizer = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["a</w>"] = 5000
    (tmp_path / "saved" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"makes tokens \[.*5000.*\] of .*, the text tower knows 0 \.\. 81"):
        imported(tmp_path / "saved", tmp_path)


WORDS = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}
DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
ENDLESS = {"type": "Split", "pattern": {"Regex": "(a|a|aa)+$!"}, "behavior": "Removed", "invert": False}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"normalizer": {"type": "Sequence", "normalizers": [DOUBLED] * 40}},
            "its rules take more than 1 GiB|gave no tokens",
        ),
        ({"pre_tokenizer": ENDLESS}, "retry-limit|gave no tokens"),
        ({"model": {**WORDS, "vocab": {"a": 1}}}, r"Exception: WordLevel error: Missing \[UNK\] token"),
    ],
)
def test_a_tokenizer_of_evil_rules_costs_an_error(
    rules: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of doubled letters it would take a terabyte; and what the package raises is at times no Exception."""
    monkeypatch.setattr(image_text_folder, "_TOKENIZER_MEMORY", 2**30)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": WORDS}))
    texts = ["a", "b " + "a" * 40]
    assert image_text_folder._tokenized(file, texts, 1, "a") == {"tokens": [[1, [1]], [1, [0]]], "padding": 1}
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": WORDS, **rules}))
    monkeypatch.setattr(image_text_folder, "_TOKENIZER_S", 3.0)
    with pytest.raises(ValueError, match=message):
        image_text_folder._tokenized(file, texts, 1, None)


def test_a_tokenizer_that_would_cut_texts_cuts_none(tmp_path: Path) -> None:
    _, tokenizer, _ = save(tmp_path / "saved", "clip")
    first = model_digest(tmp_path / "saved", tmp_path)
    body = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    body["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    body["padding"] = {
        "strategy": {"Fixed": 60},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    }
    (tmp_path / "saved" / "tokenizer.json").write_text(json.dumps(body))
    assert model_digest(tmp_path / "saved", tmp_path) == first
    assert len(tokenizer("running")["input_ids"]) > 4


def test_a_text_is_not_read_by_weights_that_changed(tmp_path: Path) -> None:
    save(tmp_path / "saved", "clip")
    _, _, uri = imported(tmp_path / "saved", tmp_path)
    other, _, _ = save(tmp_path / "other", "clip")
    torch.nn.init.zeros_(other.text_projection.weight)
    other.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointMismatch, match=r"is not what .* was imported from: its weights have sha256"):
        embed_text(LOCAL, uri, "a")
    shutil.rmtree(tmp_path / "saved")
    with pytest.raises(KinorayError, match="is no such folder"):
        embed_text(LOCAL, uri, "a")


def test_a_text_is_not_read_by_another_network_than_the_one_that_labelled(tmp_path: Path) -> None:
    """Two CLIPs have vectors of one length, and texts of the one are nowhere near videos of the other."""
    save(tmp_path / "saved", "clip")
    other, _, _ = save(tmp_path / "other", "clip")
    torch.nn.init.ones_(other.text_projection.weight)
    other.save_pretrained(tmp_path / "other")
    _, meta, uri = imported(tmp_path / "saved", tmp_path)
    _, _, another = imported(tmp_path / "other", tmp_path)
    by = (uri, meta.model_digest)
    expected = embed_text(LOCAL, uri, "a", labelled_by=by)
    assert (embed_text(LOCAL, f"hf:{tmp_path / 'saved'}", "a", labelled_by=by) == expected).all()
    with pytest.raises(ConfigError, match=r"checkpoint: .* is not the network that labelled these videos"):
        embed_text(LOCAL, another, "a", labelled_by=by)
    with pytest.raises(CheckpointMismatch, match=rf"other is not what {uri} was imported from"):
        embed_text(LOCAL, f"hf:{tmp_path / 'other'}", "a", labelled_by=by)
    found = embed_text(LOCAL, f"hf:{tmp_path / 'other'}", "a", labelled_by=("/gone", "0"))
    assert (found != expected).any()


def test_one_class_alone_is_warned_of(tmp_path: Path) -> None:
    save(tmp_path / "saved", "clip")
    for names, expected in ((("running",), 1), (("running", "jumping"), 0)):
        _, _, uri = imported(tmp_path / "saved", tmp_path, *names)
        said: list[str] = []
        Model(LabelConfig(source="", checkpoint=uri), warn=said.append).close()
        assert (
            sum("knows one class, 'running', so every video is that with a score of 1" in line for line in said)
            == expected
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"vocab_size": 5}}, "config.text_config is not an entry"),
        ({"vision_config": {"_attn_implementation": "x"}}, "config.vision_config._attn_implementation is not an entry"),
        ({"vision_config": 5}, "config.vision_config must be entries of a config, got 5"),
        ({"model_type": "bert"}, "config.model_type must be one of clip, siglip, siglip2, xclip, got 'bert'"),
        ({"vision_config": {"image_size": 32, "patch_size": 8, "hidden_size": 25}}, "config is not one of clip"),
    ],
)
def test_a_checkpoint_builds_only_what_the_library_declares(change: dict[str, Any], message: str) -> None:
    config = {"model_type": "clip", **CONFIGS["clip"], **change}
    options = {"config": config, "rgb_mean": [0.5] * 3, "rgb_std": [0.5] * 3}
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_model(ModelConfig(factory="image_text", options=options), 3)


# --- a labelling


@pytest.mark.ray
@pytest.mark.slow
def test_a_library_is_labelled_with_words_and_other_words_are_another_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "saved", "siglip")
    (tmp_path / "library").mkdir()
    for number, label in enumerate(("red", "green", "blue")):
        (tmp_path / "library" / f"{label}.mp4").write_bytes(colour_video(label, number))
    out = str(tmp_path / "out")
    flags = ["--checkpoint", f"hf:{tmp_path / 'saved'}", "--out", out, "--embeddings", "--resources.num-workers", "1"]
    first = ["label", str(tmp_path / "library"), *flags, "--classes", classes_file(tmp_path / "a", *NAMES)]
    assert main(first) == 0, capsys.readouterr().err
    table = kinoray.read(out).to_pylist()
    assert len(table) == 3
    assert all(set(row["label_topk"]) == set(NAMES) for row in table)
    vectors = np.array([row["embedding"] for row in table], np.float64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
    capsys.readouterr()
    assert main(["labels", "search", out, "--text", "a red circle", "--format", "jsonl"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    near = vectors @ embed_text(LOCAL, f"hf:{tmp_path / 'saved'}", "a red circle").astype(np.float64)
    assert [row["video_id"] for row in found] == [table[place]["video_id"] for place in np.argsort(-near)]
    np.testing.assert_allclose([row["similarity"] for row in found], np.sort(near)[::-1], atol=1e-4)
    with kinoray.load(f"hf:{tmp_path / 'saved'}", classes=first[-1], embeddings=True) as model:
        again = kinoray.label(tmp_path / "library", model, out=out, **{"resources.num_workers": 1})
    assert again.labelled == 3
    assert len(list(Path(out).glob("*/job.json"))) == 1
    scores = ["--scores", "sigmoid", "--threshold", "1"]
    assert main([*first, *scores]) == 0
    other = [*first[:-1], classes_file(tmp_path / "b", "walking", "standing")]
    assert main(other) == 0
    roots = sorted(path.parent for path in Path(out).glob("*/job.json"))
    assert len(roots) == 3
    tables = [kinoray.read(str(root)).to_pylist() for root in roots]
    assert sorted(len(row["label_topk"]) for rows in tables for row in rows) == [0] * 3 + [2] * 3 + [3] * 3
    none = next(rows for rows in tables if not rows[0]["label_topk"])
    assert all(row["abstained"] for row in none)
