"""The GPU benchmark runs where there is no GPU, and claims nothing there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NO_RAY = """
import runpy, sys
sys.modules["ray"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run benchmarks/gpu.py itself")
def test_without_a_gpu_and_without_ray_it_runs_small_and_claims_nothing() -> None:
    paths = os.pathsep.join(str(ROOT / name) for name in ("platform", "models"))
    command = [sys.executable, "-c", NO_RAY, str(ROOT / "benchmarks" / "gpu.py"), "--quick"]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ok"] is None
    assert result["verdict"] == "not yet measured: the bars are for a GPU"
    for what in ("fp32", "bf16", "loop"):
        assert result[f"resnet18 {what} logits off, of what is allowed"] <= 1
    shares = result["resnet18 2 x 2: backbones/matmul"]
    assert (shares["bar"], shares["H100"]) == (">= 0.45", "not yet measured")
    assert result["resnet18 2 x 2: bare/loop"]["here"] > 0
    assert result["resnet18 2 x 2: flow/backbones"]["here"] > 0
