"""A process that computes keeps the memory of large tensors."""

import ctypes
import subprocess
import sys

import pytest

PASSES = """
import resource, sys, threading
import torch
from kinoray.network.process import set_up_to_compute

if sys.argv[1] == "set up":
    set_up_to_compute(1)

def look():
    for _ in range(3):
        torch.ones(2**24) + torch.ones(2**22)[:, None].expand(-1, 4).reshape(-1)

def passes():
    look()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        look()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=passes)  # as Ray Train runs what it is given
thread.start()
thread.join()
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PASSES, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_large_tensors_take_the_memory_of_those_before_them() -> None:
    assert page_faults("set up") < page_faults("left alone") / 20
