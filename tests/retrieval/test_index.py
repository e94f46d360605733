"""Exact and approximate search."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from elm_jax.retrieval.index import MaxInnerProductIndex


def clustered(n: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around n/100 centres, each varying in a few directions of its own."""
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(n // 100, 64))
    directions = rng.normal(size=(n // 100, 8, 64))
    owners = rng.integers(n // 100, size=n + queries)
    weights = rng.normal(size=(n + queries, 8)) * 0.4
    vectors = centres[owners] + np.einsum("nr,nrm->nm", weights, directions[owners])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[:n].astype(np.float32), vectors[n:].astype(np.float32)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_exact_search_is_the_sorted_inner_products(k: int) -> None:
    rng = np.random.default_rng(0)
    keys, queries = rng.normal(size=(2, 40, 7)).astype(np.float32)
    ids, scores = MaxInnerProductIndex.build(keys).search(queries, k)
    products = queries.astype(np.float64) @ keys.T.astype(np.float64)
    expected = np.argsort(-products, axis=1)[:, :k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(products, expected, 1), rtol=1e-6)
    assert scores.dtype == np.float32


def test_equal_keys_come_lowest_id_first_whatever_the_batch() -> None:
    rng = np.random.default_rng(1)
    distinct = rng.normal(size=(37, 384)).astype(np.float32)
    keys = np.concatenate([distinct] * 11)
    index = MaxInnerProductIndex.build(keys)
    queries = rng.normal(size=(9, 384)).astype(np.float32)
    ids, scores = index.search(queries, 11)
    np.testing.assert_array_equal(ids, ids[:, :1] + 37 * np.arange(11))
    assert (ids[:, 0] < 37).all()
    assert (scores == scores[:, :1]).all()
    alone = [index.search(query[None], 11) for query in queries]
    np.testing.assert_array_equal(np.concatenate([i for i, _ in alone]), ids)
    np.testing.assert_array_equal(np.concatenate([s for _, s in alone]), scores)


def test_longer_keys_win_over_better_aligned_ones() -> None:
    keys = np.array([[1.0, 0.0], [3.0, 3.0]], np.float32)
    ids, scores = MaxInnerProductIndex.build(keys).search(np.array([[1, 0]], np.float32), 2)
    assert ids.tolist() == [[1, 0]] and scores.tolist() == [[3.0, 1.0]]


def test_scann_is_near_exact_search_and_says_how_near() -> None:
    keys, queries = clustered(5_000, 200)
    exact = MaxInnerProductIndex.build(keys)
    approximate = MaxInnerProductIndex.build(keys, exact_below=2_000)
    assert (exact.kind, approximate.kind) == ("exact", "scann")
    assert dict(exact.recall) == {1: 1.0, 10: 1.0}
    assert dict(approximate.recall)[10] >= 0.98
    (true, true_scores), (found, scores) = (i.search(queries, 10) for i in (exact, approximate))
    # ScaNN draws its partitions anew each time.
    assert (true[:, 0] == found[:, 0]).mean() >= 0.95
    assert np.mean([np.isin(f, t).mean() for f, t in zip(found, true, strict=True)]) >= 0.97
    same = true[:, 0] == found[:, 0]
    np.testing.assert_array_equal(scores[same, 0], true_scores[same, 0])
    assert approximate.leaves[0] < approximate.leaves[1]


def test_scann_searches_more_leaves_where_keys_have_no_clusters() -> None:
    keys = np.random.default_rng(3).normal(size=(1_500, 32)).astype(np.float32)
    index = MaxInnerProductIndex.build(keys, exact_below=0)
    assert index.leaves[0] > index.leaves[1] // 4
    assert dict(index.recall)[10] >= 0.95
    for once, again in zip(index.search(keys[:50], 20), index.search(keys[:50], 20), strict=True):
        np.testing.assert_array_equal(once, again)


def test_scann_returns_k_even_where_the_searched_leaves_hold_fewer() -> None:
    keys, queries = clustered(1_200, 5)
    index = MaxInnerProductIndex.build(keys, exact_below=0, recall_target=0.0)
    assert index.leaves[0] == 1
    ids, scores = index.search(queries, 1_000)
    assert np.isfinite(scores).all()
    assert all(len(set(row)) == 1_000 for row in ids.tolist())


def test_without_scann_search_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.warns(UserWarning, match="no ScaNN: exact search over 1000 keys"):
        index = MaxInnerProductIndex.build(clustered(1_000, 1)[0], exact_below=0)
    assert index.kind == "exact"


def test_what_does_not_fit_is_refused() -> None:
    keys = np.eye(3, dtype=np.float32)
    index = MaxInnerProductIndex.build(keys)
    with pytest.raises(ValueError, match="dimension 2, the keys 3"):
        index.search(np.zeros((1, 2), np.float32), 1)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"1..3 .*got {k}"):
            index.search(keys, k)
    with pytest.raises(ValueError, match="shape"):
        MaxInnerProductIndex.build(keys[0])
    with pytest.raises(ValueError, match="at least one key"):
        MaxInnerProductIndex.build(keys[:0])
    with pytest.raises(ValueError, match="not finite"):
        MaxInnerProductIndex.build(keys * np.nan)
