"""Maximum inner product search over keys: exact where that is quick, ScaNN above."""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from elm_jax.retrieval.embedder import FloatArray

IntArray = npt.NDArray[np.int64]

EXACT_BELOW = 100_000
"""By `benchmarks/index.py` on two CPU cores: 32 queries take 280 ms and more to embed, and 5 ms to
search exactly among 30,000 keys (the paper's 296 experts), 25 to 60 ms among 100,000. There ScaNN
needs 10 ms, but 15 s to build: only above does it begin to pay."""

_FEWEST_FOR_SCANN = 1_000  # below, its k-means has too little to train on
_RECALL_SAMPLE = 256
_BLOCK = 1 << 25  # scores held at once


@dataclass(frozen=True, eq=False)
class MaxInnerProductIndex:
    """Finds the keys with the highest inner product with a query.

    Candidates are found fast (by BLAS, or by ScaNN's tree and asymmetric hashing), then scored
    again in float64, one by one: equal keys get equal scores wherever they stand and whatever else
    is searched with them, and among equal scores the lowest id comes first. So exact search repeats
    to the bit. ScaNN's training does not: two builds may differ in the few keys that they miss, and
    in which of more than a hundred equal keys they find.
    """

    keys: FloatArray
    """[n, M]"""
    recall: tuple[tuple[int, float], ...] = ((1, 1.0), (10, 1.0))
    """(k, share of the k best that are found), measured at build; 1 where search is exact."""
    leaves: tuple[int, int] = (0, 0)
    """ScaNN's leaves: searched, and in all."""
    searcher: Any = None

    @classmethod
    def build(
        cls, keys: FloatArray, *, exact_below: int = EXACT_BELOW, recall_target: float = 0.99
    ) -> MaxInnerProductIndex:
        """Indexes keys.

        Args:
          keys: float32 [n, M], finite, not necessarily of unit length.
          exact_below: with fewer keys than this, search is exact; never below 1,000 keys is it not.
          recall_target: ScaNN searches as many leaves as it takes to find this share of the 10 best
            keys. Measured by searching for the neighbours of 256 of the keys, against exact search.

        Raises:
          ValueError: if keys are no finite matrix with rows.
        """
        keys = _matrix(keys, "keys")
        if not len(keys):
            raise ValueError("an index needs at least one key")
        exact = cls(keys)
        if len(keys) < max(exact_below, _FEWEST_FOR_SCANN):
            return exact
        leaves = round(len(keys) ** 0.5)
        try:
            searcher = _scann(keys, leaves)
        except ImportError:
            warnings.warn(f"no ScaNN: exact search over {len(keys)} keys", stacklevel=2)
            return exact
        index = replace(exact, searcher=searcher, leaves=(max(leaves // 20, 1), leaves))
        sample = np.random.default_rng(0).choice(
            len(keys), min(_RECALL_SAMPLE, len(keys)), replace=False
        )
        while True:
            index = replace(index, recall=_recall(index, exact, sample))
            searched = index.leaves[0]
            if dict(index.recall)[10] >= recall_target or searched == leaves:
                return index
            index = replace(index, leaves=(min(2 * searched, leaves), leaves))

    @property
    def kind(self) -> str:
        """'exact' or 'scann'."""
        return "exact" if self.searcher is None else "scann"

    @functools.cached_property
    def _longest(self) -> float:
        return float(np.sqrt(np.einsum("nm,nm->n", self.keys, self.keys).max()))

    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """Finds the k best keys of each query.

        Args:
          queries: float32 [Q, M].
          k: how many keys; 1 to n.

        Returns:
          Their ids [Q, k] and inner products [Q, k], best first, lowest id first among equals.

        Raises:
          ValueError: if k or the queries' shape do not fit the keys.
        """
        queries = _matrix(queries, "queries")
        if queries.shape[1] != self.keys.shape[1]:
            raise ValueError(
                f"queries have dimension {queries.shape[1]}, the keys {self.keys.shape[1]}"
            )
        if not 1 <= k <= len(self.keys):
            raise ValueError(f"k must lie in 1..{len(self.keys)} (the number of keys), got {k}")
        ids = np.empty((len(queries), k), np.int64)
        scores = np.empty((len(queries), k), np.float32)
        step = max(1, _BLOCK // len(self.keys))
        for start in range(0, len(queries), step):
            block = queries[start : start + step]
            candidates = self._approximate if self.searcher else self._exact
            for row, (query, found) in enumerate(
                zip(block, candidates(block, k), strict=True), start
            ):
                ids[row], scores[row] = self._rank(query, found, k)
        return ids, scores

    def _exact(self, queries: FloatArray, k: int) -> list[IntArray]:
        """The k best by float32 score, and all within rounding of the k-th."""
        scores = queries @ self.keys.T
        kth = scores.max(1) if k == 1 else np.partition(scores, -k, axis=1)[:, -k]
        bounds = kth - 1e-5 * self._longest * np.linalg.norm(queries, axis=1)
        return [np.flatnonzero(row >= bound) for row, bound in zip(scores, bounds, strict=True)]

    def _approximate(self, queries: FloatArray, k: int) -> list[IntArray]:
        wanted = min(max(2 * k, 100), len(self.keys))
        found, scores = self.searcher.search_batched(
            queries,
            final_num_neighbors=wanted,
            pre_reorder_num_neighbors=2 * wanted,
            leaves_to_search=self.leaves[0],
        )
        # A few small leaves may hold fewer than k keys; ScaNN pads such rows with NaN.
        return [
            row[valid].astype(np.int64) if valid.sum() >= k else self._exact(query[None], k)[0]
            for query, row, valid in zip(queries, found, np.isfinite(scores), strict=True)
        ]

    def _rank(self, query: FloatArray, candidates: IntArray, k: int) -> tuple[IntArray, FloatArray]:
        scores = (self.keys[candidates].astype(np.float64) * query).sum(axis=1)
        order = np.lexsort((candidates, -scores))[:k]
        return candidates[order], scores[order].astype(np.float32)


def _recall(
    index: MaxInnerProductIndex, exact: MaxInnerProductIndex, sample: IntArray
) -> tuple[tuple[int, float], ...]:
    """Share of the best neighbours of sampled keys (each without itself) that `index` finds."""
    queries = exact.keys[sample]
    true, found = (_without(i.search(queries, 11), sample) for i in (exact, index))
    # By score and not by id, so that one of several equal neighbours is as good as another.
    return tuple((k, float((found[:, :k] >= true[:, k - 1 : k] - 1e-6).mean())) for k in (1, 10))


def _without(found: tuple[IntArray, FloatArray], sample: IntArray) -> FloatArray:
    ids, scores = found
    kept = ids != sample[:, None]
    kept[kept.all(axis=1), -1] = False  # hidden behind eleven equals, or not found
    return scores[kept].reshape(len(sample), -1)


def _scann(keys: FloatArray, leaves: int) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # ScaNN imports TensorFlow if it can
    import scann

    builder = scann.scann_ops_pybind.builder(keys, 10, "dot_product")
    tree = builder.tree(
        num_leaves=leaves,
        num_leaves_to_search=leaves,
        training_sample_size=min(len(keys), 100_000),
    )
    return tree.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build()


def _matrix(array: FloatArray, what: str) -> FloatArray:
    matrix = np.ascontiguousarray(array, np.float32)
    if matrix.ndim != 2:
        raise ValueError(f"{what} must be a matrix [rows, dimension], got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{what} hold values that are not finite")
    return matrix
