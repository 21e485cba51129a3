"""A process that computes with networks and does nothing else, set up for that."""

import ctypes

import torch

__all__ = ["set_up_to_compute"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_KEPT_BYTES = 2**30


def set_up_to_compute(num_threads: int) -> None:
    """Give torch so many threads on the CPU, and have glibc keep the memory of large tensors for the next ones.

    Left alone it gives each back to the kernel, and takes it again page by page: up to two thirds of the CPU time of
    a forward pass (docs/benchmarks.md). A thread's own heap is too small for such tensors, so all share one. With
    another C library only the threads are set.
    """
    torch.set_num_threads(num_threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for setting, value in ((_M_MMAP_THRESHOLD, _KEPT_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_ARENA_MAX, 1)):
            mallopt(setting, value)
