"""Numbers about experts, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from elm_jax.errors import ElmError
from elm_jax.experts import expert_cosines, expert_statistics
from elm_jax.experts.statistics import ALL

RNG = np.random.default_rng(0)


def lora(rank: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {"q": {"lora_a": draw(7, rank), "lora_b": draw(rank, 5)}}


def by_path(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in rows}


def test_rows_by_hand() -> None:
    tree = {
        "w": np.array([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]], np.float16),
        "b": np.array([-1.0, 2.0, 2.0]),
        "z": np.zeros((2, 2), np.float32),
    }
    rows = expert_statistics({"one": tree}, singular_values=3)
    assert [row["path"] for row in rows] == ["b", "w", "z"]
    w = by_path(rows)["w"]
    p = np.array([4 / 7, 3 / 7])
    assert w == {
        "expert": "one", "path": "w", "shape": "3x2", "dtype": "float16", "size": 6,
        "l2_norm": 5.0, "mean_abs": 7 / 6, "max_abs": 4.0,
        "effective_rank": pytest.approx(math.exp(-(p * np.log(p)).sum())),
        "singular_value_1": pytest.approx(4.0), "singular_value_2": pytest.approx(3.0),
        "singular_value_3": None,
    }  # fmt: skip
    b = by_path(rows)["b"]
    assert (b["l2_norm"], b["mean_abs"], b["max_abs"]) == (3.0, 5 / 3, 2.0)
    assert b["effective_rank"] is None and b["singular_value_1"] is None
    z = by_path(rows)["z"]
    assert z["effective_rank"] == z["singular_value_1"] == z["l2_norm"] == 0.0
    assert {tuple(row) for row in rows} == {tuple(w)}  # the columns of a table


def test_effective_rank_of_known_spectra() -> None:
    """All singular values equal: the rank itself."""
    q, _ = np.linalg.qr(RNG.normal(size=(6, 6)))
    for rank in (1, 3, 6):
        row = expert_statistics({"e": {"w": q[:, :rank] @ q[:rank]}})[0]
        assert row["effective_rank"] == pytest.approx(rank)


def test_without_singular_values() -> None:
    row = expert_statistics({"e": {"w": np.ones((2, 2))}}, singular_values=0)[0]
    assert row["l2_norm"] == 2.0 and "effective_rank" not in row and "singular_value_1" not in row


def test_the_product_of_a_lora() -> None:
    tree = lora(3)
    rows = by_path(expert_statistics({"e": tree}, singular_values=4))
    assert list(rows) == ["q/lora_a", "q/lora_a@lora_b", "q/lora_b"]
    product = tree["q"]["lora_a"].astype(np.float64) @ tree["q"]["lora_b"]
    row = rows["q/lora_a@lora_b"]
    assert (row["shape"], row["size"]) == ("7x5", 35)
    assert row["l2_norm"] == pytest.approx(np.linalg.norm(product))
    assert row["mean_abs"] == pytest.approx(np.abs(product).mean())
    assert row["max_abs"] == pytest.approx(np.abs(product).max())
    values = np.linalg.svd(product, compute_uv=False)
    found = [row[f"singular_value_{i}"] for i in (1, 2, 3)]
    np.testing.assert_allclose(found, values[:3], rtol=1e-10)
    assert row["singular_value_4"] is None  # a rank of 3 has no fourth


def test_a_product_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = expert_statistics({"e": lora(2)})
    monkeypatch.setattr("elm_jax.experts.statistics._BLOCK", 11)
    for a, b in zip(whole, expert_statistics({"e": lora(2)}), strict=True):
        assert a == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in b.items()}


def test_cosines_by_hand() -> None:
    a = {"w": np.array([[1.0, 0.0]]), "b": np.array([3.0, 4.0]), "z": np.zeros(1)}
    b = {"w": np.array([[1.0, 1.0]]), "b": np.array([-3.0, -4.0]), "z": np.ones(1)}
    rows = expert_cosines({"two": b, "one": a})
    assert {(row["expert_a"], row["expert_b"]) for row in rows} == {("one", "two")}
    found = {row["path"]: row["cosine"] for row in rows}
    assert found["z"] is None and found["b"] == pytest.approx(-1.0)
    assert found["w"] == pytest.approx(math.sqrt(0.5))
    assert found[ALL] == pytest.approx((1 - 25) / math.sqrt(26 * (2 + 25 + 1)))


def test_cosines_of_lora_are_those_of_their_products() -> None:
    """Another basis between the factors, or another rank, changes nothing."""
    a, b = lora(2, seed=1), lora(3, seed=2)
    product = lambda t: t["q"]["lora_a"].astype(np.float64) @ t["q"]["lora_b"]  # noqa: E731
    x, y = product(a).ravel(), product(b).ravel()
    wanted = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    found = {row["path"]: row["cosine"] for row in expert_cosines({"a": a, "b": b})}
    assert set(found) == {ALL, "q/lora_a@lora_b"}
    assert found[ALL] == pytest.approx(wanted) and found["q/lora_a@lora_b"] == pytest.approx(wanted)
    turned = np.array([[2.0, 1.0], [0.5, 3.0]])
    same = {"q": {"lora_a": a["q"]["lora_a"] @ turned,
                  "lora_b": np.linalg.inv(turned) @ a["q"]["lora_b"]}}  # fmt: skip
    found = {row["path"]: row["cosine"] for row in expert_cosines({"a": a, "b": same})}
    assert found["q/lora_a@lora_b"] == pytest.approx(1.0) and found["q/lora_a"] < 0.999


def test_every_pair_once_and_partial_overlap() -> None:
    trees = {name: {"w": RNG.normal(size=3)} for name in "cab"}
    trees["d"] = {"w": RNG.normal(size=3), "v": np.ones(2)}
    rows = expert_cosines(trees)
    pairs = [(r["expert_a"], r["expert_b"]) for r in rows if r["path"] == "w"]
    assert pairs == [(x, y) for x in "abcd" for y in "abcd" if x < y]
    whole = {(r["expert_a"], r["expert_b"]) for r in rows if r["path"] == ALL}
    assert whole == {("a", "b"), ("a", "c"), ("b", "c")}  # not of unlike structures


def test_what_has_no_statistics() -> None:
    with pytest.raises(ElmError, match="no expert"):
        expert_statistics({})
    with pytest.raises(ElmError, match="singular_values must be 0 or more, got -1"):
        expert_statistics({"e": {"w": np.ones(2)}}, singular_values=-1)
    with pytest.raises(ElmError, match="two experts or more, got 1"):
        expert_cosines({"e": {"w": np.ones(2)}})
    with pytest.raises(ElmError, match="no two of a, b share an array"):
        expert_cosines({"a": {"w": np.ones(2)}, "b": {"w": np.ones(3)}})
