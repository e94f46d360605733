"""Benchmarks that no machine of ours can run at full size: that they run, and add up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elm_jax.training.planning import DEVICES

ROOT = Path(__file__).resolve().parents[1]


def test_accelerator_benchmark_on_a_cpu() -> None:
    sizes = ["--batch-size", "2", "--inputs-length", "8", "--targets-length", "4"]
    rows = ["--sizes", "elm-tiny", "elm-tinny", "--kinds", "adapter", "--stacks", "2"]
    how = [
        "--dtype",
        "bf16",
        "--scan-layers",
        "--remat",
        "minimal",
        "--expert-option",
        "bottleneck=4",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "accelerator.py"), *rows, *sizes, *how,
         "--steps", "1", "--device", "h100"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = json.loads(done.stdout)
    row, refused = report["rows"]
    assert done.returncode == 1 and refused["size"] == "elm-tinny"
    assert "neither a folder nor a published size" in refused["error"]
    assert row["dtype"] == "bfloat16" and row["scan_layers"] and row["remat"] == "minimal"
    assert row["tokens_per_s"] == pytest.approx(2 * 2 * (8 + 4) / row["step_s"])
    rate = row["step_flops"] / row["step_s"]
    assert row["mfu"] == pytest.approx(rate / DEVICES["h100"].flops)
    assert row["tflops_per_s_per_device"] == pytest.approx(rate / 1e12)
    # What is on the device is what the plan said would be.
    planned = row["memory"]["planned"]
    held = sum(planned[name] for name in ("backbone", "expert", "optimizer state"))
    batch = 4 * 2 * 2 * (8 + 3 * 4)
    assert row["memory"]["xla_argument_bytes"] == pytest.approx(held + batch, abs=64)
