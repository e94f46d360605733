"""Bootstrap intervals against what theory says of them, and the comparisons built on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elm_jax.cli.main import main
from elm_jax.errors import ElmError
from elm_jax.evaluation import report, tables
from elm_jax.evaluation.intervals import bootstrap, compare, split_oracle
from elm_jax.evaluation.results import (
    Choice,
    ExpertSummary,
    Results,
    Score,
    Strategy,
    TaskSummary,
    write_experts,
    write_score,
    write_strategy,
    write_tasks,
)

BACKBONE = {"name": "t5-tiny", "fingerprint": "sha256:aa"}


def test_an_interval_over_examples_is_that_of_the_binomial() -> None:
    values = {"t": [np.repeat([0.0, 1.0], [600, 400])]}
    low, high = bootstrap(values, resample="examples", samples=20_000)
    error = np.sqrt(0.4 * 0.6 / 1000)
    assert (low, high) == pytest.approx((0.4 - 1.96 * error, 0.4 + 1.96 * error), abs=2e-3)


def test_an_interval_over_tasks_is_that_of_their_means() -> None:
    rng = np.random.default_rng(1)
    values = {str(i): [np.full(5, v)] for i, v in enumerate(rng.normal(0.5, 0.1, 40))}
    means = [v[0][0] for v in values.values()]
    low, high = bootstrap(values, samples=20_000)
    error = np.std(means) / np.sqrt(len(means))
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert low < np.mean(means) < high
    # Examples that are all equal add nothing, and kept tasks leave nothing to draw.
    assert bootstrap(values, resample="tasks", samples=20_000) == pytest.approx(
        (low, high), abs=5e-3
    )
    assert bootstrap(values, resample="examples") == pytest.approx([np.mean(means)] * 2)


def test_two_levels_have_the_variance_of_both() -> None:
    rng = np.random.default_rng(2)
    centres = rng.uniform(0.2, 0.8, 30)
    values = {str(i): [rng.binomial(1, p, 25).astype(float)] for i, p in enumerate(centres)}
    low, high = bootstrap(values, samples=20_000)
    within = np.mean([v[0].var() / 25 for v in values.values()])
    between = np.var([v[0].mean() for v in values.values()])
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt((within + between) / 30), rel=0.05)


def test_prompts_count_by_their_task() -> None:
    values = {"one": [np.ones(4), np.zeros(9)], "two": [np.ones(2)]}
    assert bootstrap(values, resample="examples") == (0.75, 0.75)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resample": "task"}, "did you mean 'tasks'"),
        ({"samples": 0}, "samples >= 1"),
        ({"level": 95.0}, "0 < level < 1"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ElmError, match=said):
        bootstrap({"t": [np.ones(3)]}, **options)
    with pytest.raises(ElmError, match="no task with values"):
        bootstrap({})


def score(task: str, expert: str, values: list[float] | None, mean: float | None = None) -> Score:
    return Score(
        task=task,
        expert=expert,
        metric="accuracy",
        score=float(np.mean(values)) if values is not None else mean or 0.0,
        examples=len(values) if values is not None else 4,
        scoring="rank",
        per_prompt={},
        settings={},
        backbone=BACKBONE,
        values=None if values is None else tuple(values),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Expert a is better than b on each example of the unseen tasks but one."""
    for task in ("u1", "u2/p", "u2/q", "s1"):
        write_score(tmp_path, score(task, "a", [1, 1, 0, 1]))
        write_score(tmp_path, score(task, "b", [0, 1, 0, 0] if task != "u1" else [1, 1, 0, 1]))
        write_score(tmp_path, score(task, "none", [0, 0, 0, 0]))
    write_experts(tmp_path, [ExpertSummary(i, "lora", ("s1",), ("p",), 10, False) for i in "ab"])
    write_tasks(
        tmp_path,
        [
            TaskSummary("s1", 4, "accuracy", group="seen"),
            TaskSummary("u1", 4, "accuracy", group="unseen"),
            TaskSummary("u2/p", 4, "accuracy", group="unseen", parent="u2"),
            TaskSummary("u2/q", 4, "accuracy", group="unseen", parent="u2"),
        ],
    )
    merged = Choice("u1", "a", 0.5, "accuracy", values=(1.0, 1.0, 0.0, 0.0))
    write_strategy(tmp_path, Strategy("retrieved:top2", BACKBONE, 0, (merged,)))
    return tmp_path


def test_a_comparison_is_paired_and_counts_tasks(folder: Path) -> None:
    found = compare(Results.load(folder), "a", "b", resample="examples")
    assert (found.better, found.worse, found.tasks) == (1, 0, 2)
    assert found.means == (0.75, (0.75 + 0.25) / 2) and found.difference == 0.25
    # u1 is equal on each example, so only u2 moves; two of its four examples differ.
    assert 0 <= found.interval[0] < 0.25 < found.interval[1] <= 0.5
    assert compare(Results.load(folder), "a", "a").interval == (0, 0)
    assert compare(Results.load(folder), "a", "none", resample="tasks").clear


def test_a_merged_strategy_brings_its_own_values(folder: Path) -> None:
    found = compare(Results.load(folder), "retrieved:top2", "a")
    assert found.tasks == 1 and found.means == (0.5, 0.75)


def test_names_and_values_that_are_missing(folder: Path) -> None:
    with pytest.raises(ElmError, match="neither a strategy nor an expert.*did you mean 'none'"):
        compare(Results.load(folder), "a", "nonne")
    write_score(folder, score("u1", "b", None, mean=0.75))
    found = compare(Results.load(folder), "a", "b")
    assert found.left_out == ("u1",) and found.tasks == 1
    only = [t for t in Results.load(folder).tasks if t.name == "u1"]
    with pytest.raises(ElmError, match="hold no values of examples"):
        compare(Results.load(folder), "a", "b", tasks=only)


def test_an_oracle_among_coins_is_luck(tmp_path: Path) -> None:
    """Of many experts that are equal the best seems good, until it is scored on other examples."""
    rng = np.random.default_rng(3)
    names = [f"e{i}" for i in range(60)]
    for task in ("t1", "t2", "t3"):
        for name in names:
            write_score(tmp_path, score(task, name, rng.binomial(1, 0.5, 40).tolist()))
    write_experts(tmp_path, [ExpertSummary(i, "lora", ("s",), ("p",), 10, False) for i in names])
    write_tasks(tmp_path, [TaskSummary(t, 40, "accuracy") for t in ("t1", "t2", "t3")])
    best, split = split_oracle(Results.load(tmp_path)) or (0, 0)
    assert best > 0.65 and split == pytest.approx(0.5, abs=0.1)
    assert any("is luck" in said for said in tables.findings(Results.load(tmp_path)))
    # One expert that is truly better stays so.
    for task in ("t1", "t2", "t3"):
        write_score(tmp_path, score(task, "e7", [1.0] * 40))
    assert split_oracle(Results.load(tmp_path)) == (1.0, 1.0)


def test_values_must_be_those_of_the_score() -> None:
    with pytest.raises(ElmError, match="must have the score 0.5 as their mean"):
        Choice("t", "a", 0.5, "accuracy", values=(1.0, 1.0))
    with pytest.raises(ElmError, match="values are of 2 examples, expected 4"):
        Score("t", "a", "accuracy", 0.5, 4, "rank", {}, {}, BACKBONE, values=(0.0, 1.0))


def test_the_command_and_the_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", str(folder), "--baseline", "b", "--with", "a", "--samples", "200"]
    assert main([*command, "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["difference"] == 0.25 and found["tasks"] == 2
    assert main([*command, "--group", "all"]) == 0
    assert "+33.3" in capsys.readouterr().out
    assert main([*command, "--group", "unsen"]) == 1
    assert "did you mean 'unseen'" in capsys.readouterr().err
    names = [table.name for table in tables.all_tables(Results.load(folder))]
    assert "differences" in names
    assert "Differences, and how far chance" in report.render(Results.load(folder), date="")
