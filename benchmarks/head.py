"""Time and memory of VCM-SDD's head, taken as printed and in our form: `python benchmarks/head.py [--quick]`.

N = 294 nodes, D = 2048 channels, 8 heads: the paper's sizes. Times are CPU seconds of one thread (so that other work on
the machine counts little), medians over rounds in which the forms take turns. Memory is the peak above the inputs, each
form in a process of its own. Bars: the pooled form takes at least 4 times less CPU than the printed one (float32,
forward), and the head less than 2 % of a whole forward pass with ResNet-101.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
from vcm_sdd.network import TwoStreamHead, vcm_sdd
from vcm_sdd.options import Options
from vcm_sdd.pooled import pooled_attention

# Shapes: M segments, N nodes, D channels, G heads, K = D / G
GRID, D, G = (6, 7, 7), 2048, 8
N = math.prod(GRID)
Form = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def split(x_MND: Tensor) -> Tensor:
    return x_MND.unflatten(-1, (G, -1)).transpose(1, 2)


def scaled(scores: Tensor) -> Tensor:
    wide = scores.float()
    return wide / (wide.square().sum((-1, -2), keepdim=True) + 1e-12) ** 0.25


def naive(rgb: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 11, 12 and 14, one after the other: two products of scores, two of answers."""
    q, k = split(rgb), split(flow)
    a_rgb = scaled(q @ k.transpose(-1, -2)).softmax(-1).to(rgb.dtype) @ k
    a_flow = scaled(k @ q.transpose(-1, -2)).softmax(-1).to(rgb.dtype) @ q
    return a_rgb.mean(2).flatten(1), a_flow.mean(2).flatten(1)


def shared(rgb: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """The scores once, their transpose for Eq. 12; answers formed."""
    q, k = split(rgb), split(flow)
    z = scaled(q @ k.transpose(-1, -2))
    a_rgb = z.softmax(-1).to(rgb.dtype) @ k
    a_flow = z.transpose(-1, -2).softmax(-1).to(rgb.dtype) @ q
    return a_rgb.mean(2).flatten(1), a_flow.mean(2).flatten(1)


def sdpa(rgb: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """torch's fused attention; the norm from Gram matrices: || Q K^T ||^2 = sum (Q^T Q) * (K^T K)."""
    q, k = split(rgb), split(flow)
    squares = ((q.transpose(-1, -2) @ q).float() * (k.transpose(-1, -2) @ k).float()).sum((-1, -2), keepdim=True)
    factor = (squares + 1e-12).pow(-0.25).to(rgb.dtype)
    a_rgb = F.scaled_dot_product_attention(q * factor, k, k, scale=1.0)
    a_flow = F.scaled_dot_product_attention(k * factor, q, q, scale=1.0)
    return a_rgb.mean(2).flatten(1), a_flow.mean(2).flatten(1)


def pooled(rgb: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Ours."""
    rgb_MD, flow_MD = pooled_attention(rgb, flow, heads=G, frobenius=True, literal=False)
    return rgb_MD, flow_MD


FORMS: dict[str, Form] = {"naive": naive, "shared": shared, "sdpa": sdpa, "pooled": pooled}


def forward(form: Form, rgb: Tensor, flow: Tensor) -> None:
    with torch.inference_mode():
        form(rgb, flow)


def both_ways(form: Form, rgb: Tensor, flow: Tensor) -> None:
    rgb, flow = rgb.detach().requires_grad_(), flow.detach().requires_grad_()
    rgb_MD, flow_MD = form(rgb, flow)
    (rgb_MD.float().square().sum() + flow_MD.float().square().sum()).backward()


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each call: they take turns, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak resident memory of a call above what the process held before, measured in a fork."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        before = status("VmRSS")
        call()
        os.write(writer, str(status("VmHWM") - before).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return int(text)


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def inputs(num_segments: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rgb, flow = (torch.randn(num_segments, N, D, generator=generator).relu().to(dtype) for _ in range(2))
    return rgb, flow


def check(rgb: Tensor, flow: Tensor) -> None:
    """All forms give the same numbers, or their times mean nothing."""
    wanted = naive(rgb.float(), flow.float())
    for name, form in FORMS.items():
        for ours, theirs in zip(form(rgb, flow), wanted, strict=True):
            error = float((ours.float() - theirs).abs().max() / theirs.abs().max())
            if error > (1e-5 if rgb.dtype == torch.float32 else 2e-2):
                raise RuntimeError(f"{name} differs from naive by {error:.1e} in {rgb.dtype}")


WAYS = {"forward": forward, "both": both_ways}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compare_forms(num_segments: int, rounds: int) -> dict[str, float]:
    """Print the table; return CPU milliseconds a segment by `dtype way form`."""
    calls = {
        (dtype, way): {name: functools.partial(run, form, *inputs(num_segments, kind)) for name, form in FORMS.items()}
        for dtype, kind in DTYPES.items()
        for way, run in WAYS.items()
    }
    # All forks first: later the parent has freed large blocks, which a child would take again unseen.
    memory = {key: {name: peak_bytes(call) for name, call in forms.items()} for key, forms in calls.items()}
    for kind in DTYPES.values():
        check(*inputs(1, kind))
    times = {key: medians(forms, rounds) for key, forms in calls.items()}
    for dtype in DTYPES:
        for name in FORMS:
            cells = "".join(f"{1e3 * times[dtype, way][name] / num_segments:>10.2f}" for way in WAYS)
            sizes = "".join(f"{memory[dtype, way][name] / 2**20:>10.0f}" for way in WAYS)
            print(f"{dtype:<10}{name:<8}{cells}{sizes}", flush=True)
    return {f"{dtype} {way} {name}": value for (dtype, way), part in times.items() for name, value in part.items()}


def whole_head(rounds: int) -> tuple[float, dict[str, float]]:
    """CPU seconds of one segment: both backbones in float32; the head (STC, MFF, classifiers) by dtype."""
    torch.manual_seed(0)
    model = vcm_sdd(num_classes=400).eval()
    frames = {"rgb": torch.randn(6, 3, 224, 224), "flow": torch.randn(6, 2, 224, 224)}
    head = TwoStreamHead(D, 400, Options()).eval()
    calls: dict[str, Callable[[], object]] = {
        "backbones": lambda: [getattr(model, f"{name}_backbone")(x) for name, x in frames.items()]
    }
    for dtype, kind in DTYPES.items():
        calls[dtype] = functools.partial(head, *inputs(4, kind), grid=GRID, num_segments=4)
    with torch.inference_mode():
        seconds = medians(calls, rounds)
    return seconds.pop("backbones"), {name: value / 4 for name, value in seconds.items()}


def main() -> int:
    """Print the tables and, last, the figures beside their bars as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 11")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    num_segments, rounds = 16, 5 if quick else 11

    print(f"MFF, {num_segments} segments, N = {N}, D = {D}, {G} heads")
    print(f"{'':<18}{'CPU ms a segment':>20}{'peak MiB in all':>20}")
    print(f"{'':<18}{'forward':>10}{'+backward':>10}{'forward':>10}{'+backward':>10}")
    figures = compare_forms(num_segments, rounds)
    backbones, heads = whole_head(3 if quick else 5)
    for dtype, seconds in heads.items():
        print(f"head (STC + MFF + classifiers), {dtype}: {1e3 * seconds:.1f} ms a segment")
    whole = backbones + heads["float32"]
    print(
        f"two ResNet-101 backbones, float32, as torchvision builds them: {1e3 * whole:.0f} ms a segment with the head"
    )

    def ratio(way: str, form: str, dtype: str = "float32") -> float:
        return round(figures[f"{dtype} {way} naive"] / figures[f"{dtype} {way} {form}"], 2)

    share = round(heads["float32"] / whole, 4)
    gain = ratio("forward", "pooled")
    result = {
        "naive/pooled, float32, forward": {"value": gain, "bar": ">= 4"},
        "naive/pooled, float32, forward+backward": {"value": ratio("both", "pooled")},
        "naive/pooled, bfloat16, forward": {"value": ratio("forward", "pooled", "bfloat16")},
        "naive/pooled, bfloat16, forward+backward": {"value": ratio("both", "pooled", "bfloat16")},
        "naive/shared, float32, forward": {"value": ratio("forward", "shared")},
        "naive/sdpa, float32, forward": {"value": ratio("forward", "sdpa")},
        "head's share of a forward pass, float32": {"value": share, "bar": "< 0.02"},
        "ok": gain >= 4 and share < 0.02,
    }
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
