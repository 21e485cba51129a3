"""What a rank of a training is fed with: the splits of the catalog, and their decoded batches along a plan.

Easy to break: a store that is down ends the batches of one rank, while the others go on to their next collective; so
the rank says so in `outage` and stays with them until all can end together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from kinoray.catalog.quarantine import Refusal
from kinoray.catalog.table import Catalog
from kinoray.errors import StorageUnavailable
from kinoray.network.device_input import DeviceInput, Feeder, sent
from kinoray.storage.objects import Storage
from kinoray.train.config import TrainConfig
from kinoray.train.decoding import DecodeTask
from kinoray.train.ingest import Rows, Samples, Unreadable, rank_part, stream

__all__ = ["Feed", "Part"]


class Part:
    """A split of the catalog, and what of it could not be read on this rank."""

    def __init__(self, catalog: Catalog, name: str) -> None:
        self.catalog, self.name = catalog.select(name), name
        self.labels = torch.from_numpy(self.catalog.table.column("label_id").to_numpy().astype(np.int64))
        self.refusals: list[Refusal] = []

    def __len__(self) -> int:
        return len(self.catalog)

    def refuse(self, unreadable: Sequence[Unreadable]) -> None:
        """Take down videos that could not be read."""
        for item in unreadable:
            row = self.catalog.table.select(["video_id", "uri", "offset", "length"]).slice(item.row, 1).to_pylist()[0]
            stage = f"train on {self.name or 'all'}"
            self.refusals.append(Refusal(**row, error_class=item.error_class, error_text=item.error_text, stage=stage))


class Feed:
    """Streams a rank's steps; all ranks have one."""

    outage: StorageUnavailable | None = None
    """Why batches ended early on this rank: the store is down, for longer than storage.retry_s."""

    def __init__(self, config: TrainConfig, storage: Storage, *, with_flow: bool, device: torch.device) -> None:
        self._config, self._storage, self._with_flow = config, storage, with_flow
        finds_flow = config.clip.flow_on_device(with_flow=with_flow)
        self._finish = DeviceInput(config.clip.flow.bound_px, device) if finds_flow else None
        self._feeder = Feeder(device) if device.type == "cuda" and not finds_flow else None
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._spent = torch.zeros(2, dtype=torch.float64)  # CPU seconds, videos from the cache

    def batches(self, part: Part, steps: Sequence[Rows], epoch: int | None) -> Iterator[Samples]:
        """The steps of a part that have any row, in order, with the random frames of an epoch (None: the middle).

        Ends early with `outage` set, and gives nothing from then on, where the store is down.

        Raises:
            JobError: as `kinoray.train.ingest.stream`.
        """
        task = DecodeTask(
            storage=self._storage,
            clip=self._config.clip,
            with_flow=self._with_flow,
            seed=self._config.optim.seed,
            epoch=epoch,
            cache=self._config.cache,
        )
        share = rank_part(self._config.resources.decode_tasks, self._rank, self._world_size)
        decode_tasks = max(1, share.stop - share.start)
        try:
            for samples in stream(
                part.catalog,
                steps,
                task,
                decode_tasks=decode_tasks,
                world_size=self._world_size,
                finish=self._finish,
            ):
                self._spent += torch.tensor([samples.decode_cpu_s, samples.cached], dtype=torch.float64)
                part.refuse(samples.unreadable)
                yield samples if self._feeder is None else self._sent(samples, self._feeder)
        except StorageUnavailable as error:
            self.outage = error

    def _sent(self, samples: Samples, feeder: Feeder) -> Samples:
        """On the device: they get there while it computes the step before."""
        return replace(samples, clips=sent(samples.clips, feeder)) if len(samples.clips) else samples

    def check(self) -> None:
        """Raise this rank's outage, if there is one."""
        if self.outage is not None:
            raise self.outage

    def spent(self, device: torch.device) -> dict[str, float | int]:
        """What decoding took since the last call, on all ranks, which must all call it.

        `cached` videos came from the cache of frames.
        """
        numbers = self._spent.to(device, copy=True)
        dist.all_reduce(numbers)
        self._spent.zero_()
        row: dict[str, float | int] = {"decode_cpu_s": round(float(numbers[0]), 3)}
        return row | ({"cached": int(numbers[1])} if self._config.cache.gb else {})
