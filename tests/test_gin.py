"""Every gin file resolves against the real code, and what is wrong in one is said in a line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from elm_jax import gin_check, t5x
from elm_jax.gin_utils import gin_folder

FILES = sorted(gin_folder().rglob("*.gin"))
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
        (["--gin_file=runs/train_experts.gin", "--gin.loop.RunConfig.sed=1"], "mean 'seed'?"),
        (
            [
                "--gin_file=runs/train_experts.gin",
                "--gin_file=experts/lora.gin",
                "--gin.specs.AdapterSpec.bottleneck=2",
            ],
            "nothing reads specs.AdapterSpec.bottleneck",
        ),
        (["--gin_file=runs/train_experts.gin", "--gin.MODEL_DIR=x"], "TASKS"),
    ],
)
def test_mistakes_are_one_line(flags, message):
    status, error = run("elm_jax.train", *flags)
    assert status == 1 and message in error and error.startswith("error: ")


def test_macros_of_a_users_file_must_be_read_and_set(tmp_path):
    mine = tmp_path / "mine.gin"
    mine.write_text("include 'runs/train_experts.gin'\nLEARNING_RAT = 1.0\n")
    status, error = run("elm_jax.train", f"--gin_file={mine}")
    assert status == 1 and "'LEARNING_RAT' (did you mean 'LEARNING_RATE'?)" in error
    mine.write_text("include 'runs/train_experts.gin'\nTASKS = %TASK_NAMES\n")
    status, error = run("elm_jax.train", f"--gin_file={mine}")
    assert status == 1 and "no file sets the macro 'TASK_NAMES'" in error


def test_no_gin_file_is_a_bad_argument():
    assert run("elm_jax.train")[0] == 2


def test_every_file_of_the_library_resolves():
    """Those of t5x are checked whole only where t5x is installed, and it is said so."""
    problems, skipped = gin_check.check(FILES, gin_check.search_folders())
    assert not problems, "\n".join(map(str, problems))
    assert len(FILES) > 10
    if not t5x.is_available():
        assert skipped and all("/t5x/" in line and "t5x is not inst" in line for line in skipped)


HEAD = """# Command:
#   python -m elm_jax.train --gin_file={name}
from __gin__ import dynamic_registration
import __main__ as train_script
from elm_jax.training import loop
from elm_jax.training import optimizers
include 'runs/train_experts.gin'
"""


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("loop.RunConfig.sed = 1", "8: loop.RunConfig has no parameter 'sed' (did you mean 'seed'"),
        ("loop.RunConfg.seed = 1", "8: elm_jax.training.loop has no 'RunConfg' (did you mean 'Run"),
        ("lopp.RunConfig.seed = 1", "8: lopp.RunConfig: no import gives 'lopp' (did you mean 'lo"),
        ("SEEDS = 1", "8: nothing reads the macro 'SEEDS'"),
        ("TRAIN_STEP = 1", "8: nothing reads the macro 'TRAIN_STEP' (did you mean 'TRAIN_STEPS'?)"),
        ("TRAIN_STEPS = %STEPS", "0: no file sets the macro 'STEPS'"),
        ("loop.Member.id = 'x'", "8: nothing reads loop.Member.id: the run does not use loop.Memb"),
        ("train_script.train.mesh = @loop.Member()", "0: loop.Member needs 'id', which no file b"),
        ("optimizers.OptimizerSpec.name = 'adan'", "0: optimizers.OptimizerSpec: optimizer name"),
        ("include 'experts/lara.gin'", "8: no file 'experts/lara.gin' to include (did you mean 'e"),
        ("loop.RunConfig.seed = (1", "EOF in multi-line statement"),
        ("import elm_jax.trainin", "8: No module named 'elm_jax.trainin'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(line, problem, tmp_path):
    path = tmp_path / "run.gin"
    path.write_text(HEAD.format(name=path) + line + "\n")
    problems, _ = gin_check.check([path], gin_check.search_folders())
    assert [p for p in problems if problem in f"{p.line}: {p.text}"], problems
    path.write_text(HEAD.format(name=path))
    assert gin_check.check([path], gin_check.search_folders()) == ([], [])


def test_own_names_of_t5x_files_are_checked_without_t5x(tmp_path):
    """The modules are read, not imported, where t5x is missing."""
    path = tmp_path / "part.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\nfrom t5x import utils\n"
        "from elm_jax.t5x import optimizers\n"
        "optimizers.ExpertOptimizer.train_step = 1\nutils.Anything.x = 1\n"
    )
    if t5x.is_available():
        pytest.skip("t5x is installed, so that its modules are imported")
    problems, skipped = gin_check.check([path], gin_check.search_folders())
    assert [str(p).split("gin:")[-1] for p in problems] == [
        "4: optimizers.ExpertOptimizer has no parameter 'train_step' (did you mean 'train_steps'?)"
    ]
    assert skipped == [f"{path}: not checked whole, as t5x is not installed"]


def test_the_command_says_how_many(capsys):
    assert gin_check.main([str(gin_folder() / "experts")]) == 0
    assert "files, 0 problems" in capsys.readouterr().out
