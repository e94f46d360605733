"""`mini`, the embedded suite: small prompted English tasks, written by code.

It plays the part that P3 plays in the paper: experts are trained on the training tasks, and one of
them is retrieved for each unseen task. Every task is a small grammar. A *slot* such as `{thing}` is
drawn from the task's words once per example and then keeps its value, `{thing2}` is another draw
from the same words, and a drawn word may itself hold slots. The words are everyday ones of the
English novel, so that a small vocabulary trained on such books keeps most of them whole.

An example belongs to the split its text falls into by checksum, so that no text is ever in both
splits, whatever the sizes and seeds.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elm_jax.data.mini import answers, labels
from elm_jax.data.mini.grammar import MiniTask, Prompt, stream
from elm_jax.errors import ElmError, nearest

__all__ = [
    "SIZES",
    "TASKS",
    "MiniTask",
    "Prompt",
    "examples",
    "train_tasks",
    "unseen_tasks",
    "write",
]

SIZES = {"train": 400, "test": 100}

TASKS: tuple[MiniTask, ...] = tuple(
    sorted((*labels.TASKS, *answers.TASKS), key=lambda task: (task.unseen, task.name))
)


def train_tasks() -> tuple[MiniTask, ...]:
    """Returns the tasks that experts are trained on."""
    return tuple(task for task in TASKS if not task.unseen)


def unseen_tasks() -> tuple[MiniTask, ...]:
    """Returns the tasks that no expert is trained on."""
    return tuple(task for task in TASKS if task.unseen)


def examples(
    name: str, split: str, *, size: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Writes the examples of one task.

    Prompts and outcomes come equally often, and a smaller size gives the beginning of a larger one.
    Every example has a text of its own.

    Args:
      name: a task of `TASKS`.
      split: `train` or `test`.
      size: how many; by default 400 to train and 100 to test.
      seed: which examples; no seed ever moves a text to the other split.

    Returns:
      One dictionary per example: `inputs` str, `targets` list of str, `answer_choices` list of str
      (the first target among them) or None, `prompt` str, `id` str (unique).

    Raises:
      ElmError: for an unknown task or split, a negative size, or more examples than there are.

    >>> [example] = examples('topic_season', 'test', size=1)
    >>> example['answer_choices']
    ['spring', 'summer', 'autumn', 'winter']
    >>> example['targets'][0] in example['answer_choices']
    True
    """
    task = _task(name)
    if split not in SIZES:
        raise ElmError(
            f"mini has no split {split!r}, only {' and '.join(SIZES)}{nearest(split, SIZES)}"
        )
    size = SIZES[split] if size is None else size
    if size < 0:
        raise ElmError(f"mini:{name}: size must be 0 or more, got {size}")
    return list(itertools.islice(stream(task, split, seed), size))


def write(
    directory: str | os.PathLike[str],
    *,
    tasks: str = "all",
    train_size: int = SIZES["train"],
    test_size: int = SIZES["test"],
    seed: int = 0,
) -> list[Path]:
    """Writes tasks as files, `<directory>/<task>/{train,test}.jsonl`, each atomically.

    Args:
      directory: made where it is missing.
      tasks: `all`, `train`, `unseen`, or the name of one task.
      train_size: examples in each train file.
      test_size: examples in each test file.
      seed: as in `examples`.

    Returns:
      The files, in order.

    Raises:
      ElmError: for an unknown task, a negative size, or more examples than there are.
    """
    groups = {"all": TASKS, "train": train_tasks(), "unseen": unseen_tasks()}
    chosen = groups[tasks] if tasks in groups else (_task(tasks, extra=groups),)
    paths = []
    for task, (split, size) in itertools.product(
        chosen, {"train": train_size, "test": test_size}.items()
    ):
        rows = examples(task.name, split, size=size, seed=seed)
        path = Path(directory) / task.name / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)  # is there only where writing failed
        paths.append(path)
    return paths


def _task(name: str, extra: Mapping[str, object] | None = None) -> MiniTask:
    """Finds a task; `extra` are names that would have been right as well."""
    by_name = {task.name: task for task in TASKS}
    if name not in by_name:
        raise ElmError(
            f"mini has no task {name!r}{nearest(name, [*by_name, *(extra or ())])}; "
            f"its tasks are {', '.join(by_name)}"
        )
    return by_name[name]
