"""The whole network: what the factory accepts, what it makes, what it refuses, and its pretrained weights."""

import dataclasses
import inspect
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, zeros

import vcm_sdd as package
from kinoray.config.shared import ModelConfig
from kinoray.errors import ConfigError
from kinoray.network.build import require_known_model
from vcm_sdd.backbone import RESNETS, ResNetGrid, build_backbone, build_backbones
from vcm_sdd.network import VCMSDD, vcm_sdd, vcm_sdd_r101
from vcm_sdd.options import Options
from vcm_sdd.weights import WeightsMismatch, load_strict, read_state


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make_clip(batch: int = 2, segments: int = 2, frames: int = 2, size: int = 32) -> dict[str, Tensor]:
    shape = (batch, segments, frames)
    return {"rgb": torch.randn(*shape, 3, size, size), "flow": torch.randn(*shape, 2, size, size)}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class TestFactory:
    def test_papers_network_has_the_published_number_of_parameters(self) -> None:
        with torch.device("meta"):
            model = vcm_sdd_r101(num_classes=400)
        assert count(model.rgb_backbone) == 42_500_160
        assert count(model.flow_backbone) == 42_497_024
        assert count(model.head.rgb_stc) == 128
        assert count(model.head.mff) == 0
        assert count(model.head.rgb_classifier) + count(model.head.flow_classifier) == 1_639_200
        assert count(model) == 86_636_512

    @pytest.mark.parametrize("factory", [vcm_sdd, vcm_sdd_r101])
    def test_the_factory_says_its_options_by_name_with_their_defaults(self, factory: Callable[..., VCMSDD]) -> None:
        parameters = dict(inspect.signature(factory).parameters)
        assert parameters.pop("num_classes").default is inspect.Parameter.empty
        assert {name: parameter.default for name, parameter in parameters.items()} == dataclasses.asdict(Options())
        assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}

    def test_an_option_that_there_is_not_is_named(self) -> None:
        with pytest.raises(TypeError, match="'head'"):
            vcm_sdd(num_classes=3, head=2)
        for name in ("vcm_sdd", "vcm_sdd_r101"):
            message = rf"model.options.head is not an option of {name}; known: .*, heads, "
            with pytest.raises(ConfigError, match=message):
                require_known_model(ModelConfig(factory=name, options={"head": 2}))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
            ({"num_classes": True}, "num_classes must be a whole number of at least 1, got True"),
            ({"flow_channels": 2.0}, "flow_channels must be a whole number of at least 1, got 2.0"),
            ({"backbone": "resnet42"}, r"backbone must be tiny, timm:NAME or one of resnet18, .*, got 'resnet42'"),
            ({"backbone": 18}, "backbone must be tiny, .*, got 18"),
            ({"backbone_weights": 18}, "backbone_weights must be text, or left out, got 18"),
            ({"heads": 0}, "heads must be at least 1, got 0"),
            ({"heads": "8"}, "heads must be a whole number, got '8'"),
            ({"heads": 7}, "heads must divide the backbone's 96 channels, got heads=7"),
            ({"stc": 1}, "stc must be true or false, got 1"),
            ({"mff": "off"}, "mff must be true or false, got 'off'"),
            ({"scale": "sqrt"}, "scale must be one of 'frobenius', 'dim', got 'sqrt'"),
            ({"geometry": "linear"}, "geometry must be one of 'log', 'inverse_log', got 'linear'"),
            ({"metric": "l3"}, "metric must be one of 'box', 'l1', 'l2', got 'l3'"),
            ({"eq12": None}, "eq12 must be one of 'text', 'literal', got None"),
            ({"stc_init": "zero"}, "stc_init must be one of 'near', 'random', got 'zero'"),
            ({"consensus": "max"}, "consensus must be one of 'logits', 'probs', got 'max'"),
            ({"scope": "video"}, "scope must be one of 'segment', 'frame', got 'video'"),
            ({"eps": 0}, "eps must lie between 0 and 1, got 0"),
            ({"eps": float("nan")}, "eps must be a finite number, got nan"),
            ({"radius": -1}, "radius must be at least 0 with self_loop=True, got -1"),
            ({"radius": 65}, "radius must be at most 64, got 65"),
            ({"radius": 0, "self_loop": False}, "radius must be at least 1 with self_loop=False, got 0"),
        ],
    )
    def test_wrong_option_is_named_with_what_was_expected_and_found(
        self, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            vcm_sdd(**{"num_classes": 3, "backbone": "tiny", **options})

    @pytest.mark.parametrize("name", RESNETS)
    def test_every_residual_network_of_torchvision_makes_its_own_grid(self, name: str) -> None:
        with torch.device("meta"):
            backbone = build_backbone(name)
            full = torchvision.models.get_model(name)
            features = backbone(torch.empty(2, 3, 96, 65))
        assert features.shape == (2, full.fc.in_features, 3, 3)
        assert set(backbone.state_dict()) == {key for key in full.state_dict() if not key.startswith("fc.")}

    def test_public_names_are_exactly_all(self) -> None:
        public = {
            name for name, value in vars(package).items() if not name.startswith("_") and not inspect.ismodule(value)
        }
        assert public == set(package.__all__)


class TestForward:
    @pytest.mark.parametrize("stc", [True, False])
    @pytest.mark.parametrize("mff", [True, False])
    def test_all_four_rows_of_the_ablation_train_every_parameter(self, stc: bool, mff: bool) -> None:
        model = vcm_sdd(num_classes=5, backbone="tiny", stc=stc, mff=mff)
        logits = model(**make_clip())
        assert logits.shape == (2, 5)
        assert logits.dtype == torch.float32
        torch.nn.functional.cross_entropy(logits, torch.tensor([1, 3])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # A mean over positions hardly sees STC, but it sees it.
            assert parameter.grad.abs().max() > 0, name

    def test_ablation_rows_differ_only_where_they_should(self) -> None:
        clip = make_clip(size=48)
        outputs = {}
        for stc, mff in ((False, False), (True, False), (False, True), (True, True)):
            torch.manual_seed(3)
            model = vcm_sdd(num_classes=5, backbone="tiny", mff=mff, stc=False)
            if stc:
                with_stc = vcm_sdd(num_classes=5, backbone="tiny", mff=mff)
                with_stc.load_state_dict(model.state_dict(), strict=False)
                model = with_stc
            outputs[stc, mff] = model.eval()(**clip)
        values = list(outputs.values())
        assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])

    def test_neither_stc_nor_mff_is_a_two_stream_tsn_with_averaged_logits(self) -> None:
        model = vcm_sdd(num_classes=5, backbone="resnet18", stc=False, mff=False).eval()
        clip = make_clip(1, 3, 2, 64)
        with torch.no_grad():
            logits = []
            for stream, x in (("rgb", clip["rgb"]), ("flow", clip["flow"])):
                grid = getattr(model, f"{stream}_backbone")(x.flatten(0, 2))
                logits.append(getattr(model.head, f"{stream}_classifier")(grid.mean(dim=(2, 3))).mean(dim=0))
            torch.testing.assert_close(model(**clip)[0], (logits[0] + logits[1]) / 2, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("segments", "frames", "size"), [(1, 1, 16), (5, 1, 32), (1, 6, 48), (3, 2, 40)])
    def test_segments_frames_and_sizes_are_free_at_run_time(self, segments: int, frames: int, size: int) -> None:
        model = vcm_sdd(num_classes=5, backbone="tiny").eval()
        clip = make_clip(2, segments, frames, size)
        logits = model(**clip)
        assert logits.shape == (2, 5)
        # A video's logits do not depend on its neighbours in the batch.
        alone = model(rgb=clip["rgb"][:1], flow=clip["flow"][:1])
        torch.testing.assert_close(alone, logits[:1], rtol=1e-4, atol=1e-5)

    def test_channels_last_memory_gives_the_same_logits(self) -> None:
        model = vcm_sdd(num_classes=5, backbone="tiny").eval()
        clip = make_clip()
        before = model(**clip)
        torch.testing.assert_close(model.to(memory_format=torch.channels_last)(**clip), before, rtol=1e-4, atol=1e-5)

    def test_bf16_autocast_stays_close_and_trains(self) -> None:
        model = vcm_sdd(num_classes=5, backbone="tiny").eval()
        clip = make_clip()
        exact = model(**clip)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(**clip)
        rounded.float().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.05 * float(exact.detach().abs().max()))

    def test_state_dict_round_trips_exactly(self) -> None:
        model, other = (vcm_sdd(num_classes=5, backbone="tiny", share_stc=False) for _ in range(2))
        other.load_state_dict(model.state_dict())
        clip = make_clip()
        assert torch.equal(model.eval()(**clip), other.eval()(**clip))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"flow": None}, r"flow must be float \[videos, segments, frames, 2, height, width\], got None"),
            ({"rgb": None}, r"rgb must be float \[videos, segments, frames, 3, height, width\], got None"),
            ({"rgb": zeros(2, 2, 2, 4, 32, 32)}, r"rgb must be .* 3, height.* got shape \(2, 2, 2, 4, 32, 32\)"),
            ({"flow": zeros(2, 2, 2, 3, 32, 32)}, r"flow must be .* 2, height.* got shape \(2, 2, 2, 3, 32, 32\)"),
            ({"rgb": zeros(2, 2, 3, 32, 32)}, r"rgb must be .* got shape \(2, 2, 3, 32, 32\)"),
            ({"rgb": zeros(2, 0, 2, 3, 32, 32)}, r"rgb must be .* none of them 0, got shape \(2, 0, "),
            ({"rgb": zeros(2, 2, 2, 3, 32, 32).byte()}, r"rgb must be float .* got dtype torch.uint8"),
            ({"flow": zeros(2, 2, 2, 2, 32, 32).char()}, r"flow must be float .* got dtype torch.int8"),
            ({"flow": zeros(2, 2, 3, 2, 32, 32)}, r"equal videos, .* got rgb \(2, 2, 2, 3, .* flow \(2, 2, 3, 2, "),
            ({"flow": zeros(2, 2, 2, 2, 32, 16)}, r"equal videos, .* got rgb \(2, 2, 2, 3, 32, 32\) and flow"),
        ],
    )
    def test_wrong_input_says_what_was_expected_and_received(self, change: dict[str, Any], message: str) -> None:
        model = vcm_sdd(num_classes=5, backbone="tiny")
        with pytest.raises(ValueError, match=message):
            model(**{**make_clip(), **change})

    def test_eight_random_clips_are_learnt_by_heart(self) -> None:
        """Both streams are needed: labels are the exclusive or of an RGB and a flow pattern."""
        model = vcm_sdd(num_classes=2, backbone="tiny", scale="dim")
        appearance, motion = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
        labels = appearance ^ motion
        clip = make_clip(8, 1, 2, 32)
        clip["rgb"][:, :, :, 0] += 2.0 * appearance.view(8, 1, 1, 1, 1)
        clip["flow"][:, :, :, 0] += 2.0 * motion.view(8, 1, 1, 1, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(40):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(**clip), labels).backward()
            optimizer.step()
        assert torch.equal(model(**clip).argmax(dim=1), labels)


class TestWeights:
    @pytest.fixture
    def resnet(self) -> torchvision.models.ResNet:
        return torchvision.models.resnet18().eval()

    @pytest.mark.parametrize("kind", ["safetensors", "pth"])
    def test_plain_torchvision_state_dict_gives_torchvisions_features(
        self, resnet: torchvision.models.ResNet, kind: str, tmp_path: Path
    ) -> None:
        path = tmp_path / f"resnet18.{kind}"
        if kind == "safetensors":
            save_file(resnet.state_dict(), path)
        else:
            torch.save(resnet.state_dict(), path)
        model = vcm_sdd(num_classes=5, backbone="resnet18", backbone_weights=str(path)).eval()
        images = torch.randn(2, 3, 64, 64)
        features = model.rgb_backbone(images)
        torch.testing.assert_close(resnet.fc(features.mean(dim=(2, 3))), resnet(images), rtol=1e-5, atol=1e-5)
        assert features.min() >= 0

    def test_flow_stem_starts_as_the_mean_of_the_rgb_stem(
        self, resnet: torchvision.models.ResNet, tmp_path: Path
    ) -> None:
        torch.save(resnet.state_dict(), tmp_path / "w.pth")
        rgb, flow = build_backbones("resnet18", flow_channels=10, weights=str(tmp_path / "w.pth"))
        assert isinstance(flow, ResNetGrid)
        assert flow.conv1.weight.shape == (64, 10, 7, 7)
        for channel in range(10):
            assert torch.equal(flow.conv1.weight[:, channel], resnet.conv1.weight.mean(dim=1))
        for name, value in rgb.state_dict().items():
            assert name == "conv1.weight" or torch.equal(flow.state_dict()[name], value), name
        assert flow.bn1.weight.data_ptr() != rgb.bn1.weight.data_ptr()

    def test_what_does_not_fit_is_listed(self, resnet: torchvision.models.ResNet, tmp_path: Path) -> None:
        state = resnet.state_dict()
        del state["layer1.0.conv1.weight"]
        state["layer9.0.conv1.weight"] = torch.zeros(1)
        state["bn1.weight"] = torch.zeros(32)
        path = tmp_path / "odd.pth"
        torch.save(state, path)
        with pytest.raises(WeightsMismatch) as caught:
            vcm_sdd(num_classes=5, backbone="resnet18", backbone_weights=str(path))
        message = str(caught.value)
        assert message.startswith(f"backbone_weights {path} does not fit ResNetGrid: expected 120 entries, found 120")
        assert "1 missing: layer1.0.conv1.weight" in message
        assert "1 unexpected: layer9.0.conv1.weight" in message
        assert "1 of another shape: bn1.weight (expected (64,), found (32,))" in message

    def test_weights_of_another_depth_are_refused_with_a_short_list(
        self, resnet: torchvision.models.ResNet, tmp_path: Path
    ) -> None:
        torch.save(resnet.state_dict(), tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"missing: .* and \d+ more") as caught:
            vcm_sdd(num_classes=5, backbone="resnet50", backbone_weights=str(tmp_path / "w.pth"))
        assert len(str(caught.value)) < 2000

    def test_nothing_is_copied_when_something_does_not_fit(self) -> None:
        layer = torch.nn.Linear(2, 2)
        before = layer.weight.clone()
        with pytest.raises(WeightsMismatch):
            load_strict(layer, {"weight": torch.zeros(2, 2)}, source="half a layer")
        assert torch.equal(layer.weight, before)

    def test_checkpoint_wrapper_with_a_state_dict_inside_is_read(self, tmp_path: Path) -> None:
        torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "w.pt")
        assert torch.equal(read_state(tmp_path / "w.pt")["a"], torch.ones(2))

    def test_pickled_code_is_not_run(self, tmp_path: Path) -> None:
        torch.save({"a": Exploit(str(tmp_path / "ran"))}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"w.pth cannot be read as tensors only"):
            read_state(tmp_path / "w.pth")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (torch.eye(2).to_sparse(), "is no dense tensor"),
            (torch.eye(2, device="meta"), "is no dense tensor"),
            (torch.ones(2, dtype=torch.complex64), "is of torch.complex64, expected real or whole numbers"),
            (torch.ones(2).to(torch.float8_e4m3fn), "is of torch.float8_e4m3fn, expected real or whole numbers"),
            (torch.ones(1).expand(2**40), r"repeats its numbers: shape \(1099511627776,\) of 4 bytes"),
        ],
        ids=["sparse", "meta", "complex", "float8", "expanded"],
    )
    def test_only_dense_tensors_of_real_and_whole_numbers_are_weights(
        self, tensor: torch.Tensor, message: str, tmp_path: Path
    ) -> None:
        torch.save({"a.b": tensor}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=rf"w\.pth: a\.b {message}"):
            read_state(tmp_path / "w.pth")

    def test_a_file_takes_no_more_memory_than_it_has_bytes(self, tmp_path: Path) -> None:
        torch.save({"a": torch.zeros(2**20)}, tmp_path / "w.pth")
        with (
            zipfile.ZipFile(tmp_path / "w.pth") as stored,
            zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for member in stored.infolist():
                packed.writestr(member.filename, stored.read(member))
        with pytest.raises(
            ValueError, match=r"packed\.pth cannot be read as tensors only: its members have more bytes"
        ):
            read_state(tmp_path / "packed.pth")
        for name in ("w.pth", "w.safetensors"):
            with (tmp_path / name).open("ab") as file:
                file.truncate(2**33)
            with pytest.raises(ValueError, match=rf"{name} has 8,589,934,592 bytes, nearly all of them holes"):
                read_state(tmp_path / name)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("gone.pth", None, "gone.pth is not a file"),
            ("noise.pth", b"not a zip", "noise.pth cannot be read as tensors only"),
            ("cut.safetensors", b"\x10\0\0\0", "cut.safetensors is not a whole safetensors file"),
        ],
    )
    def test_unreadable_files_are_named(self, name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            vcm_sdd(num_classes=5, backbone="resnet18", backbone_weights=str(tmp_path / name))

    def test_unknown_weight_set_lists_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match=r"must be imagenet, IMAGENET1K_V1 or a file, got 'kinetics'"):
            vcm_sdd(num_classes=5, backbone="resnet18", backbone_weights="kinetics")

    def test_tiny_backbone_has_no_pretrained_weights(self) -> None:
        with pytest.raises(ValueError, match="no pretrained weights for backbone tiny, got 'imagenet'"):
            vcm_sdd(num_classes=5, backbone="tiny", backbone_weights="imagenet")

    def test_imagenet_weights_come_through_torchvisions_cache(
        self, resnet: torchvision.models.ResNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file of the right name in torch's hub folder is what a finished download leaves."""
        url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
        folder = tmp_path / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        torch.save(resnet.state_dict(), folder / Path(url).name)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        rgb, _ = build_backbones("resnet18", flow_channels=2, weights="imagenet")
        assert torch.equal(rgb.state_dict()["layer4.1.conv2.weight"], resnet.layer4[1].conv2.weight)

    def test_failed_download_says_how_to_go_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        with pytest.raises(ValueError, match=r"resnet18 IMAGENET1K_V1 cannot be downloaded .* give the path"):
            vcm_sdd(num_classes=5, backbone="resnet18", backbone_weights="imagenet")

    def test_timm_backbone_without_timm_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "timm", None)
        with pytest.raises(ValueError, match=r"needs the package timm: pip install 'kinoray\[timm\]'"):
            vcm_sdd(num_classes=5, backbone="timm:resnet18")


class Exploit:
    """Unpickling an instance of this would make a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (self.path, "w"))
