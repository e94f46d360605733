"""Numbers about the arrays of experts, as plain rows for pandas, DuckDB or a spreadsheet.

    rows = expert_statistics({'imdb': tree}, singular_values=4)     one row per array
    rows = expert_cosines({'imdb': tree, 'rte': other})             one row per array and pair

The factors of a LoRA are determined only up to an invertible matrix between them, so each pair has
a third row, `<projection>/lora_a@lora_b`, for their product: that is what changes the backbone, and
what two LoRA experts, of different ranks even, can be compared by. It is without the factor
alpha / R, which is the same for all arrays of an expert.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from elm_jax.errors import ElmError
from elm_jax.experts.tree import Tree, flatten

ALL = "(all)"
"""The path of the rows about all arrays of an expert together."""
PRODUCT = "lora_a@lora_b"
_BLOCK = 2**22


@dataclasses.dataclass(frozen=True, eq=False)
class _Product:
    """a @ b in float64 without making all of it: a [in, R], b [R, out]."""

    a: np.ndarray
    b: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.a.shape[0], self.b.shape[1]

    def singular_values(self) -> np.ndarray:
        _, left = np.linalg.qr(self.a)
        _, right = np.linalg.qr(self.b.T)
        values: np.ndarray = np.linalg.svd(left @ right.T, compute_uv=False)
        return values

    def blocks(self) -> Iterator[np.ndarray]:
        rows = max(1, _BLOCK // max(1, self.b.shape[1]))
        for start in range(0, self.a.shape[0], rows):
            yield self.a[start : start + rows] @ self.b

    def dot(self, other: _Product) -> float:
        return float(np.sum((self.a.T @ other.a) * (self.b @ other.b.T)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Plain:
    """An array, brought to float64 when it is looked at."""

    leaf: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.leaf.shape)

    @property
    def array(self) -> np.ndarray:
        return np.asarray(self.leaf).astype(np.float64)

    def singular_values(self) -> np.ndarray | None:
        return np.linalg.svd(self.array, compute_uv=False) if len(self.shape) == 2 else None

    def blocks(self) -> Iterator[np.ndarray]:
        yield self.array

    def dot(self, other: _Plain) -> float:
        return float(np.vdot(self.array, other.array))


def expert_statistics(
    experts: Mapping[str, Tree], *, singular_values: int = 8
) -> list[dict[str, Any]]:
    """Describes every array of some experts.

    Args:
      experts: id -> nested dict of arrays (numpy or jax).
      singular_values: how many of the largest to list; 0 leaves out all that needs a
        decomposition, which takes long for the matrices of a large `full` expert.

    Returns:
      One dict per array, sorted by expert and path: expert, path, shape ('16x4'), dtype, size,
      l2_norm, mean_abs, max_abs and, of matrices only (else None), effective_rank and
      singular_value_1, ... The effective rank is exp(H(p)), p the singular values divided by
      their sum (Roy and Vetterli 2007); 0 for a matrix of zeros. Computed in float64.

    Raises:
      ElmError: if there is no expert, or `singular_values` is negative.

    >>> row = expert_statistics({'e': {'w': np.diag([3.0, 4.0])}}, singular_values=1)[0]
    >>> row['l2_norm'], row['singular_value_1'], row['shape']
    (5.0, 4.0, '2x2')
    """
    if not experts:
        raise ElmError("statistics of no expert: name at least one")
    if singular_values < 0:
        raise ElmError(f"singular_values must be 0 or more, got {singular_values}")
    rows = []
    for name in sorted(experts):
        leaves = flatten(experts[name])
        for path, part in _parts(leaves).items():
            leaf = leaves.get(path)
            dtype = str(leaf.dtype) if leaf is not None else "-"
            rows.append(
                {"expert": name, "path": path, "shape": "x".join(map(str, part.shape))}
                | {"dtype": dtype, "size": int(np.prod(part.shape))}
                | _magnitudes(part)
                | _spectrum(part, singular_values)
            )
    return rows


def expert_cosines(experts: Mapping[str, Tree]) -> list[dict[str, Any]]:
    """Compares every two experts, array by array and as a whole.

    Args:
      experts: id -> nested dict of arrays (numpy or jax).

    Returns:
      One dict per pair and shared array: path, expert_a, expert_b, cosine (None where an array is
      zero); a pair that shares none has no row. Pairs of one structure also have a row with path
      '(all)', where LoRA counts by its products and other arrays as they are. Computed in float64.

    Raises:
      ElmError: for less than two experts, or when no two of them share an array.

    >>> a, b = {'w': np.array([1.0, 0.0])}, {'w': np.array([1.0, 1.0])}
    >>> [round(row['cosine'], 4) for row in expert_cosines({'a': a, 'b': b})]
    [0.7071, 0.7071]
    """
    if len(experts) < 2:
        raise ElmError(f"cosines need two experts or more, got {len(experts)}")
    parts = {name: _parts(flatten(experts[name])) for name in sorted(experts)}
    rows = []
    for left, right in itertools.combinations(parts, 2):
        a, b = parts[left], parts[right]
        shared = [path for path in a if path in b and _comparable(a[path], b[path])]
        dots = {path: _dots(a[path], b[path]) for path in shared}
        whole = [path for path in a if not _is_factor(path, a)]
        if all(path in dots for path in whole) and len(whole) == sum(
            not _is_factor(path, b) for path in b
        ):
            total = np.sum([dots[path] for path in whole], axis=0)
            rows.append(_cosine_row(ALL, left, right, *total))
        rows += [_cosine_row(path, left, right, *dots[path]) for path in shared]
    if not rows:
        raise ElmError(f"no two of {', '.join(parts)} share an array that could be compared")
    return rows


def _parts(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns every array, and the product of every pair of LoRA factors, by path."""
    parts: dict[str, Any] = {}
    for path, leaf in leaves.items():
        parts[path] = _Plain(leaf)
        parent, _, name = path.rpartition("/")
        first = parts.get(f"{parent}/lora_a")  # paths are sorted: it comes before lora_b
        if name == "lora_b" and first is not None and first.shape[-1] == leaf.shape[0]:
            parts[f"{parent}/{PRODUCT}"] = _Product(first.array, parts[path].array)
    return dict(sorted(parts.items()))


def _is_factor(path: str, parts: Mapping[str, Any]) -> bool:
    parent, _, name = path.rpartition("/")
    return name in ("lora_a", "lora_b") and f"{parent}/{PRODUCT}" in parts


def _comparable(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a.shape == b.shape


def _dots(a: Any, b: Any) -> tuple[float, float, float]:
    return a.dot(b), a.dot(a), b.dot(b)


def _cosine_row(path: str, left: str, right: str, dot: float, a: float, b: float) -> dict[str, Any]:
    norm = np.sqrt(a) * np.sqrt(b)
    # rounding can push parallel arrays beyond 1
    cosine = float(np.clip(dot / norm, -1.0, 1.0)) if norm > 0 else None
    return {"path": path, "expert_a": left, "expert_b": right, "cosine": cosine}


def _magnitudes(part: Any) -> dict[str, float]:
    squares = total = largest = 0.0
    size = 0
    for block in part.blocks():
        absolute = np.abs(block)
        squares += float(np.vdot(block, block))
        total += float(absolute.sum())
        largest = max(largest, float(absolute.max(initial=0.0)))
        size += block.size
    return {
        "l2_norm": float(np.sqrt(squares)),
        "mean_abs": total / size if size else 0.0,
        "max_abs": largest,
    }


def _spectrum(part: Any, count: int) -> dict[str, float | None]:
    columns: dict[str, float | None] = dict.fromkeys(
        ["effective_rank", *(f"singular_value_{i + 1}" for i in range(count))]
    )
    if count == 0:
        return {}
    values = part.singular_values()
    if values is None:
        return columns
    total = values.sum()
    p = values[values > 0] / total if total > 0 else values[:0]
    columns["effective_rank"] = float(np.exp(-np.sum(p * np.log(p)))) if p.size else 0.0
    for i, value in enumerate(values[:count]):
        columns[f"singular_value_{i + 1}"] = float(value)
    return columns
