"""Decoded frames on this node's disk, shared by all decode tasks of a sweep: each video is decoded once for all trials.

What is kept for a video is what all samplings of the sweep see of it in one epoch: cut, scaled, as uint8, with its
flow. Trials with the same seed draw the same cut, and frames that nest (see sample.py), so they share one file;
what is scored is the same in every epoch and is kept once. A run that reads from the cache gets the bytes that decoding
would have given it: with or without the cache a training is the same to the last bit.

Nothing is ever evicted: the epochs that every trial begins with are the most used ones, and a cache that always throws
away what it needs next is worse than one that is full. What no longer fits is decoded as without a cache. Easy to
break: a file may be cut, damaged or half written at any time; each frame is checked against its checksum when it is
read, and a bad file is deleted and made again.
"""

import fcntl
import json
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

import kinoray
from kinoray.config.shared import CacheConfig, ClipConfig, SampleConfig, digest, require
from kinoray.errors import ConfigError
from kinoray.storage.records import parse_json
from kinoray.video.frames import Frames

__all__ = ["CacheFolder", "FrameCache", "cache_folder", "checksums", "grid_name"]

_MAGIC = b"kinofrm2"
_HEAD = struct.Struct("<8sII")  # magic, length and checksum of the description
_SOFTWARE = digest([kinoray.__version__, av.__version__, sorted(av.library_versions.items()), cv2.__version__])[:8]
_LOCKS = 256
_CHECKED_BYTES = 4096
_RECOUNT_S = 600  # between two looks whether a full folder is as full as was counted
_ABANDONED_S = 3600  # after which nobody writes to a file that is not whole


def grid_name(sample: SampleConfig) -> str:
    """`16x6` for 16 segments of 6 frames, `1x16/4` for a dense clip of 16 frames, every fourth of the video."""
    grid = f"{sample.num_segments}x{sample.frames_per_segment}"
    return f"{grid}/{sample.stride}" if sample.is_dense else grid


def cache_folder(config: CacheConfig) -> Path:
    """The folder on this node: config.folder, or one of this user's own in the system's temporary folder."""
    return Path(config.folder or os.path.join(os.environ.get("TMPDIR", "/tmp"), f"kinoray-cache-{os.getuid()}"))


@dataclass(frozen=True, slots=True)
class CacheFolder:
    """Files that processes of this node share: each is whole or absent, all together take at most config.gb."""

    config: CacheConfig
    _root: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_root", cache_folder(self.config))

    def path(self, key: str, kind: str) -> Path:
        """Where the file of a key (hex digits) lies; what other releases have decoded is not read."""
        return self._root / key[:2] / f"{key}.{_SOFTWARE}.{kind}"

    def put(self, path: Path, size_bytes: int, parts: Iterable[bytes | memoryview]) -> bool:
        """Write a file of `size_bytes`; False if there is no room for it. A reader sees a whole file or none."""
        if not self._count(size_bytes):
            return False
        temp = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            with temp.open("wb") as file:
                for part in parts:
                    file.write(part)
            temp.replace(path)  # not flushed: after a power cut the checksums tell
        except OSError:  # the disk is full, although the cache is not
            with suppress(OSError):
                temp.unlink(missing_ok=True)
            self._count(-size_bytes)
            return False
        return True

    def has_room(self, size_bytes: int) -> bool:
        """Whether so many bytes still fit."""
        return self._count(0, size_bytes)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Held by one process at a time; the kernel lets it go if that dies."""
        self._prepare()
        with self._locked(name):
            yield

    def try_lock(self, name: str) -> int | None:
        """The same without waiting: a descriptor to close in the end; None where another process holds it."""
        self._prepare()
        descriptor = self._open(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def remove(self, path: Path) -> None:
        """Delete a file that is not what was written."""
        with suppress(OSError):  # another process was faster
            path.unlink()
        with self._locked("used") as descriptor:  # it may be shorter than what was counted for it
            self._note(descriptor, self._measured(), time.time())

    @contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        descriptor = self._open(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # let go by the kernel if this process dies
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, name: str) -> int:
        """The file of a lock."""
        try:
            return os.open(self._root / name, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._unusable(error) from error

    def _prepare(self) -> None:
        """Make the folder, for this user alone."""
        try:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            owner = self._root.stat().st_uid
        except OSError as error:
            raise self._unusable(error) from error
        if owner != os.getuid():
            raise ConfigError(f"cache.folder {self._root} belongs to another user; name another folder")

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"cache.folder {self._root} cannot be used: {error.strerror or error}; name a folder that can be written, "
            "or leave the cache out (cache.gb 0)"
        )

    def _count(self, change: int, room: int = 0) -> bool:
        """Change the number of bytes in use, unless they and `room` would be more than config.gb.

        Before a folder counts as full it is looked at now and then: files may have been deleted, as systems do with
        what is old in their temporary folders.
        """
        self._prepare()
        most = self.config.gb * 1e9
        with self._locked("used") as descriptor:
            words = os.pread(descriptor, 64, 0).split()
            is_known = len(words) == 2 and all(word.isdigit() for word in words)
            used, counted_s = map(int, words) if is_known else (0, 0)
            now_s = time.time()
            is_full = change >= 0 and used + change + room > most
            is_due = is_full and not 0 <= now_s - counted_s < _RECOUNT_S
            if is_due or not is_known:
                used, counted_s = self._measured(), int(now_s)
                is_full = change >= 0 and used + change + room > most
            if not is_full:
                used = max(0, used + change)
            if is_due or not is_known or (change and not is_full):
                self._note(descriptor, used, counted_s)
        return not is_full

    def _note(self, descriptor: int, used: int, counted_s: float) -> None:
        os.pwrite(descriptor, f"{used:31d} {int(counted_s):31d} ".encode(), 0)

    def _measured(self) -> int:
        """Bytes of the files there; what writers that died have left is removed once it is old."""
        total = 0
        for path in self._root.glob("??/*"):
            with suppress(OSError):  # a file that was just written, renamed or removed
                about = path.stat()
                if path.suffix == ".part" and time.time() - about.st_mtime > _ABANDONED_S:
                    path.unlink()
                else:
                    total += about.st_size
        return total


@dataclass(frozen=True, slots=True)
class FrameCache:
    """Reads and writes the cache; small, and picklable to decode tasks."""

    config: CacheConfig
    clip: ClipConfig
    """What the clips of this run are; clips of other grids in the same file differ from them in their grid alone."""
    _folder: CacheFolder = field(init=False)

    def __post_init__(self) -> None:
        estimator = self.clip.flow.estimator
        require(not self.clip.flow_on_device, "cache.gb", f"0 with flow.estimator {estimator}", self.config.gb)
        object.__setattr__(self, "_folder", CacheFolder(self.config))

    @property
    def samples(self) -> list[SampleConfig]:
        """The samplings that a file serves: config.grids, and this run's own."""
        own = grid_name(self.clip.sample)
        names = sorted({*self.config.grids, own}) if own in self.config.grids else [own]
        return [self._sample(name) for name in names]

    def key(self, video: Mapping[str, Any], seed: int, epoch: int | None) -> str:
        """Names the frames: 32 hex digits of all that decides their bytes.

        `video` is a row of references, with a `state` of the file where there is no checksum.
        """
        clip = asdict(self.clip)
        del clip["sample"]
        draw = None if epoch is None else [seed, epoch, video["video_id"]]
        reference = [video[name] for name in ("uri", "offset", "length", "sha256")]
        reference += [video["state"]] if video.get("state") else []
        sample = self.clip.sample
        grids = [grid_name(each) for each in self.samples]
        if any(each.is_dense for each in self.samples):
            grids += [f"{sample.fps} {sample.placement} {sample.short}"]
        parts = [reference, clip, draw, grids]
        return digest(parts) + digest([*parts, "second half"])

    def load(self, key: str, frames: np.ndarray, flow: np.ndarray | None) -> bool:
        """Read this run's clip into frames and flow, shaped as Clip has them; False: it is not there.

        A file that is not what was written is deleted; what the arrays hold is then undefined.
        """
        path = self._folder.path(key, "frames")
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            # A bad disk, or a description that is none of ours.
            with suppress(OSError, ValueError, LookupError, TypeError):
                if self._read(descriptor, frames, flow):
                    return True
        finally:
            os.close(descriptor)
        self._folder.remove(path)
        return False

    def _read(self, descriptor: int, frames: np.ndarray, flow: np.ndarray | None) -> bool:
        head = os.pread(descriptor, _HEAD.size, 0)
        if len(head) < _HEAD.size:
            return False
        magic, length, crc = _HEAD.unpack(head)
        text = os.pread(descriptor, min(length, 2**24), _HEAD.size)
        if magic != _MAGIC or len(text) != length or zlib.crc32(text) != crc:
            return False
        about = parse_json(text, bits=65)  # checksums have 64 bits, and no sign
        rows = frames.reshape(-1, *frames.shape[2:])
        flows = None if flow is None else flow.reshape(-1, *flow.shape[2:])
        size = rows[0].nbytes + (0 if flows is None else flows[0].nbytes)
        if about["frame_bytes"] != size:
            return False
        start = _HEAD.size + length
        places = about["places"][grid_name(self.clip.sample)]
        first: dict[int, int] = {}
        for row, place in enumerate(places):
            if place in first:
                rows[row] = rows[first[place]]
                if flows is not None:
                    flows[row] = flows[first[place]]
                continue
            first[place] = row
            parts = [rows[row]] if flows is None else [rows[row], flows[row]]
            if os.preadv(descriptor, [part.data for part in parts], start + place * size) != size:
                return False
        found = checksums([rows] if flows is None else [rows, flows])
        return found == [about["checksums"][place] for place in places]

    def add(self, key: str, found: Frames) -> bool:
        """Keep the frames of all `samples`; False if there is no room for them. A reader sees a whole file or none."""
        arrays = [found.frames[0]] if found.flow is None else [found.frames[0], found.flow[0]]
        arrays = [np.ascontiguousarray(array) for array in arrays]
        about = {
            "frame_bytes": sum(array[0].nbytes for array in arrays),
            "checksums": checksums(arrays),
            "places": {
                grid_name(sample): places.tolist() for sample, places in zip(self.samples, found.places(), strict=True)
            },
        }
        text = json.dumps(about).encode()
        size = _HEAD.size + len(text) + sum(array.nbytes for array in arrays)
        head = _HEAD.pack(_MAGIC, len(text), zlib.crc32(text)) + text
        pieces = (part.data for parts in zip(*arrays, strict=True) for part in parts)
        return self._folder.put(self._folder.path(key, "frames"), size, chain([head], pieces))

    def has_room(self) -> bool:
        """Whether one more video fits, as far as one can tell before it is decoded."""
        most = max(sample.num_frames for sample in self.samples)
        return self._folder.has_room(most * self.clip.frame_bytes)

    def lock(self, key: str) -> AbstractContextManager[None]:
        """Held by whoever decodes for this key: others wait for it, and then find the file."""
        return self._folder.lock(f"lock-{int(key[:8], 16) % _LOCKS:03d}")

    def _sample(self, name: str) -> SampleConfig:
        grid, _, stride = name.partition("/")
        segments, _, frames = grid.partition("x")
        return replace(
            self.clip.sample,
            num_segments=int(segments),
            frames_per_segment=int(frames),
            stride=int(stride or 0),
            fps=self.clip.sample.fps if stride else 0.0,
        )


def checksums(parts: Sequence[np.ndarray]) -> list[list[int]]:
    """Of each of N things, whose parts are [N, ...]: two sums over 64-bit words, the second by place, as in Fletcher's
    checksum: an eighth of the time of a CRC.

    Any flipped bit, lost stretch or swapped block of 4 KiB changes one of them.
    """
    plain = np.zeros(len(parts[0]), np.uint64)
    placed = plain.copy()
    for part in parts:
        raw = np.ascontiguousarray(part).reshape(len(part), -1).view(np.uint8)
        whole = raw.shape[1] // _CHECKED_BYTES * _CHECKED_BYTES
        words = raw[:, :whole].view(np.uint64).reshape(len(raw), -1, _CHECKED_BYTES // 8)
        sums = words.sum(axis=2)  # modulo 2^64, as all of it
        plain += sums.sum(axis=1) + np.array([zlib.crc32(row[whole:].data) for row in raw], np.uint64)
        placed += plain + (sums * np.arange(1, sums.shape[1] + 1, dtype=np.uint64)).sum(axis=1)
    return [[int(one), int(other)] for one, other in zip(plain, placed, strict=True)]
