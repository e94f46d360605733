"""Merging experts: task arithmetic, theta_pre + sum_i lambda_i tau_i (Jang et al. 2023, eq. 4).

A `full` expert is its task vector, so merging is a weighted sum for every kind alike. TIES and DARE
thin the experts out first; each works on one array at a time, so nothing larger is ever held.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.errors import ElmError, nearest
from elm_jax.experts.store import ExpertInfo, ExpertStore, check_checksum, check_id
from elm_jax.experts.tree import Checksum, Tree, check_shapes, flatten, unflatten
from elm_jax.models import spec_to_json

METHODS = ("task_arithmetic", "ties", "dare", "dare_ties")
SIGNS = ("total", "frequency")


@dataclasses.dataclass(frozen=True)
class MergeSpec:
    """How experts are merged, with weights w_i.

    'task_arithmetic': sum_i w_i tau_i. 'ties': of each array the entries largest in magnitude are
    kept, a sign is elected for each entry, and the mean of w_i tau_i is taken over the experts that
    kept the entry with that sign (Yadav et al. 2023, section 3). 'dare': entries are dropped at
    random and the rest divided by the density, then summed (Yu et al. 2024, section 3).
    'dare_ties': dropped as in DARE, merged as in TIES. On LoRA they act on each factor by itself,
    as PEFT's do.

    Attributes:
      method: one of `METHODS`.
      density: share of the entries of each array that is kept, in (0, 1]; by default all for task
        arithmetic, 0.2 for TIES and 0.1 for DARE, as in their papers.
      sign: 'total' elects the sign of the sum, 'frequency' that of most experts; 0 counts as +.
      seed: of DARE's draws; a draw depends on it, the expert's name and the array's path alone.
    """

    method: str = "task_arithmetic"
    density: float | None = None
    sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        for field, accepted in (("method", METHODS), ("sign", SIGNS)):
            value = getattr(self, field)
            if value not in accepted:
                raise ElmError(
                    f"merge {field} {value!r} is unknown{nearest(str(value), accepted)}; "
                    f"accepted: {', '.join(accepted)}"
                )
        default = {"task_arithmetic": 1.0, "ties": 0.2}.get(self.method, 0.1)
        density = default if self.density is None else float(self.density)
        object.__setattr__(self, "density", density)
        if not 0 < density <= 1:
            raise ElmError(f"merge density must be in (0, 1], got {self.density!r}")
        if self.method == "task_arithmetic" and density != 1:
            raise ElmError(
                f"task_arithmetic keeps every entry; density {density} needs {METHODS[1:]}"
            )

    @property
    def elects(self) -> bool:
        """Whether a sign is elected, and a mean taken in place of a sum."""
        return self.method in ("ties", "dare_ties")


def check_weights(
    weights: Sequence[float] | None, count: int, spec: MergeSpec | None = None
) -> tuple[float, ...]:
    """Returns one finite weight per expert.

    Where none are given they are 1 / N, or 1 for the methods that take a mean themselves.

    >>> check_weights(None, 4), check_weights(None, 2, MergeSpec('ties'))
    ((0.25, 0.25, 0.25, 0.25), (1.0, 1.0))
    """
    if weights is None:
        return (1.0 if spec is not None and spec.elects else 1.0 / count,) * count
    if len(weights) != count:
        raise ElmError(f"{len(weights)} weights were given for {count} experts")
    if not all(math.isfinite(w) for w in weights):
        raise ElmError(f"weights must be finite numbers, got {list(weights)}")
    return tuple(float(w) for w in weights)


def merge_trees(
    trees: Sequence[Tree],
    weights: Sequence[float] | None = None,
    spec: MergeSpec | None = None,
    names: Sequence[str] | None = None,
) -> Tree:
    """Merges trees of arrays, in float32; the result has the first tree's dtypes.

    Args:
      trees: one or more, of equal paths and shapes.
      weights: w_i; see `check_weights`.
      spec: the method; task arithmetic by default.
      names: of the experts, which DARE's draws depend on; '0', '1', ... by default.

    Raises:
      ElmError: if the trees differ in paths or shapes, or the weights in number.

    >>> merge_trees([{'w': np.ones(1)}, {'w': np.full(1, 3.0)}])['w'].tolist()
    [2.0]
    """
    if not trees:
        raise ElmError("nothing to merge: no experts were given")
    spec = spec or MergeSpec()
    lambdas = check_weights(weights, len(trees), spec)
    labels = [str(i) for i in range(len(trees))] if names is None else list(names)
    for i, tree in enumerate(trees[1:], start=1):
        check_shapes(f"expert {i}", tree, trees[0])
    flats = [flatten(tree) for tree in trees]
    merged = {}
    for path, first in flats[0].items():
        total = _combine(
            lambda i, path=path: np.asarray(flats[i][path]),  # type: ignore[misc]
            labels,
            path,
            lambdas,
            spec,
        )
        merged[path] = total.astype(np.asarray(first).dtype)
    return unflatten(merged)


def thin(array: np.ndarray, spec: MergeSpec, name: str, path: str) -> np.ndarray:
    """Sets the entries to zero that `spec` does not keep of one expert's array.

    Args:
      array: float32, any shape.
      spec: by magnitude (TIES: the int(density * n) largest), or at random (DARE), rescaled.
      name: the expert's.
      path: the array's.

    Returns:
      float32 of the same shape.
    """
    density = float(spec.density or 1.0)
    if density == 1:
        return array
    if spec.method == "ties":
        kept = int(density * array.size)
        mask = np.zeros(array.size, bool)
        if kept:
            mask[np.argpartition(np.abs(array).ravel(), -kept)[-kept:]] = True
        return np.where(mask.reshape(array.shape), array, np.float32(0))
    draws = np.random.default_rng([spec.seed, zlib.crc32(name.encode()), zlib.crc32(path.encode())])
    mask = draws.random(array.shape, np.float32) < density
    return np.where(mask, array / np.float32(density), np.float32(0))


def _combine(
    read: Callable[[int], np.ndarray],
    names: Sequence[str],
    path: str,
    weights: Sequence[float],
    spec: MergeSpec,
) -> np.ndarray:
    """Merges one array of all experts, of which few are held at a time; float32.

    Args:
      read: reads the array of the i-th expert; called twice where a sign is elected.
      names: of the experts.
      path: of the array.
      weights: w_i.
      spec: the method.
    """

    def thinned(i: int) -> np.ndarray:
        return thin(np.asarray(read(i), np.float32), spec, names[i], path)

    total = np.zeros(np.shape(read(0)), np.float32)
    if not spec.elects:
        for i, weight in enumerate(weights):
            total += np.float32(weight) * thinned(i)
        return total
    ballot = np.zeros_like(total)
    for i in range(len(names)):
        ballot += thinned(i) if spec.sign == "total" else np.sign(thinned(i))
    elected = np.where(ballot >= 0, np.float32(1), np.float32(-1))
    count = np.zeros_like(total)
    for i, weight in enumerate(weights):
        array = thinned(i)
        agrees = np.sign(array) == elected
        total += np.where(agrees, np.float32(weight) * array, np.float32(0))
        count += agrees
    return total / np.maximum(count, np.float32(1))


def merge(
    store: ExpertStore,
    ids: Sequence[str],
    *,
    output_id: str,
    weights: Sequence[float] | None = None,
    spec: MergeSpec | None = None,
    settings: dict[str, Any] | None = None,
) -> ExpertInfo:
    """Merges experts of a store into a new one.

    One array is read at a time and the result goes to a memory-mapped file, so the memory needed
    is a few times the largest array, however many experts there are.

    Args:
      store: holds the experts and takes the result.
      ids: two experts or more, of one spec and one backbone.
      output_id: id of the result.
      weights: lambda_i; uniform by default, see `check_weights`.
      spec: the method; task arithmetic by default.
      settings: further facts to record, such as how the weights were found.

    Returns:
      The info of the merged expert.

    Raises:
      ElmError: for fewer than two experts, unknown ids, damaged experts, or experts that do not
        fit together.
      FileExistsError: if `output_id` is taken.
    """
    if len(ids) < 2 or len(set(ids)) != len(ids):
        raise ElmError(f"merging needs at least two different experts, got {list(ids)}")
    check_id(output_id)
    spec = spec or MergeSpec()
    lambdas = check_weights(weights, len(ids), spec)
    if output_id in store:
        raise FileExistsError(f"{store.path / output_id} already exists")
    infos = [store.info(name) for name in ids]
    first = infos[0]
    for info in infos[1:]:
        if info.spec != first.spec:
            raise ElmError(
                f"experts {first.id!r} and {info.id!r} cannot be merged: their specs differ "
                f"({spec_to_json(first.spec)} and {spec_to_json(info.spec)})"
            )
        if info.backbone["fingerprint"] != first.backbone["fingerprint"]:
            raise ElmError(
                f"experts {first.id!r} and {info.id!r} cannot be merged: they belong to the "
                f"backbones {first.backbone['name']!r} and {info.backbone['name']!r}"
            )
    shapes = {name: flatten(store.shapes(name)) for name in ids}
    for name in ids[1:]:
        check_shapes(f"expert {name!r}", unflatten(shapes[name]), unflatten(shapes[ids[0]]))
    with tempfile.TemporaryDirectory(prefix="elm_jax_merge_") as folder:
        merged: dict[str, np.ndarray] = {}
        checksums = {name: Checksum() for name in ids}
        for i, path in enumerate(shapes[ids[0]]):
            seen: set[int] = set()

            def read(j: int, path: str = path, seen: set[int] = seen) -> np.ndarray:
                array: np.ndarray = flatten(store.params(ids[j], [path]))[path]
                if j not in seen:
                    seen.add(j)
                    checksums[ids[j]].add(path, array)
                return array

            total = _combine(read, ids, path, lambdas, spec)
            file = Path(folder) / f"{i}.npy"
            np.save(file, total.astype(shapes[ids[0]][path].dtype))
            merged[path] = np.load(file, mmap_mode="r", allow_pickle=False)
        for one in infos:
            check_checksum(one, str(checksums[one.id]), store.path / one.id)
        info = ExpertInfo(
            id=output_id,
            spec=first.spec,
            tasks=tuple(dict.fromkeys(t for i in infos for t in i.tasks)),
            prompts=tuple(dict.fromkeys(p for i in infos for p in i.prompts)),
            backbone=first.backbone,
            settings={**(settings or {}), "merge": dataclasses.asdict(spec)},
            merged_from=[
                {"id": i.id, "weight": w, "checksum": i.checksum}
                for i, w in zip(infos, lambdas, strict=True)
            ],
        )
        instances = [row for name in ids for row in store.instances(name)]
        return store.write(info, unflatten(merged), instances)


@dataclasses.dataclass(frozen=True)
class WeightSearch:
    """The outcome of `search_weights`.

    Attributes:
      weights: the best lambdas found.
      score: their score.
      tried: every (weights, score) in the order tried.
    """

    weights: tuple[float, ...]
    score: float
    tried: tuple[tuple[tuple[float, ...], float], ...]


def search_weights(
    score: Callable[[tuple[float, ...]], float],
    count: int,
    *,
    totals: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    rounds: int = 2,
    step: float = 0.25,
) -> WeightSearch:
    """Searches lambdas that score best on held-out examples.

    First each expert alone and all uniformly, at each total of the lambdas; then coordinate ascent
    from the best, with a step that halves every round. Deterministic; the first of equals wins.

    Args:
      score: the score of a tuple of lambdas; higher is better.
      count: number of experts.
      totals: sums of the lambdas to try; the paper's merges use 1 and, for composition, 2.
      rounds: rounds of coordinate ascent.
      step: first step of the ascent.
    """
    tried: dict[tuple[float, ...], float] = {}

    def attempt(weights: tuple[float, ...]) -> float:
        key = tuple(round(w, 6) for w in weights)
        if key not in tried:
            tried[key] = float(score(key))
        return tried[key]

    for total in totals:
        attempt((total / count,) * count)
    for i in range(count):
        attempt(tuple(1.0 if j == i else 0.0 for j in range(count)))
    best = max(tried, key=lambda w: tried[w])
    for _ in range(rounds):
        improved = True
        while improved:
            improved = False
            for i, sign in itertools.product(range(count), (1.0, -1.0)):
                candidate = tuple(w + sign * step if j == i else w for j, w in enumerate(best))
                if attempt(candidate) > tried[best]:
                    best, improved = tuple(round(w, 6) for w in candidate), True
        step /= 2
    return WeightSearch(best, tried[best], tuple(tried.items()))
