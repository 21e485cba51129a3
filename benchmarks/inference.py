"""What preparing a model for inference is worth on a CPU: `python benchmarks/inference.py [--quick]`.

VCM-SDD with two ResNet-101, one video of 8 segments x 6 frames at 224 px: the plain float32 NCHW forward pass against
the prepared copies. CPU seconds of one thread, medians over rounds in which the forms take turns. Bar: the fastest
prepared form takes at least 3 times less CPU than the plain one and names the same class for every clip checked.
The weights are random, with batch norm statistics taken from the input, so that clips differ in their class.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import functools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
from kinoray.network.prepare import BF16_TOLERANCE, FP32_TOLERANCE, prepare_for_inference
from vcm_sdd.network import vcm_sdd_r101


def make_clips(num_videos: int, num_segments: int, seed: int) -> dict[str, Tensor]:
    """Smooth random pictures of differing contrast: neighbouring pixels agree, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    clips = {}
    for name, channels in (("rgb", 3), ("flow", 2)):
        coarse = torch.randn(num_videos * num_segments * 6, channels, 14, 14, generator=generator)
        frames = nn.functional.interpolate(coarse, size=224, mode="bilinear")
        contrast = torch.rand(num_videos, 1, 1, 1, 1, 1, generator=generator) * 2 + 0.2
        clips[name] = frames.unflatten(0, (num_videos, num_segments, 6)) * contrast
    return clips


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = vcm_sdd_r101(num_classes=400)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
    with torch.no_grad():
        model.train()(**make_clips(2, 1, seed=1))
    return model.eval()


def cpu_s() -> float:
    """CPU seconds of this process and of the compilers it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def prepare(
    model: nn.Module, clip: dict[str, Tensor], *, compiled: bool
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The forms by name, and what their start cost."""
    forms, starts = {"plain float32": model}, {}
    for precision in ("fp32", "bf16"):
        for compile in (False, True) if compiled else (False,):
            name = f"prepared {precision}{', compiled' if compile else ''}"
            wall, cpu = time.perf_counter(), cpu_s()
            forms[name] = prepare_for_inference(model, precision=precision, compile=compile)  # type: ignore[arg-type]
            with torch.inference_mode():
                forms[name](**clip)
            starts[name] = f"{cpu_s() - cpu:.1f} CPU s, {time.perf_counter() - wall:.1f} s, first video included"
    return forms, starts


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    """Print the table and, last, the figures beside their bars as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds instead of 5, 3 checks instead of 8, nothing compiled"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="kinoray-inductor-")

    num_checks, rounds = (3, 2) if quick else (8, 5)
    model = make_model()
    clip, checks = make_clips(1, 8, seed=2), make_clips(num_checks, 1, seed=3)
    forms, starts = prepare(model, clip, compiled=not quick)
    with torch.inference_mode():
        seconds = medians({name: functools.partial(form, **clip) for name, form in forms.items()}, rounds)
        logits = {name: form(**checks) for name, form in forms.items()}

    exact = logits["plain float32"]
    classes = len(set(exact.argmax(dim=1).tolist()))
    print("one video of 8 segments x 6 frames, two ResNet-101")
    print(f"{len(exact)} clips of one segment, of {classes} classes, checked")
    print(f"{'':<26}{'CPU s':>8}{'times less':>12}{'logits off':>12}{'same top-1':>12}   start")
    rows = {}
    for name, values in logits.items():
        error = float((values - exact).abs().max() / exact.abs().max())
        same = int((values.argmax(dim=1) == exact.argmax(dim=1)).sum())
        ratio = seconds["plain float32"] / seconds[name]
        rows[name] = (ratio, error, same)
        start = starts.get(name, "-")
        print(f"{name:<26}{seconds[name]:>8.2f}{ratio:>12.2f}{error:>12.1e}{same:>9}/{len(exact)}   {start}")

    best = max(rows, key=lambda name: rows[name][0])
    close = all(row[1] <= (BF16_TOLERANCE if "bf16" in name else FP32_TOLERANCE) for name, row in rows.items())
    agree = rows[best][2] == len(exact)
    result = {
        "plain/fastest prepared": {"value": round(rows[best][0], 2), "bar": ">= 3"},
        "fastest": best,
        "same top-1 as plain": {"value": rows[best][2] / len(exact), "bar": "= 1"},
        "plain/prepared fp32": {"value": round(rows["prepared fp32"][0], 2)},
        "ok": rows[best][0] >= 3 and agree and close,
    }
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
