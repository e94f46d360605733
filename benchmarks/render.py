"""Measures how many prompts are rendered per second, and prints JSON.

Every prompt of the chosen datasets of P3, over the same rows, interleaved, on one core:
  ours: templates compiled once, in a sandbox that counts loops (elm_jax.data.templates);
  plain_compiled: Jinja without sandbox, cuts or checks, templates compiled once: about the limit;
  plain: the same, parsed anew for each row;
  promptsource: promptsource's own `Template.apply`, where it is installed.
What ours and promptsource render is compared; a difference is an error.

Example:
  python benchmarks/render.py --rows raw --templates promptsource/templates --datasets cosmos_qa
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from elm_jax.data.p3.sources import read_rows
from elm_jax.data.templates import Template, find_dataset, load_templates
from elm_jax.errors import ElmError

Render = Callable[[Mapping[str, Any]], list[str] | None]


def ours(template: Template) -> Render:
    """Our own rendering: input and target, or None where a row gives none."""

    def render(row: Mapping[str, Any]) -> list[str] | None:
        rendered = template.apply(row)
        return None if rendered is None else [rendered.inputs, rendered.targets[0]]

    return render


def _most_frequent(items: Sequence[Any]) -> list[Any]:
    counts = Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())]


def plain(template: Template, *, compiled: bool) -> Render:
    """Jinja alone, with promptsource's names but none of its cuts."""
    environment = jinja2.Environment(cache_size=0)
    environment.globals["zip"] = zip
    environment.filters |= {
        "choice": random.choice,
        "most_frequent": _most_frequent,
        "to_list": list,
    }
    texts = (template.answer_choices or "", template.jinja)
    made = [environment.from_string(text) for text in texts]

    def render(row: Mapping[str, Any]) -> list[str] | None:
        choices, prompt = made if compiled else [environment.from_string(text) for text in texts]
        listed = [choice.strip() for choice in choices.render(row).split("|||")]
        parts = prompt.render({**row, "answer_choices": listed}).split("|||")
        return [part.strip() for part in parts]

    return render


def promptsource(template: Template) -> Render:
    """promptsource's own rendering."""
    from promptsource.templates import Template as Original

    original = Original(template.name, template.jinja, "", answer_choices=template.answer_choices)

    def render(row: Mapping[str, Any]) -> list[str] | None:
        parts = original.apply(dict(row))
        if len(parts) < 2 or not parts[0].strip():
            return None
        target = parts[1][0] if isinstance(parts[1], list) else parts[1]
        return [parts[0].strip(), target.strip()] if target.strip() else None

    return render


def workload(args: argparse.Namespace) -> list[tuple[Template, list[dict[str, Any]]]]:
    """The prompts and the rows that each of them renders without an error."""
    work = []
    for dataset in args.datasets:
        folder = Path(args.rows) / dataset
        files = sorted(folder.glob("*.jsonl*"))
        if not files:
            sys.exit(f"{folder}: no rows")
        rows = read_rows(files[0])[: args.count]
        for template in load_templates(find_dataset(args.templates, dataset)).values():
            try:
                for row in rows:
                    template.apply(row)
            except ElmError:
                continue
            if "choice" not in template.jinja.replace("answer_choices", ""):  # draws differ
                work.append((template, rows))
    return work


def main() -> None:
    """Parses arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", required=True, help="<dataset>[/<subset>]/<split>.jsonl[.gz]")
    parser.add_argument("--templates", required=True, help="<dataset>[/<subset>]/templates.yaml")
    parser.add_argument("--datasets", nargs="+", default=["cosmos_qa", "social_i_qa", "ag_news"])
    parser.add_argument("--count", type=int, default=200, help="rows per dataset")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    work = workload(args)
    ways: dict[str, Callable[[Template], Render]] = {
        "ours": ours,
        "plain_compiled": lambda template: plain(template, compiled=True),
        "plain": lambda template: plain(template, compiled=False),
    }
    if importlib.util.find_spec("promptsource"):
        ways["promptsource"] = promptsource
    renders = {name: [(way(t), rows) for t, rows in work] for name, way in ways.items()}
    prompts = sum(len(rows) for _, rows in work)
    load = [round(os.getloadavg()[0], 1)]
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(args.repeats + 1):
        for name, calls in renders.items():
            start = time.perf_counter()
            for render, rows in calls:
                for row in rows:
                    render(row)
            if repeat:  # the first warms up
                rates[name].append(prompts / (time.perf_counter() - start))
    different = 0
    if "promptsource" in renders:
        for (mine, rows), (theirs, _) in zip(renders["ours"], renders["promptsource"], strict=True):
            different += sum(mine(row) != theirs(row) for row in rows)
    report = {
        "templates": len(work),
        "prompts": prompts,
        "repeats": args.repeats,
        "load_average": [*load, round(os.getloadavg()[0], 1)],
        "prompts_per_second": {n: round(statistics.median(r)) for n, r in rates.items()},
        "different_from_promptsource": different if "promptsource" in renders else None,
    }
    print(json.dumps(report, indent=2))
    if different:
        sys.exit(f"{different} of {prompts} prompts differ from promptsource's")


if __name__ == "__main__":
    main()
