"""What decoding in a process of its own costs: `python benchmarks/sandbox.py [--quick]`.

CPU seconds (user and system, of this process and the decoder) of the sandbox over those of the same calls here, for
clips of 10 s at 340 x 256 (H.264, about 0.5 MB). Both ways take turns; the median over rounds; what comes out is copied
into a batch, as its users do. Bar: at most 1.05 for 16 segments x 6 frames and for 8 x 1.

Then what the jail (kinoray/video/sandbox/jail.py) adds, at most: its layers cost CPU at system calls and nowhere else,
so the calls of a clip (counted by strace, as root) times what the filter adds to the call that costs it most. Decoders
with and without it, timed in turns, differ by less than they scatter. Bar: at most 1.02.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import ctypes
import json
import resource
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from kinoray.config.shared import ClipConfig, SampleConfig
from kinoray.demo.videos import make_video
from kinoray.video.frames import Frames, decode
from kinoray.video.request import Sampled
from kinoray.video.sandbox import jail
from kinoray.video.sandbox.pool import Sandbox

FPS, SECONDS = 30, 10
BAR, JAIL_BAR = 1.05, 1.02
CASES = {
    "16x6 rgb": (SampleConfig(num_segments=16, frames_per_segment=6), False, 250),
    "16x6 rgb+flow": (SampleConfig(num_segments=16, frames_per_segment=6), True, 250),
    "8x1 rgb, gop 12": (SampleConfig(num_segments=8, frames_per_segment=1), False, 12),
}
"""Name -> what is sampled, whether flow is estimated, key frame distance."""


def film(seed: int, gop: int) -> bytes:
    """Ten seconds of textures that move over each other, with noise: about as many bytes as a Kinetics clip."""
    rng = np.random.default_rng(seed)
    layers = [cv2.GaussianBlur(rng.integers(0, 256, (512, 700, 3)).astype(np.float32), (0, 0), 4) for _ in range(2)]
    layers = [np.clip(128 + 9 * (layer - 127.5), 0, 255) for layer in layers]
    mask = cv2.GaussianBlur((rng.random((256, 340)) > 0.5).astype(np.float32), (0, 0), 25)[..., None]
    mask = np.clip((mask - 0.5) * 30 + 0.5, 0, 1)
    frames = np.empty((FPS * SECONDS, 256, 340, 3), np.uint8)
    for number in range(len(frames)):
        x, y = round(1.1 * number), round(120 + 100 * np.sin(number / 40))
        picture = layers[0][y : y + 256, x : x + 340] * mask + layers[1][250 - y : 506 - y, 350 - x : 690 - x] * (
            1 - mask
        )
        frames[number] = np.clip(picture + 3 * rng.standard_normal(picture.shape), 0, 255)
    return make_video(frames, fps=FPS, gop=gop, options={"preset": "medium", "crf": "28"})


def cpu_s(pid: int) -> float:
    """CPU seconds of another process so far."""
    fields = Path(f"/proc/{pid}/schedstat").read_text().split()
    return int(fields[0]) / 1e9


def compare(videos: list[bytes], sandbox: Sandbox, config: ClipConfig, *, rounds: int) -> list[float]:
    """CPU ms a clip here, in the sandbox, and of that in this process; and the ratio."""
    shape = (config.sample.num_segments, config.sample.frames_per_segment, 3, config.view.crop_px, config.view.crop_px)
    batch = np.zeros((len(videos), *shape), np.uint8)

    def run(way: Callable[..., Frames]) -> None:
        for slot, data in enumerate(videos):
            batch[slot] = way(data, Sampled(), config).clip().frames

    def timed(way: Callable[..., Frames]) -> tuple[float, float]:
        (process,) = sandbox.pids()
        mine, theirs = time.process_time(), cpu_s(process)
        run(way)
        mine, theirs = time.process_time() - mine, cpu_s(process) - theirs
        return 1e3 * mine / len(videos), 1e3 * theirs / len(videos)

    run(decode)
    here = batch.copy()
    run(sandbox.decode)
    if not np.array_equal(batch, here):
        raise RuntimeError("the sandbox gave other frames")
    times: dict[str, list[tuple[float, float]]] = {"here": [], "sandbox": []}
    for number in range(rounds):
        ways = {"here": decode, "sandbox": sandbox.decode}
        for name in list(ways) if number % 2 else list(reversed(ways)):
            times[name].append(timed(ways[name]))
    sums = {name: [sum(pair) for pair in pairs] for name, pairs in times.items()}
    # Of each round by itself: what else runs on the machine changes from round to round.
    ratio = statistics.median(there / here for here, there in zip(sums["here"], sums["sandbox"], strict=True))
    parent = statistics.median(pair[0] for pair in times["sandbox"])
    return [statistics.median(sums["here"]), statistics.median(sums["sandbox"]), parent, ratio]


def calls_of(videos: list[bytes], sandbox: Sandbox, config: ClipConfig) -> float:
    """System calls of the decoder a clip, counted by strace."""
    for data in videos:
        sandbox.decode(data, Sampled(), config)
    (pid,) = sandbox.pids()
    with tempfile.NamedTemporaryFile() as file:
        counting = subprocess.Popen(
            ["strace", "-f", "-c", "-o", file.name, "-p", str(pid)], stderr=subprocess.PIPE, text=True
        )
        assert counting.stderr is not None
        said = counting.stderr.readline()
        if "attached" not in said:
            raise RuntimeError(f"strace: {said.strip()}")
        for data in videos:
            sandbox.decode(data, Sampled(), config)
        counting.send_signal(signal.SIGINT)
        counting.communicate()
        total = Path(file.name).read_text().splitlines()[-1].split()
    return int(total[3]) / len(videos)


def filter_cost_us(*, calls: int = 200_000) -> float:
    """CPU us that the jail adds to the call that costs it most: almost the last of its rules, with conditions."""
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            call, number = ctypes.CDLL(None).syscall, {"x86_64": 302, "aarch64": 261}[os.uname().machine]  # prlimit64

            def spent_s() -> float:
                begin_s = time.process_time()
                for _ in range(calls):
                    call(number, 0, resource.RLIMIT_AS, None, None)
                return time.process_time() - begin_s

            free = min(spent_s() for _ in range(5))
            jail.enter(theirs.fileno(), file.fileno(), file.fileno(), os.getppid(), threads=False)
            theirs.send(struct.pack("d", (min(spent_s() for _ in range(5)) - free) / calls * 1e6))
            os._exit(0)
        (cost,) = struct.unpack("d", ours.recv(8))
        os.waitpid(child, 0)
    return cost


def main() -> int:
    """Print the table and, last, the figures beside their bars as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds of 2 clips instead of 15 of 4")
    quick = parser.parse_args().quick
    num_videos, rounds = (2, 5) if quick else (4, 15)
    videos = {gop: [film(seed, gop) for seed in range(num_videos)] for gop in (12, 250)}
    sizes = {gop: sum(map(len, made)) / num_videos / 1e3 for gop, made in videos.items()}
    print(
        f"{num_videos} clips of {SECONDS} s, 340 x 256, " + ", ".join(f"GOP {g}: {s:.0f} kB" for g, s in sizes.items())
    )
    print(f"{'CPU ms a clip':<18}{'here':>10}{'sandbox':>10}{'of it here':>12}{'ratio':>8}")
    result: dict[str, object] = {}
    cpu_ms: dict[str, float] = {}
    ok = True
    with Sandbox(1) as sandbox:
        for name, (sample, with_flow, gop) in CASES.items():
            config = ClipConfig(sample=sample) if with_flow else ClipConfig(sample=sample).without_flow()
            here, there, parent, ratio = compare(videos[gop], sandbox, config, rounds=rounds)
            print(f"{name:<18}{here:>10.1f}{there:>10.1f}{parent:>12.2f}{ratio:>8.3f}", flush=True)
            cpu_ms[name] = there
            result[f"sandbox/here, {name}"] = {"value": round(ratio, 4), "bar": f"<= {BAR}"}
            ok = ok and ratio <= BAR
    cost_us = max(filter_cost_us() for _ in range(5))
    print(f"the jail adds at most {cost_us:.3f} us to a system call")
    with Sandbox(1) as sandbox:
        for name, (sample, with_flow, gop) in CASES.items():
            config = ClipConfig(sample=sample) if with_flow else ClipConfig(sample=sample).without_flow()
            calls = calls_of(videos[gop], sandbox, config)
            ratio = 1 + calls * cost_us / 1e3 / cpu_ms[name]
            print(f"{name:<18}{calls:>10.0f} calls a clip{ratio:>16.5f}", flush=True)
            result[f"jail/no jail, {name}"] = {"value": round(ratio, 5), "bar": f"<= {JAIL_BAR}"}
            ok = ok and ratio <= JAIL_BAR
    print(json.dumps(result | {"ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
