"""What one GPU does with the network, and what it waits for: `PYTHONPATH=platform:models python benchmarks/gpu.py`.

Needs torch, torchvision, numpy, pyarrow, av, opencv-python-headless, pyyaml, tyro, boto3 and safetensors; no network,
no Ray, no data: weights are random and clips are made here. Where there is no CUDA it runs small on the CPU, to show
that it runs: its bars are for an H100, so it then says "not yet measured" and claims nothing.

    model      VCM-SDD with two ResNets at 8 x 6 and 16 x 6, bf16: TFLOP/s and share of the largest bf16 matrix product
               measured here; inference as `kinoray label` prepares it (compiled, recorded), training as autocast does
    head       what is not backbone, of an inference
    input      what uint8 frames and int8 flow from the host (copied to pinned memory, sent, normalised) add to an
               inference where one batch follows another
    flow       TV-L1 for all pairs of a clip
    loop       the scorer of `kinoray label` fed with clips from memory, against the bare network on one batch
    balance    CPU cores of decoding (one encoded video, measured here) that keep up with the loop

Bars: backbones at least 45 % of the matrix product, head at most 3 % and input at most 5 % of an inference, flow at
most the time of the backbones, loop at least 0.95 of the bare network; logits as on the CPU, within the tolerances that
kinoray.network.prepare states.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
from kinoray.config.shared import ClipConfig, InferenceConfig, SampleConfig, ViewConfig
from kinoray.demo.videos import make_video
from kinoray.network.batch import collate, model_inputs
from kinoray.network.build import VideoModel
from kinoray.network.cost import describe
from kinoray.network.flow_tvl1 import tvl1_flow
from kinoray.network.forward import collate_for
from kinoray.network.prepare import BF16_TOLERANCE, FP32_TOLERANCE, Repeated, prepare_for_inference
from kinoray.network.scorer import ClipScorer, ScorerConfig
from kinoray.video.frames import Clip, decode
from kinoray.video.info import VideoInfo
from kinoray.video.request import Sampled
from vcm_sdd.network import VCMSDD, vcm_sdd

# Shapes: B clips, S segments, T frames a segment

BARS = {"backbones/matmul": (">=", 0.45), "head/forward": ("<=", 0.03), "input/forward": ("<=", 0.05)}
BARS |= {"bare/loop": (">=", 0.95), "flow/backbones": ("<=", 1.0)}
_CLASSES = 400
_IN_A_ROW = 4  # batches, so that one can be fed while another is computed
_INFO = VideoInfo(duration_s=10.0, fps=30.0, num_frames=300, width=340, height=256, codec="h264", rotation=0)


@dataclass(frozen=True)
class Sizes:
    """What is measured: all of it on a GPU, a small likeness of it on a CPU."""

    device: str
    backbones: tuple[str, ...]
    segments: tuple[int, ...]
    frames: int
    crop_px: int
    batch: int
    train_batch: int
    matmul: int
    """Rows and columns of the largest matrix product."""
    rounds: int
    loop_batches: int
    compile: bool

    def clip(self, num_segments: int) -> ClipConfig:
        """The clips of a case."""
        sample = SampleConfig(num_segments=num_segments, frames_per_segment=self.frames)
        return ClipConfig(sample=sample, view=ViewConfig(resize_px=self.crop_px * 8 // 7, crop_px=self.crop_px))


def choose(quick: bool) -> Sizes:
    """The sizes for this machine."""
    if not torch.cuda.is_available():
        return Sizes("cpu", ("resnet18",), (1, 2), 2, 56, 2, 2, 256, 3, 2, False)
    if quick:
        return Sizes("cuda", ("resnet101",), (16,), 6, 224, 16, 2, 8192, 5, 8, True)
    return Sizes("cuda", ("resnet50", "resnet101"), (8, 16), 6, 224, 16, 2, 8192, 15, 40, True)


def seconds(call: Callable[[], object], sizes: Sizes) -> float:
    """Median seconds of a call after two that are not counted; of the device's work, where it has its own clock."""
    times = []
    wait = torch.cuda.synchronize if sizes.device == "cuda" else lambda: None
    for number in range(sizes.rounds + 2):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        if number >= 2:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def make_clips(count: int, config: ClipConfig) -> list[Clip]:
    """Decoded clips of noise, each of another mean colour."""
    rng = np.random.default_rng(0)
    sample, size = config.sample, config.view.crop_px
    shape = (sample.num_segments, sample.frames_per_segment)
    clips = []
    for _ in range(count):
        base = rng.integers(30, 220, (1, 1, 3, 1, 1))
        frames = (base + rng.integers(-30, 31, (*shape, 3, size, size))).astype(np.uint8)
        flow = rng.integers(-127, 128, (*shape, 2, size, size)).astype(np.int8)
        clips.append(Clip(frames, flow, np.zeros(shape, np.int64), 300, 96, 0, _INFO))
    return clips


def ceiling(sizes: Sizes) -> float:
    """TFLOP/s of a product of two square bf16 matrices."""
    a, b = (torch.randn(sizes.matmul, sizes.matmul, device=sizes.device, dtype=torch.bfloat16) for _ in range(2))
    return 2e-12 * sizes.matmul**3 / seconds(lambda: a @ b, sizes)


def make_model(backbone: str, sizes: Sizes) -> VCMSDD:
    """Random weights with batch norm statistics of clips, so that clips differ in their logits."""
    torch.manual_seed(0)
    model = vcm_sdd(num_classes=_CLASSES, backbone=backbone)
    inputs = model_inputs(collate(make_clips(2, sizes.clip(1))), model.input_spec, "cpu")
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
    with torch.no_grad():
        model.train()(**inputs)
    return model.eval()


def train_step(model: VCMSDD, inputs: dict[str, Tensor | None], sizes: Sizes) -> Callable[[], None]:
    """Forward under autocast, backward and AdamW: what a step of `kinoray train` computes."""
    fused = True if sizes.device == "cuda" else None
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-6, fused=fused)
    labels = torch.arange(sizes.train_batch, device=sizes.device)

    def step() -> None:
        with torch.autocast(sizes.device, dtype=torch.bfloat16):
            logits = model(**inputs)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def off(found: Tensor, expected: Tensor, allowed: float) -> float:
    """Largest difference, of what is allowed of the largest logit."""
    return float((found.cpu() - expected.cpu()).abs().max() / expected.abs().max()) / allowed


def equality(backbone: str, sizes: Sizes) -> dict[str, float]:
    """How far the device's logits of one small clip are from the CPU's plain ones, over what is allowed."""
    model = make_model(backbone, sizes)
    inputs = model_inputs(collate(make_clips(2, sizes.clip(1))), model.input_spec, "cpu")
    there = {name: cast(Tensor, x).to(sizes.device) for name, x in inputs.items()}
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = model(**inputs)
        model.to(sizes.device)
        exact = prepare_for_inference(model)(**there)
        rounded = prepare_for_inference(model, precision="bf16", compile=sizes.compile)(**there)
    return {"fp32": off(exact, expected, FP32_TOLERANCE), "bf16": off(rounded, expected, BF16_TOLERANCE)}


def measure(model: VCMSDD, prepared: nn.Module, num_segments: int, sizes: Sizes) -> dict[str, float]:
    """One case: seconds of a batch in each form, and FLOP of a clip."""
    clips, feed = make_clips(sizes.batch, sizes.clip(num_segments)), collate_for(sizes.device, None)
    inputs = model_inputs(feed(clips), model.input_spec, sizes.device)
    inner: Any = prepared.model if isinstance(prepared, Repeated) else prepared
    rgb, flow = (cast(Tensor, inputs[name]) for name in ("rgb", "flow"))
    found = {"flops": float(describe(model, num_segments, sizes.frames, sizes.crop_px).flops)}

    def fed() -> None:
        for _ in range(_IN_A_ROW):
            prepared(**model_inputs(feed(clips), model.input_spec, sizes.device))

    with torch.inference_mode():
        found["forward_s"] = seconds(lambda: [prepared(**inputs) for _ in range(_IN_A_ROW)], sizes) / _IN_A_ROW
        found["input_s"] = max(0.0, seconds(fed, sizes) / _IN_A_ROW - found["forward_s"])
        found["backbones_s"] = seconds(
            lambda: (inner.rgb_backbone(rgb.flatten(0, 2)), inner.flow_backbone(flow.flatten(0, 2))), sizes
        )
    some = {name: cast(Tensor, x)[: sizes.train_batch].clone() for name, x in inputs.items()}
    found["train_s"] = seconds(train_step(model, some, sizes), sizes)
    model.eval()
    return found


def loop(model: VCMSDD, num_segments: int, sizes: Sizes) -> tuple[float, float]:
    """Seconds a batch of the real scorer, and how far its logits are from the network's on the same batch."""
    config = sizes.clip(num_segments)
    clips = make_clips(sizes.batch, config)
    inference = InferenceConfig(precision="bf16", compile=sizes.compile)
    settings = ScorerConfig(batch_size=sizes.batch, inference=inference)
    scorer = ClipScorer[int](cast(VideoModel, model), config, settings, num_classes=_CLASSES, device=sizes.device)

    def run(num_batches: int) -> dict[int, np.ndarray]:
        answers: dict[int, np.ndarray] = {}
        for number in range(num_batches * sizes.batch):
            for ticket, answer in scorer.put(number, clips[number % len(clips)]):
                answers[ticket] = answer.logits
        answers.update((ticket, answer.logits) for ticket, answer in scorer.flush())
        return answers

    logits = run(2)
    begin = time.perf_counter()
    run(sizes.loop_batches)
    took = (time.perf_counter() - begin) / sizes.loop_batches
    with torch.inference_mode():
        plain = model(**model_inputs(collate(clips), model.input_spec, sizes.device)).float()
    found = torch.from_numpy(np.stack([logits[number] for number in range(sizes.batch)]))
    return took, off(found, plain.double(), BF16_TOLERANCE)


def flow_s(sizes: Sizes) -> float:
    """Seconds of TV-L1 for one clip of the last case."""
    pairs = sizes.segments[-1] * sizes.frames
    first = torch.randint(0, 256, (pairs, sizes.crop_px, sizes.crop_px), dtype=torch.uint8).to(sizes.device)
    return seconds(lambda: tvl1_flow(first, first.roll(1, dims=2)), sizes)


def decode_cpu_s(sizes: Sizes) -> float:
    """CPU seconds of decoding one 10 s video to a clip of the last case, without flow."""
    side = (256, 340) if sizes.device == "cuda" else (64, 84)
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (side[0] + 40, side[1] + 40, 3), dtype=np.uint8)
    starts = range(300 if sizes.device == "cuda" else 30)
    video = make_video(np.stack([scene[n % 40 :, n % 40 :][: side[0], : side[1]] for n in starts]), fps=30, gop=250)
    config, times = sizes.clip(sizes.segments[-1]), []
    for _ in range(sizes.rounds):
        begin = time.process_time()
        decode(video, Sampled(), config.without_flow()).clip()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def line(row: list[str]) -> str:
    return f"{row[0]:<16}" + "".join(f"{cell:>9}" for cell in row[1:])


def report(case: str, found: dict[str, float], top: float, sizes: Sizes) -> dict[str, float]:
    """Print a case's line; its shares."""
    clip_tflop, batch = found["flops"] / 1e12, sizes.batch
    rate, train = batch / found["forward_s"], sizes.train_batch / found["train_s"]
    shares = {
        "backbones/matmul": clip_tflop * batch / found["backbones_s"] / top,
        "head/forward": 1 - found["backbones_s"] / found["forward_s"],
        "input/forward": found["input_s"] / found["forward_s"],
    }
    row = [case, f"{rate:.1f}", f"{rate * clip_tflop:.2f}", f"{rate * clip_tflop / top:.0%}"]
    row += [f"{shares['head/forward']:.1%}", f"{shares['input/forward']:.1%}"]
    row += [f"{train:.1f}", f"{3 * train * clip_tflop:.2f}", f"{3 * train * clip_tflop / top:.0%}"]
    print(line(row))
    return shares


def main() -> int:
    """Print the table and, last, the figures beside their bars as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-101 at 16 x 6 alone, fewer rounds")
    sizes = choose(parser.parse_args().quick)
    on_gpu, top = sizes.device == "cuda", ceiling(sizes)
    device = torch.cuda.get_device_name() if on_gpu else "CPU, small networks and frames"
    print(f"{device}; torch {torch.__version__}; largest bf16 matrix product {top:.2f} TFLOP/s")
    print(
        f"batches of {sizes.batch} clips, in training {sizes.train_batch}; {sizes.frames} frames of {sizes.crop_px} px"
    )
    print(line(["", "clips/s", "TFLOP/s", "share", "head", "input", "train/s", "TFLOP/s", "share"]))
    shares, errors = {}, {}
    for backbone in sizes.backbones:
        torch.compiler.reset()
        errors |= {f"{backbone} {key}": value for key, value in equality(backbone, sizes).items()}
        model = make_model(backbone, sizes).to(sizes.device)
        prepared = prepare_for_inference(model, precision="bf16", compile=sizes.compile)
        for segments in sizes.segments:
            case = f"{backbone} {segments} x {sizes.frames}"
            found = measure(model, prepared, segments, sizes)
            shares |= {f"{case}: {key}": value for key, value in report(case, found, top, sizes).items()}
        del prepared
        loop_s, errors[f"{backbone} loop"] = loop(model, segments, sizes)
        shares[f"{case}: bare/loop"] = share = found["forward_s"] / loop_s
        print(f"{'  labelling loop':<16}{sizes.batch / loop_s:>9.1f}   {share:.2f} of the bare network")
    flow, cpu_s = flow_s(sizes), decode_cpu_s(sizes)
    shares[f"{case}: flow/backbones"] = flow * sizes.batch / found["backbones_s"]
    cores = cpu_s * sizes.batch / loop_s
    print(f"TV-L1 {1e3 * flow:.1f} ms a clip; decoding {1e3 * cpu_s:.1f} CPU ms, so that {cores:.1f} cores keep up")
    print("logits against the CPU's, of what is allowed: " + ", ".join(f"{key} {x:.2f}" for key, x in errors.items()))
    result: dict[str, object] = {"device": device}
    met = all(value <= 1 for value in errors.values())
    for name, value in shares.items():
        sign, bar = BARS[name.split(": ")[1]]
        found_here = {"value": round(value, 3)} if on_gpu else {"here": round(value, 3), "H100": "not yet measured"}
        result[name] = {**found_here, "bar": f"{sign} {bar:g}"}
        met &= value >= bar if sign == ">=" else value <= bar
    result |= {f"{key} logits off, of what is allowed": round(value, 3) for key, value in errors.items()}
    result |= {"cores to balance": round(cores, 1), "flow ms a clip": round(1e3 * flow, 2)}
    result |= {"ok": met} if on_gpu else {"ok": None, "verdict": "not yet measured: the bars are for a GPU"}
    print(json.dumps(result))
    return 0 if met or not on_gpu else 1


if __name__ == "__main__":
    sys.exit(main())
