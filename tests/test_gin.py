"""Every gin file resolves against the real code, and what is wrong in one is said in a line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from elm_jax.gin_utils import gin_folder

EXPERTS = sorted(path.name for path in (gin_folder() / "experts").glob("*.gin"))


def run(module: str, *flags: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *flags], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.strip().splitlines() if "steps" not in line]
    return done.returncode, lines[-1] if lines else ""


@pytest.mark.parametrize("expert", EXPERTS)
def test_training_runs_up_to_the_missing_tasks(expert, tmp_path):
    status, error = run(
        "elm_jax.train",
        "--gin_file=runs/train_experts.gin",
        f"--gin_file=experts/{expert}",
        f"--gin.TASKS=['{tmp_path}/none']",
        f"--gin.MODEL_DIR={tmp_path / 'store'}",
    )
    assert status == 1 and "no task matches" in error


def test_pretraining_runs_up_to_the_missing_corpus(tmp_path):
    status, error = run(
        "elm_jax.pretrain",
        "--gin_file=runs/pretrain.gin",
        f"--gin.CORPUS={tmp_path / 'none'}",
        f"--gin.MODEL_DIR={tmp_path / 'run'}",
        f"--gin.OUTPUT={tmp_path / 'out'}",
    )
    assert status == 1 and str(tmp_path / "none") in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin_file=runs/train_expert.gin"], "train_expert.gin"),
        (["--gin_file=runs/train_experts.gin", "--gin.TASK=x"], "did you mean 'TASKS'?"),
        (["--gin_file=runs/train_experts.gin", "--gin.loop.RunConfig.sed=1"], "'sed'"),
        (["--gin_file=runs/train_experts.gin", "--gin.MODEL_DIR=x"], "TASKS"),
    ],
)
def test_mistakes_are_one_line(flags, message):
    status, error = run("elm_jax.train", *flags)
    assert status == 1 and message in error and error.startswith("error: ")


def test_no_gin_file_is_a_bad_argument():
    assert run("elm_jax.train")[0] == 2
