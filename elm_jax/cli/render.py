"""`elm-jax render`: raw rows and promptsource templates to folders of prompted examples."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from elm_jax.errors import ElmError, nearest

if TYPE_CHECKING:
    from elm_jax.data.templates import Template

# 'dev_r1' is ANLI's first round, a task of its own; 'train_large' is more of the same task.
_EVALUATION_SPLIT = re.compile(r"(test|validation|dev)(_r\d+)?")
_TRAIN_SPLIT = re.compile(r"train.*?(_r\d+)?")

_EPILOG = """\
example:
  elm-jax render --templates promptsource/templates --rows raw --output data \\
      --datasets 'super_glue/*' --rows-per-prompt 1000 --original-task-only

Rows are <dataset>[/<subset>]/<split>.jsonl[.gz] below RAW_DIR, one object a line with the fields
that the templates name. Files train*.jsonl become train.jsonl; test.jsonl comes from test, or from
validation (dev) where test is not there or hides its labels. A task is named <dataset>-<subset>;
rounds (train_r1, dev_r1) are tasks of their own, <dataset>_r1.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command `render`."""
    parser = subparsers.add_parser(
        "render",
        help="render raw rows with promptsource templates",
        description="Renders raw rows with promptsource templates, a folder of examples a task.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--templates", required=True, metavar="DIR", help="<dataset>/[<subset>/]templates.yaml")
    add("--rows", required=True, metavar="RAW_DIR", help="<dataset>/[<subset>/]<split>.jsonl[.gz]")
    add("--output", required=True, metavar="DATA", help="where <task>/{train,test}.jsonl go")
    add("--datasets", nargs="+", metavar="GLOB", help="datasets to render (default: all)")
    add("--prompts", nargs="+", metavar="GLOB", help="prompts to render (default: all)")
    add("--rows-per-prompt", type=int, metavar="N", help="at most N a prompt and split, at random")
    add("--seed", type=int, default=0, help="of all that is drawn at random (default: 0)")
    add("--original-task-only", action="store_true", help="only prompts of the dataset's own task")
    add("--skip-broken", action="store_true", help="leave out what cannot be rendered, and say so")
    add("--overwrite", action="store_true", help="replace tasks that DATA already has")
    add("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Renders everything into a hidden folder, then moves the finished tasks into place."""
    if args.rows_per_prompt is not None and args.rows_per_prompt < 1:
        raise ElmError(f"--rows-per-prompt {args.rows_per_prompt}: must be at least 1")
    output = Path(args.output)
    ignored: dict[str, str] = {}
    tasks = _plan(args, ignored)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output}: exists and is not a folder")
    taken = [task.name for task in tasks if (output / task.name).exists()]
    if taken and not args.overwrite:
        raise FileExistsError(f"{output / taken[0]}: exists; --overwrite replaces it")
    staging = output / f".render-{os.getpid()}"
    staging.mkdir(parents=True)
    try:
        for task in tasks:
            _write(task, staging / task.name, args)
        for task in tasks:
            if (output / task.name).exists():
                os.rename(output / task.name, staging / f".old-{task.name}")
            os.rename(staging / task.name, output / task.name)
    finally:
        shutil.rmtree(staging)
    if args.json:
        summaries = [task.summary() for task in tasks]
        summary = {"output": str(output), "tasks": summaries, "ignored": ignored}
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        print(_table(tasks))
        for note in (note for task in tasks for note in task.notes()):
            print(f"left out: {note}")
        for path, why in ignored.items():
            print(f"ignored: {path} ({why})")
        print(f"wrote {len(tasks)} tasks to {output}")
    return 0


class _Line(NamedTuple):
    path: Path
    number: int
    text: str

    def row(self) -> dict[str, Any]:
        try:
            row = json.loads(self.text)
        except json.JSONDecodeError as error:
            raise ElmError(f"{self.path}:{self.number}: not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise ElmError(f"{self.path}:{self.number}: a row must be a JSON object")
        return row


@dataclass
class _Task:
    name: str
    dataset: str
    prompts: list[Template]
    sources: dict[str, list[Path]]
    written: Counter[tuple[str, str]] = field(default_factory=Counter)  # by split, prompt
    empty: Counter[str] = field(default_factory=Counter)  # by prompt, as all below
    broken: Counter[str] = field(default_factory=Counter)
    first_error: dict[str, str] = field(default_factory=dict)
    unlabelled: int = 0

    def count(self, split: str) -> int:
        return sum(self.written[split, prompt.name] for prompt in self.prompts)

    def notes(self) -> Iterator[str]:
        for name, rows in self.broken.items():
            yield f"{self.name}, {rows} rows: {self.first_error[name]}"
        if self.unlabelled:
            yield f"{self.name}, {self.unlabelled} rows without a label"
        for name in (prompt.name for prompt in self.prompts):
            if name not in self.broken and not any(self.written[s, name] for s in self.sources):
                yield f"{self.name}, prompt {name!r}: no row gives an example"

    def summary(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "dataset": self.dataset,
            "sources": {split: [*map(str, paths)] for split, paths in self.sources.items()},
            "examples": {split: self.count(split) for split in self.sources},
            "prompts": {
                prompt.name: {
                    **{split: self.written[split, prompt.name] for split in self.sources},
                    "empty": self.empty[prompt.name],
                    "broken": self.broken[prompt.name],
                }
                for prompt in self.prompts
            },
            "errors": self.first_error,
            "unlabelled": self.unlabelled,
        }


def _plan(args: argparse.Namespace, ignored: dict[str, str]) -> list[_Task]:
    """Decides what becomes which task, and notes in `ignored` what becomes none."""
    from elm_jax.data.templates import find_dataset, load_templates

    datasets = _raw_datasets(Path(args.rows))
    chosen = _matching(datasets, args.datasets, f"dataset of {args.rows}")
    templates = {}
    for dataset in chosen:
        try:
            templates[dataset] = load_templates(find_dataset(args.templates, dataset))
        except ElmError as error:
            if not args.skip_broken:
                raise
            ignored[str(Path(args.rows) / dataset)] = str(error)
    names = {name for found in templates.values() for name in found}
    wanted = _matching(names, args.prompts, "prompt of the chosen datasets")
    tasks: list[_Task] = []
    for dataset, found in templates.items():
        prompts = [
            template
            for name, template in found.items()
            if name in wanted and (template.metadata.original_task or not args.original_task_only)
        ]
        if not prompts:
            ignored[str(Path(args.rows) / dataset)] = "none of its prompts is asked for"
            continue
        for name, sources in _sources(dataset, datasets[dataset], ignored).items():
            tasks.append(_Task(name, dataset, prompts, sources))
    if not tasks:
        why = "; ".join(f"{path}: {reason}" for path, reason in ignored.items())
        raise ElmError(f"nothing to render: {why}")
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            twice = " and ".join(task.dataset for task in tasks if task.name == name)
            raise ElmError(f"{args.rows}: {twice} would both be the task {name!r}")
    return tasks


def _raw_datasets(root: Path) -> dict[str, dict[str, Path]]:
    """Paths of the row files by dataset name, then by split."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder of rows")
    datasets: dict[str, dict[str, Path]] = {}
    for path in sorted([*root.rglob("*.jsonl"), *root.rglob("*.jsonl.gz")]):
        splits = datasets.setdefault(path.parent.relative_to(root).as_posix(), {})
        other = splits.setdefault(path.name.removesuffix(".gz").removesuffix(".jsonl"), path)
        if other != path:
            raise ElmError(f"{path}: {other.name} beside it holds the same split; keep one")
    if not datasets:
        raise FileNotFoundError(f"{root}: no <dataset>[/<subset>]/<split>.jsonl[.gz] below it")
    if "." in datasets:
        raise ElmError(f"{root}: holds splits itself; name the folder above its dataset")
    return datasets


def _sources(
    dataset: str, files: dict[str, Path], ignored: dict[str, str]
) -> dict[str, dict[str, list[Path]]]:
    """Row files by task name, then by 'train' and 'test'."""
    train: dict[str, list[Path]] = {}
    evaluation: dict[str, dict[str, Path]] = {}
    for split, path in files.items():
        if match := _TRAIN_SPLIT.fullmatch(split):
            train.setdefault(match[1] or "", []).append(path)
        elif match := _EVALUATION_SPLIT.fullmatch(split):
            evaluation.setdefault(match[2] or "", {})[match[1]] = path
        else:
            ignored[str(path)] = "not a train, validation, dev or test split"
    tasks: dict[str, dict[str, list[Path]]] = {}
    for round_ in sorted(train.keys() | evaluation.keys()):
        sources = tasks.setdefault(dataset.replace("/", "-") + round_, {})
        if round_ in train:
            sources["train"] = train[round_]
        for split in ("test", "validation", "dev"):
            if split not in evaluation.get(round_, {}):
                continue
            path = evaluation[round_][split]
            if "test" in sources:
                ignored[str(path)] = f"{sources['test'][0].name} is the test split"
            elif all(_unlabelled(line.row()) for line in _lines(path)):
                ignored[str(path)] = "its labels are hidden, or it is empty"
            else:
                sources["test"] = [path]
        if not sources:
            del tasks[dataset.replace("/", "-") + round_]
    return tasks


def _write(task: _Task, folder: Path, args: argparse.Namespace) -> None:
    folder.mkdir()
    for split in task.sources:
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for example in _examples(task, split, args):
                file.write(json.dumps(example, ensure_ascii=False) + "\n")
        if not task.count(split):
            (folder / f"{split}.jsonl").unlink()
    if not any(folder.iterdir()):
        why = next(iter(task.first_error.values()), "every row renders empty")
        raise ElmError(f"task {task.name}: not one example: {why}")


def _examples(task: _Task, split: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Row by row and prompt by prompt, so that the head of a file holds every prompt."""
    lines = [line for path in task.sources[split] for line in _lines(path)]
    limit = args.rows_per_prompt
    if limit is not None:
        random.Random(f"{args.seed} {task.name} {split}").shuffle(lines)
    open_prompts = task.prompts
    for line in lines:
        if limit is not None:
            open_prompts = [p for p in open_prompts if task.written[split, p.name] < limit]
        if not open_prompts:
            return
        row = line.row()
        if _unlabelled(row):
            task.unlabelled += 1
            continue
        source = line.path.name.removesuffix(".gz").removesuffix(".jsonl")
        for prompt in open_prompts:
            try:
                rendered = prompt.apply(row, seed=args.seed)
            except ElmError as error:
                message = f"{line.path}:{line.number}: {error}"
                if not args.skip_broken:
                    raise ElmError(f"{message}; --skip-broken leaves such rows out") from error
                task.broken[prompt.name] += 1
                task.first_error.setdefault(prompt.name, message)
                continue
            if rendered is None:
                task.empty[prompt.name] += 1
                continue
            task.written[split, prompt.name] += 1
            choices = rendered.answer_choices
            yield {
                "inputs": rendered.inputs,
                "targets": rendered.targets,
                # some rows name a choice twice; ranking needs each once
                "answer_choices": choices and list(dict.fromkeys(choices)),
                "prompt": prompt.name,
                "id": f"{task.name}|{source}|{prompt.name}|#{line.number - 1}",
            }


def _lines(path: Path) -> Iterator[_Line]:
    """The lines that are not blank, with their numbers from 1."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="\n") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield _Line(path, number, text)
    except UnicodeDecodeError as error:
        raise ElmError(f"{path}: not UTF-8 text") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ElmError(f"{path}: truncated or damaged gzip file") from error


def _unlabelled(row: dict[str, Any]) -> bool:
    """Whether the row hides its label, as the hub's test splits do."""
    return "label" in row and row["label"] in (-1, "-1", "", None)


def _matching(names: Collection[str], patterns: list[str] | None, what: str) -> list[str]:
    """The names that fit a pattern, sorted; blanks at the ends do not count."""
    if patterns is None:
        return sorted(names)
    found: set[str] = set()
    for pattern in patterns:
        bare = pattern.strip()
        fits = {n for n in names if n.strip() == bare or fnmatchcase(n.strip(), bare)}
        if not fits:
            raise ElmError(f"{pattern!r} matches no {what}{nearest(pattern, names)}")
        found |= fits
    return sorted(found)


def _table(tasks: list[_Task]) -> str:
    width = max(len("task"), *(len(task.name) for task in tasks))
    lines = [f"{'task':<{width}}  {'prompts':>8}  {'train':>8}  {'test':>8}"]
    for task in tasks:
        prompts, train, test = len(task.prompts), task.count("train"), task.count("test")
        lines.append(f"{task.name:<{width}}  {prompts:>8}  {train:>8}  {test:>8}")
    return "\n".join(lines)
