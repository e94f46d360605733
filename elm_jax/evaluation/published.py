"""The figures that Jang et al. 2023 printed, as data: tables 1 to 7, 9, 10 and rankings 11, 12.

They were measured on a T5 of 3 billion parameters. Kept as printed, in points of 100, slips
included (`SLIPS`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from elm_jax.errors import ElmError, nearest

NUMBERS = ("1", "2", "3", "4", "5", "6", "7", "9", "10", "11", "12")

SLIPS = {
    ("1", "T5(3B) + PE w/ RoE"): 53.263,
    ("9", "all-MiniLM-L6-v2"): 53.263,
    ("10", "Answer Choices: {answer choice}, Instance: {instance}"): 53.263,
    ("9", "all-mpnet-base-v2"): 45.725,
}
"""Rows whose printed average is further from that of their printed cells than rounding explains,
with what the cells average."""


@dataclass(frozen=True)
class PublishedRow:
    """One system in a table; None where nothing is printed."""

    system: str
    cells: Mapping[str, float | None]
    total: float | None


@dataclass(frozen=True)
class PublishedTable:
    """A table as printed, one row a system.

    Attributes:
      number: of the table.
      title: what it shows.
      suite: whose datasets or clusters the columns are; None for Table 6.
      columns: in the printed order.
      rows: in the printed order; Table 2 has its systems in columns.
    """

    number: str
    title: str
    suite: str | None
    columns: tuple[str, ...]
    rows: tuple[PublishedRow, ...]


@dataclass(frozen=True)
class PublishedRank:
    """One expert of a ranking by mean accuracy on the 11 unseen datasets, in points."""

    rank: int
    dataset: str
    prompt: str | None
    mean: float


def published_table(number: str | int) -> PublishedTable:
    """Returns a table of the paper.

    Raises:
      ElmError: it is not kept, with the numbers that are.
    """
    tables = _data()["tables"]
    if str(number) not in tables:
        raise ElmError(
            f"table {number} is not kept{nearest(str(number), tables)}; {', '.join(tables)} are"
        )
    entry = tables[str(number)]
    rows = tuple(
        PublishedRow(system, dict(zip(entry["columns"], cells, strict=True)), total)
        for system, cells, total in entry["rows"]
    )
    return PublishedTable(
        str(number), entry["title"], entry["suite"], tuple(entry["columns"]), rows
    )


def published_ranking(kind: str) -> tuple[PublishedRank, ...]:
    """Returns Table 11 ('datasets', 36 experts) or Table 12 ('prompts', 296), best first."""
    rows = _data()[kind]
    return tuple(PublishedRank(i, *row) for i, row in enumerate(rows, start=1))


@functools.cache
def _data() -> dict:
    path = resources.files("elm_jax.evaluation") / "published.json"
    return json.loads(path.read_text(encoding="utf-8"))
