"""The two halves of a labelling, each alone and without Ray: what the whole job is held against.

They use the job's own reader and scorer, with as many decoder processes, threads and clips a batch. What is easy to
break: a loop is warm before its clock runs, since starting is the job's business and is measured there.
"""

import itertools
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import torch

from kinoray.catalog.quarantine import Refusal, error_of, judge
from kinoray.errors import MediaError
from kinoray.label.read import VideoReader
from kinoray.label.stage import LabelJob
from kinoray.label.times import StageClock
from kinoray.network.checkpoint import load_model
from kinoray.network.scorer import ClipScorer
from kinoray.video.frames import Clip
from kinoray.video.sandbox.pool import shared_sandbox

__all__ = ["DecodeLoop", "ModelLoop", "decode_loop", "model_loop"]

_KEPT_BYTES = 2**30  # decoded clips that the model loop goes over again and again
_MODEL_S = 10.0


@dataclass(kw_only=True, slots=True)
class DecodeLoop:
    """What reading and decoding some videos took."""

    videos: int = 0
    """All of them, bad ones, too."""
    bad: int = 0
    clips: int = 0
    bytes_read: int = 0
    duration_s: float = 0.0
    """Length of the good ones together."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Of this process and of the decoders."""
    kept: list[Clip] = field(default_factory=list)
    """The first clips, for the model loop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLoop:
    """What running the network on some clips took, all workers side by side."""

    clips: int
    wall_s: float
    cpu_s: float


def decode_loop(job: LabelJob, rows: pa.Table, num_workers: int, *, keep: int) -> DecodeLoop:
    """Read and decode the rows with the decoders of all workers, and drop the clips, but for the first `keep`.

    Raises:
        KinorayError: none of the videos can be decoded, or the store or this machine fails.
    """
    num_decoders = num_workers * job.decode_tasks
    batch_size = num_workers * job.scorer.batch_size
    reader = VideoReader(
        job.storage, job.clip, job.views, StageClock(), num_decoders=num_decoders, batch_size=batch_size
    )
    sandbox = shared_sandbox(num_decoders)
    for _ in reader.videos(rows.slice(0, 2 * num_decoders)):
        pass  # starts the decoders
    loop = DecodeLoop(videos=rows.num_rows)
    last: Refusal | None = None
    cpu_s, begin = time.process_time() + sandbox.cpu_s, time.perf_counter()
    for video in reader.videos(rows):
        if isinstance(video, Refusal):
            loop.bad += 1
            last = video
            continue
        loop.bytes_read += len(video.data)
        loop.duration_s += video.first.info.duration_s or 0.0
        try:
            for part in reader.parts(video):
                for clip in part.clips():
                    loop.clips += 1
                    if len(loop.kept) < keep and _bytes_of(loop.kept) < _KEPT_BYTES:
                        loop.kept.append(clip)
        except MediaError as error:
            loop.bad += 1
            last = judge(error, "decode")
    loop.wall_s = time.perf_counter() - begin
    loop.cpu_s = time.process_time() + sandbox.cpu_s - cpu_s
    if not loop.clips and last is not None:
        raise error_of(last)
    return loop


def _bytes_of(clips: Sequence[Clip]) -> int:
    return sum(clip.frames.nbytes + (0 if clip.flow is None else clip.flow.nbytes) for clip in clips)


def model_loop(job: LabelJob, clips: Sequence[Clip], num_clips: int, num_workers: int) -> ModelLoop:
    """Run the prepared network on the clips over and over, in so many threads side by side as the job has workers.

    Each runs whole batches, at most its share of `num_clips`, and begins none after 10 s. With a GPU there is one
    thread, since each worker has a GPU of its own.

    Raises:
        ModelError, CheckpointError: it cannot be run.
    """
    num_threads = num_workers if job.device == "cpu" else 1
    share = max(1, -(-num_clips // num_threads) // job.scorer.batch_size) * job.scorer.batch_size
    before = torch.get_num_threads()
    torch.set_num_threads(job.torch_threads)
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(job.torch_threads,)) as pool:
            # One after the other: folding traces the network, and tracing is not thread-safe.
            scorers = [pool.submit(_warm_scorer, job, clips).result() for _ in range(num_threads)]
            cpu_s, begin = time.process_time(), time.perf_counter()
            running = [pool.submit(_run_clips, scorer, clips, job.scorer.batch_size, share) for scorer in scorers]
            done = sum(future.result() for future in running)
            wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_s
    finally:
        torch.set_num_threads(before)
    return ModelLoop(clips=done, wall_s=wall_s, cpu_s=cpu_s)


def _warm_scorer(job: LabelJob, clips: Sequence[Clip]) -> ClipScorer[None]:
    """The prepared network, after its first batch, which is slower."""
    model, meta = load_model(job.storage, job.checkpoint, job.allow_factory)
    scorer = ClipScorer[None](model, job.clip, job.scorer, num_classes=len(meta.labels), device=job.device)
    _put(scorer, itertools.islice(itertools.cycle(clips), job.scorer.batch_size))
    return scorer


def _run_clips(scorer: ClipScorer[None], clips: Sequence[Clip], batch_size: int, share: int) -> int:
    """Run whole batches, as many as `share` clips make or as begin in time; the clips that were run."""
    source, end, done = itertools.cycle(clips), time.perf_counter() + _MODEL_S, 0
    while done < share and time.perf_counter() < end:
        _put(scorer, itertools.islice(source, batch_size))
        done += batch_size
    for _ in scorer.flush():  # the last batch may still be under way on a GPU
        pass
    return done


def _put(scorer: ClipScorer[None], clips: Iterable[Clip]) -> None:
    for clip in clips:
        for _ in scorer.put(None, clip):
            pass
