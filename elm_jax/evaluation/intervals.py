"""Differences between strategies, with bootstrap intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from elm_jax.errors import ElmError, nearest
from elm_jax.evaluation.results import Results, TaskSummary

RESAMPLE = ("both", "tasks", "examples")
SAMPLES = 5_000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one strategy is above another on the same examples.

    Attributes:
      first: the strategy that is asked about.
      second: the one it is compared with.
      means: of the two, 0 to 1.
      interval: lower and upper end for `means[0] - means[1]`.
      better: tasks on which the first is better.
      worse: tasks on which it is worse.
      tasks: how many tasks both did; prompts of one task count once.
      left_out: tasks that were not compared, as their scores have no values of examples.
    """

    first: str
    second: str
    means: tuple[float, float]
    interval: tuple[float, float]
    better: int
    worse: int
    tasks: int
    left_out: tuple[str, ...] = ()

    @property
    def difference(self) -> float:
        """The first's mean less the second's."""
        return self.means[0] - self.means[1]

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return not self.interval[0] <= 0 <= self.interval[1]


def bootstrap(
    values: Mapping[str, Sequence[np.ndarray]],
    *,
    resample: str = "both",
    samples: int = SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile interval of a mean over tasks.

    A task's mean is that of its prompts' means. With 'both', each sample draws tasks, and for each
    draw of a task its examples anew, so the interval speaks of other tasks of these kinds.
    'examples' keeps the tasks and speaks of these alone; 'tasks' keeps the examples.

    Args:
      values: for each task, for each of its prompts, float [n].
      resample: 'both', 'tasks' or 'examples'.
      samples: how many are drawn.
      level: of the interval, such as 0.95.
      seed: of the draws.

    Raises:
      ElmError: nothing to draw from, or an option that is no such.

    Source: Efron and Tibshirani 1993, percentile interval; drawn in two levels.
    """
    if resample not in RESAMPLE:
        raise ElmError(
            f"resample must be one of {', '.join(RESAMPLE)}; got {resample!r}"
            f"{nearest(resample, RESAMPLE)}"
        )
    if samples < 1 or not 0 < level < 1:
        raise ElmError(f"expected samples >= 1 and 0 < level < 1, got {samples} and {level}")
    if not values or not all(values.values()):
        raise ElmError("nothing to draw from: no task with values")
    rng = np.random.default_rng(seed)
    count = len(values)
    if resample == "examples":
        drawn = np.tile(np.arange(count), (samples, 1))
    else:
        drawn = rng.integers(count, size=(samples, count))
    means = np.zeros((samples, count))
    for k, prompts in enumerate(values.values()):
        here = drawn == k
        found = np.zeros(int(here.sum()))
        for prompt in prompts:
            found += (
                np.mean(prompt) if resample == "tasks" else _means(prompt, len(found), rng)
            ) / len(prompts)
        means[here] = found
    low, high = np.quantile(means.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _means(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the means of `count` samples of n values drawn of n."""
    distinct, times = np.unique(values, return_counts=True)
    if len(distinct) == 1:
        return np.full(count, distinct[0], float)
    # How often each value is drawn; most metrics take few values, so this is far below n draws.
    return rng.multinomial(len(values), times / len(values), size=count) @ distinct / len(values)


def compare(
    results: Results,
    first: str,
    second: str,
    *,
    tasks: Sequence[TaskSummary] | None = None,
    resample: str = "both",
    samples: int = SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Difference:
    """Compares two strategies or experts, example by example.

    Args:
      results: what was measured.
      first: name of a strategy, or id of an expert.
      second: likewise.
      tasks: which tasks; the target tasks (unseen ones) by default.
      resample: see `bootstrap`.
      samples: see `bootstrap`.
      level: see `bootstrap`.
      seed: see `bootstrap`.

    Raises:
      ElmError: for an unknown name, with the nearest; or if the two have no task in common that
        was scored on the same examples with values stored.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    left_out = []
    done = 0
    for task in results.targets if tasks is None else tasks:
        pair = [_values(results, name, task.name) for name in (first, second)]
        if pair[0] is None or pair[1] is None:
            continue
        done += 1
        if len(pair[0]) and len(pair[0]) == len(pair[1]):
            found.setdefault(task.parent or task.name, []).append((pair[0], pair[1]))
        else:
            left_out.append(task.name)
    if not found:
        why = (
            "their scores hold no values of examples: they are of an older version or of a metric "
            "that is no mean; evaluate again"
            if done
            else "no task was given both"
        )
        raise ElmError(f"{results.path}: cannot compare {first!r} with {second!r}: {why}")
    interval = bootstrap(
        {task: [a - b for a, b in pairs] for task, pairs in found.items()},
        resample=resample,
        samples=samples,
        level=level,
        seed=seed,
    )
    means = np.array([[np.mean([p[i].mean() for p in v]) for i in (0, 1)] for v in found.values()])
    ahead = means[:, 0] - means[:, 1]
    return Difference(
        first,
        second,
        (float(means[:, 0].mean()), float(means[:, 1].mean())),
        interval,
        better=int((ahead > 1e-9).sum()),
        worse=int((ahead < -1e-9).sum()),
        tasks=len(found),
        left_out=tuple(left_out),
    )


def split_oracle(
    results: Results, tasks: Sequence[TaskSummary] | None = None
) -> tuple[float, float] | None:
    """Returns what the oracle reaches, and what of it is not luck.

    The oracle picks the best of many experts on the examples that it is scored on, so with few
    examples it gains even where all experts are equal. Here it picks on every other example and is
    scored on the rest, and the reverse.

    Args:
      results: what was measured.
      tasks: which tasks; the target tasks by default.

    Returns:
      The means over tasks of the oracle and of the split one; None where a task lacks the values of
      two examples for each of two experts or more.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for task in results.targets if tasks is None else tasks:
        rows = [results.scores.get((task.name, e)) for e in results.single_task_experts]
        values = [r.values for r in rows if r is not None and r.values is not None]
        if len(values) < 2 or len(values[0]) < 2 or len({len(row) for row in values}) > 1:
            return None
        matrix = np.array(values)
        halves = (np.arange(matrix.shape[1]) % 2 == 0, np.arange(matrix.shape[1]) % 2 == 1)
        split = (
            sum(matrix[np.argmax(matrix[:, ~half].mean(1)), half].sum() for half in halves)
            / matrix.shape[1]
        )
        pair = (float(matrix.mean(1).max()), float(split))
        found.setdefault(task.parent or task.name, []).append(pair)
    if not found:
        return None
    best, split = np.mean([np.mean(pairs, axis=0) for pairs in found.values()], axis=0)
    return float(best), float(split)


def _values(results: Results, name: str, task: str) -> np.ndarray | None:
    """Returns a strategy's or expert's values on a task, empty if not stored; None if not done."""
    if name in results.strategies:
        choice = results.strategies[name].choice(task)
        if choice is None:
            return None
        if choice.values is not None:
            return np.array(choice.values)
        score = results.scores.get((task, choice.expert))
        # A strategy that merged or mixed experts has no stored score of its own.
        if score is not None and abs(score.score - choice.score) > 1e-9:
            score = None
    else:
        experts = {expert for _, expert in results.scores}
        if name not in experts:
            known = [*results.strategies, *experts]
            raise ElmError(
                f"{results.path}: {name!r} is neither a strategy nor an expert that was scored"
                f"{nearest(name, known)}"
            )
        score = results.scores.get((task, name))
        if score is None:
            return None
    return np.array(score.values if score is not None and score.values is not None else ())
