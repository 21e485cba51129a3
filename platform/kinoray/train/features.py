"""Features of clips from frozen backbones: made once, kept on this node's disk, shared by the trials of a sweep.

What is kept of a clip is what the network's to_features gives for it alone (kinoray.network.build.SplitModel). A step
on it is one on the clip itself, to the last bit, so the cache decides no number. A file is named by all that decides
what is in it: the video's bytes, the clip's settings, the view that was drawn, and the backbones. These are known by
their weights and by what they make of a clip of noise on this device; the second tells apart networks of equal weights,
precisions, and libraries that add up in another order.

Runs that want the same features take turns, so that the first makes them for all. Easy to break: ranks wait for each
other in every step, so only rank 0 takes the turn, and never holds two. A file may be cut or damaged at any time: it is
checked when it is read, and made again.
"""

import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinoray.catalog.table import REFERENCE_COLUMNS
from kinoray.config.shared import AugmentConfig, CacheConfig, ClipConfig, digest
from kinoray.network.batch import FeatureBatch, VideoBatch
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.train.decoding import file_states
from kinoray.train.input import Feed, NoClip, Part, Rows, Samples
from kinoray.train.step import Replica
from kinoray.video.cache import CacheFolder, checksums

__all__ = ["FeatureCache", "FeatureFeed", "backbone_digest"]

_HEAD = struct.Struct("<8sQQ")  # magic and checksum
_MAGIC = b"kinoftr1"
_POLL_S = 0.5


def backbone_digest(module: nn.Module, probe: FeatureBatch) -> str:
    """32 hex digits of the weights that are not trained, and of what they make of a clip of noise."""
    found = hashlib.sha256()
    for prefix, part in module.named_modules():
        weights = dict(part.named_parameters(recurse=False))
        if weights and not any(value.requires_grad for value in weights.values()):
            state = [*weights.items(), *part.named_buffers(recurse=False)]
            _take_in(found, {f"{prefix}.{name}": value for name, value in state})
    _take_in(found, probe.tensors)
    return found.hexdigest()[:32]


def _take_in(found: "hashlib._Hash", tensors: Mapping[str, Tensor]) -> None:
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(_bytes(value.detach().cpu().contiguous()).data)


def _bytes(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor's own bytes, uint8 [N]."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


class FeatureCache:
    """One file a clip: a head, then the bytes of its tensors in order of their names."""

    def __init__(
        self, config: CacheConfig, clip: ClipConfig, augment: AugmentConfig, backbone: str, like: FeatureBatch
    ) -> None:
        """
        Args:
            clip: what the network is fed (ClipConfig.for_network).
            backbone: backbone_digest.
            like: features of one clip; all others have the same names, dtypes and shapes.
        """
        self.folder = CacheFolder(config)
        self._like = {name: like.tensors[name] for name in sorted(like.tensors)}
        self._size_bytes = _HEAD.size + sum(x.nbytes for x in self._like.values())
        colours = [augment.colour_jitter, augment.randaugment_ops, augment.randaugment_magnitude]
        self._name = digest([backbone, digest(clip)])
        self._drawn_name = digest([self._name, colours])

    def empty(self, count: int) -> FeatureBatch:
        """Room for the features of so many clips, on the CPU."""
        shapes = {name: (count, *x.shape[1:]) for name, x in self._like.items()}
        return FeatureBatch({name: torch.empty(shape, dtype=self._like[name].dtype) for name, shape in shapes.items()})

    def key(self, reference: str, video_id: str, seed: int, view: int | None) -> str:
        """Names a clip's features; `reference` is a digest of where its bytes are and what they are."""
        drawn = self._name if view is None else f"{self._drawn_name}\n{seed}\n{view}\n{video_id}"
        return hashlib.sha256(f"{reference}\n{drawn}".encode()).hexdigest()[:32]

    def has(self, key: str) -> bool:
        """Whether there is a file; only `load` says whether it is whole."""
        return self._path(key).exists()

    def has_room(self) -> bool:
        """Whether another clip fits."""
        return self.folder.has_room(self._size_bytes)

    def load(self, key: str, into: FeatureBatch) -> bool:
        """Read the features of one clip into tensors [1, ...]; False: they are not there.

        A file that is not what was written is deleted; what the tensors hold is then undefined.
        """
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            with suppress(OSError):  # a bad disk
                head = os.pread(descriptor, _HEAD.size, 0)
                parts = [_bytes(into.tensors[name]) for name in self._like]
                num_read = len(head) + os.preadv(descriptor, [part.data for part in parts], _HEAD.size)
                is_whole = num_read == self._size_bytes == os.fstat(descriptor).st_size
                if is_whole and head == _HEAD.pack(_MAGIC, *checksums([part[None] for part in parts])[0]):
                    return True
        finally:
            os.close(descriptor)
        self.folder.remove(path)
        return False

    def add(self, key: str, features: FeatureBatch) -> None:
        """Keep the features of one clip, tensors [1, ...] on the CPU, if there is room for them."""
        path = self._path(key)
        if path.exists():
            return
        parts = [_bytes(features.tensors[name]) for name in self._like]
        self.folder.put(
            path,
            self._size_bytes,
            [_HEAD.pack(_MAGIC, *checksums([part[None] for part in parts])[0]), *(part.data for part in parts)],
        )

    def _path(self, key: str) -> Path:
        return self.folder.path(key, "features")


class FeatureFeed(Feed):
    """A Feed of features: what is in the cache is read, the rest is decoded and goes through the backbones."""

    def __init__(
        self,
        config: TrainConfig,
        clip: ClipConfig,
        storage: Storage,
        replica: Replica,
        coloured: Callable[[Part, Samples, int | None], VideoBatch | FeatureBatch],
        say: Callable[[str], None],
    ) -> None:
        """`coloured` gives the clips of samples as the backbones see them in a view; `say` shows a line."""
        super().__init__(config, clip, storage, device=replica.device)
        self._replica = replica
        self._coloured = coloured
        self._say = say
        probe = replica.probe()
        self._cache = FeatureCache(config.cache, clip, config.augment, backbone_digest(replica.module, probe), probe)
        self._cache.has_room()  # where the folder cannot be used, that is said before the first step
        self._refused: set[str] = set()  # keys of videos that gave no clip: nobody waits for these again
        self._references: dict[str, list[tuple[str, str]]] = {}

    @contextmanager
    def turn(self, part: Part, steps: Sequence[Rows], epoch: int | None) -> Iterator[None]:
        """While features are missing that there is room for, one run at a time makes those of a part and a view."""
        name = f"turn-{self._cache.key(part.catalog.digest, part.name, self._config.optim.seed, epoch)}"
        descriptor: int | None = None
        has_said = False
        while True:
            wants = [False] * self._world_size
            missing = {self._key(part, row, epoch) for row in self._missing(part, steps, epoch)}
            dist.all_gather_object(wants, not missing <= self._refused and self._cache.has_room())
            if not any(wants):
                break
            if self._rank == 0:
                descriptor = self._cache.folder.try_lock(name)
            is_ours = [descriptor is not None]
            dist.broadcast_object_list(is_ours, src=0)
            if is_ours[0]:
                break
            if not has_said:
                self._say("train: another run is making the features that this one wants next; it waits for them")
                has_said = True
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def batches(self, part: Part, steps: Sequence[Rows], epoch: int | None) -> Iterator[Samples]:
        """As Feed.batches, with features for clips."""
        wanted = [rows for rows in steps if len(rows)]
        size = len(wanted[0]) if wanted else 1
        missing = self._missing(part, wanted, epoch)
        source_of = dict.fromkeys(missing, self._make(part, missing, epoch, size))
        ready: dict[int, FeatureBatch | NoClip] = {}
        for step, rows in enumerate(wanted):
            batch = self._cache.empty(len(rows))
            kept: list[int] = []
            quarantined: list[NoClip] = []
            num_cached = 0
            for number, row in enumerate(rows.tolist()):
                place = batch.select(slice(len(kept), len(kept) + 1))
                if row not in source_of and self._cache.load(self._key(part, row, epoch), place):
                    num_cached += 1
                    kept.append(row)
                    continue
                if row not in source_of:  # its file was damaged, or is gone; so others may be
                    gone = self._missing(part, [rows[number:], *wanted[step + 1 :]], epoch)
                    lost = [row, *(other for other in gone if other != row and other not in source_of)]
                    source_of |= dict.fromkeys(lost, self._make(part, lost, epoch, size))
                while row not in ready:
                    found = next(source_of[row], None)
                    if found is None:
                        return  # the store is down
                    ready |= found
                features = ready.pop(row)
                if isinstance(features, NoClip):
                    quarantined.append(features)
                    continue
                for name, tensor in place.tensors.items():
                    tensor.copy_(features.tensors[name])
                kept.append(row)
            self._spent[1] += num_cached
            clips = batch.select(slice(0, len(kept)))
            yield Samples(np.array(kept, np.int64), clips, tuple(quarantined), 0.0, num_cached)

    def _make(
        self, part: Part, rows: Sequence[int], epoch: int | None, size: int
    ) -> Iterator[dict[int, FeatureBatch | NoClip]]:
        """Decode rows, `size` at a time, and keep their features; what came of each row."""
        steps = [np.array(rows[start : start + size], np.int64) for start in range(0, len(rows), size)]
        for samples in super().batches(part, steps, epoch):
            found: dict[int, FeatureBatch | NoClip] = {item.row: item for item in samples.quarantined}
            self._refused.update(self._key(part, row, epoch) for row in found)
            if len(samples.rows):
                clips = self._coloured(part, samples, epoch)
                assert isinstance(clips, VideoBatch)
                features = FeatureBatch(self._replica.features(clips).to(torch.device("cpu")))
                for place, row in enumerate(samples.rows.tolist()):
                    found[row] = features.select(slice(place, place + 1))
                    self._cache.add(self._key(part, row, epoch), features.select(slice(place, place + 1)))
            yield found

    def _missing(self, part: Part, steps: Sequence[Rows], epoch: int | None) -> list[int]:
        """The rows of the steps that have no file, in their order."""
        rows = (row for step in steps for row in step.tolist())
        return [row for row in rows if not self._cache.has(self._key(part, row, epoch))]

    def _key(self, part: Part, row: int, epoch: int | None) -> str:
        if part.name not in self._references:
            table = part.catalog.table.select(["video_id", *REFERENCE_COLUMNS])
            states = file_states(self._storage, table)
            self._references[part.name] = [
                (digest([*(video[name] for name in REFERENCE_COLUMNS), states.get(video["uri"])]), video["video_id"])
                for video in table.to_pylist()
            ]
        reference, video_id = self._references[part.name][row]
        return self._cache.key(reference, video_id, self._config.optim.seed, epoch)
