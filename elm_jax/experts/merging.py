"""Merging experts: task arithmetic, theta_pre + sum_i lambda_i tau_i (Jang et al. 2023, eq. 4).

A `full` expert is its task vector, so merging is a weighted sum for every kind alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.errors import ElmError
from elm_jax.experts.store import ExpertInfo, ExpertStore, check_checksum, check_id
from elm_jax.experts.tree import Checksum, Tree, check_shapes, flatten, unflatten
from elm_jax.models import spec_to_json


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Returns one finite weight per expert; uniform (1 / N) when none are given.

    >>> check_weights(None, 4)
    (0.25, 0.25, 0.25, 0.25)
    """
    if weights is None:
        return (1.0 / count,) * count
    if len(weights) != count:
        raise ElmError(f"{len(weights)} weights were given for {count} experts")
    if not all(math.isfinite(w) for w in weights):
        raise ElmError(f"weights must be finite numbers, got {list(weights)}")
    return tuple(float(w) for w in weights)


def merge_trees(trees: Sequence[Tree], weights: Sequence[float] | None = None) -> Tree:
    """Returns sum_i weights_i * trees_i, summed in float32 and kept in the first tree's dtypes.

    Raises:
      ElmError: if the trees differ in paths or shapes, or the weights in number.

    >>> merge_trees([{'w': np.ones(1)}, {'w': np.full(1, 3.0)}])['w'].tolist()
    [2.0]
    """
    if not trees:
        raise ElmError("nothing to merge: no experts were given")
    lambdas = check_weights(weights, len(trees))
    for i, tree in enumerate(trees[1:], start=1):
        check_shapes(f"expert {i}", tree, trees[0])
    flats = [flatten(tree) for tree in trees]
    return unflatten({path: _weighted_sum([f[path] for f in flats], lambdas) for path in flats[0]})


def _weighted_sum(arrays: Sequence[Any], weights: Sequence[float]) -> np.ndarray:
    first = np.asarray(arrays[0])
    total = np.zeros(first.shape, np.float32)
    for array, weight in zip(arrays, weights, strict=True):
        total += np.float32(weight) * np.asarray(array, dtype=np.float32)
    return total.astype(first.dtype)


def merge(
    store: ExpertStore,
    ids: Sequence[str],
    *,
    output_id: str,
    weights: Sequence[float] | None = None,
    settings: dict[str, Any] | None = None,
) -> ExpertInfo:
    """Merges experts of a store into a new one.

    One array is read at a time and the result goes to a memory-mapped file, so the memory needed
    is a few times the largest array, however many experts there are.

    Args:
      store: holds the experts and takes the result.
      ids: two experts or more, of one spec and one backbone.
      output_id: id of the result.
      weights: lambda_i; uniform (1 / N) by default.
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
    lambdas = check_weights(weights, len(ids))
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
            total = np.zeros(shapes[ids[0]][path].shape, np.float32)
            for name, weight in zip(ids, lambdas, strict=True):
                array = flatten(store.params(name, [path]))[path]
                checksums[name].add(path, array)
                total += np.float32(weight) * array.astype(np.float32)
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
            settings=settings or {},
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
