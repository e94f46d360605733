"""Reads compiled programs: which collectives XLA put in, how large, and what products it computes.

Each instruction of the text counts once, also where a loop runs it many times.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
Shape = tuple[int, ...]
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", re.MULTILINE)
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
      kind: one of `COLLECTIVES`.
      shapes: of its results on one device.
      bytes: of its results on one device.
    """

    kind: str
    shapes: tuple[Shape, ...]
    bytes: int


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program's text (`compiled.as_text()`).

    >>> collectives('%a.1 = f32[8,4]{1,0} all-gather(f32[1,4]{1,0} %x), dimensions={0}')
    [Collective(kind='all-gather', shapes=((8, 4),), bytes=128)]
    """
    found = []
    for result, name in _instructions(text):
        kind = name.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        arrays = list(_arrays(result))
        if name.endswith("-start") and len(arrays) > 1:
            arrays = arrays[len(arrays) // 2 :]  # operands come before results
        shapes = tuple(shape for _, shape in arrays)
        found.append(Collective(kind, shapes, sum(_bytes(*array) for array in arrays)))
    return found


def count_collectives(text: str) -> Mapping[str, Mapping[str, int]]:
    """Returns how many collectives of each kind there are, and their bytes on one device."""
    table: dict[str, dict[str, int]] = {}
    for one in collectives(text):
        row = table.setdefault(one.kind, {"count": 0, "bytes": 0})
        row["count"] += 1
        row["bytes"] += one.bytes
    return table


def products(text: str) -> list[Shape]:
    """Returns the shapes of what a compiled program's matrix products give.

    >>> products('ROOT %d = f32[2,3]{1,0} dot(f32[2,4]{1,0} %a, f32[4,3]{1,0} %b)')
    [(2, 3)]
    """
    return [
        shape for result, name in _instructions(text) if name == "dot"
        for _, shape in _arrays(result)
    ]  # fmt: skip


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    for found in _INSTRUCTION.finditer(text):
        yield found[1], found[2]


def _arrays(result: str) -> Iterator[tuple[str, Shape]]:
    for dtype, dims in _ARRAY.findall(result):
        yield dtype, tuple(int(size) for size in dims.split(",") if size)


def _bytes(dtype: str, shape: Shape) -> int:
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or (int(digits[0]) if digits else 32)
    return math.prod(shape) * bits // 8
