"""Experts as plain files."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from elm_jax.errors import ElmError
from elm_jax.experts import (
    ExpertInfo,
    ExpertStore,
    checksum,
    expert_cosines,
    expert_statistics,
    export_expert,
    unflatten,
)
from elm_jax.experts.export import write_table
from elm_jax.models import get_spec

TREE = {"encoder": {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T}, "b": np.ones(4)}
BACKBONE = {"name": "tiny", "fingerprint": "sha256:0"}


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    made = ExpertStore(tmp_path / "store", create=True)
    made.write(ExpertInfo("rte", get_spec("lora"), ("rte",), ("p",), BACKBONE), TREE)
    return made


@pytest.mark.parametrize("format", ["safetensors", "npz"])
def test_round_trip(store: ExpertStore, tmp_path: Path, format: str) -> None:
    folder = export_expert(store, "rte", tmp_path / "deep/out", format=format)
    assert sorted(os.listdir(folder)) == ["expert.json", f"params.{format}"]
    assert os.listdir(folder.parent) == ["out"]
    file = folder / f"params.{format}"
    arrays = load_file(file) if format == "safetensors" else dict(np.load(file, allow_pickle=False))
    assert set(arrays) == {"b", "encoder/w"}
    np.testing.assert_array_equal(arrays["encoder/w"], TREE["encoder"]["w"])
    info = store.info("rte")
    assert checksum(unflatten(arrays)) == info.checksum
    assert json.loads((folder / "expert.json").read_text()) == info.to_json()
    if format == "safetensors":
        with safe_open(file, "numpy") as opened:
            assert opened.metadata()["checksum"] == info.checksum


def test_empty_folder_is_taken_a_full_one_refused(store: ExpertStore, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_expert(store, "rte", tmp_path / "out", format="npz")
    before = sorted(os.listdir(tmp_path / "out"))
    for target in (tmp_path / "out", tmp_path / "out/params.npz"):
        with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
            export_expert(store, "rte", target, format="npz")
    assert sorted(os.listdir(tmp_path / "out")) == before


def test_what_cannot_be_exported(store: ExpertStore, tmp_path: Path) -> None:
    with pytest.raises(ElmError, match="unknown format 'safetensor'.*did you mean 'safetensors'"):
        export_expert(store, "rte", tmp_path / "out", format="safetensor")
    with pytest.raises(ElmError, match="did you mean 'rte'"):
        export_expert(store, "rt", tmp_path / "out", format="npz")
    path = store.path / "rte/expert.json"
    path.write_text(path.read_text().replace("sha256:", "sha256:0"))
    with pytest.raises(ElmError, match="the expert is damaged"):
        export_expert(store, "rte", tmp_path / "out", format="npz")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- tables


def two(store: ExpertStore) -> dict:
    tree = {"encoder": {"w": TREE["encoder"]["w"][::-1]}, "b": np.arange(4.0)}
    store.write(ExpertInfo("imdb", get_spec("lora"), ("imdb",), ("p",), BACKBONE), tree)
    return {"rte": TREE, "imdb": tree}


def test_csv_tables(store: ExpertStore, tmp_path: Path) -> None:
    trees = two(store)
    folder = export_expert(store, ["rte", "imdb"], tmp_path / "out", format="csv")
    assert sorted(os.listdir(folder)) == ["cosines.csv", "statistics.csv"]
    for file, rows in (
        ("statistics", expert_statistics(trees)),
        ("cosines", expert_cosines(trees)),
    ):
        with (folder / f"{file}.csv").open(newline="") as opened:
            found = list(csv.DictReader(opened))
        wanted = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
        assert found == wanted and "\r" not in (folder / f"{file}.csv").read_text()
    one = export_expert(store, "rte", tmp_path / "one", format="csv")
    assert os.listdir(one) == ["statistics.csv"]
    assert len((one / "statistics.csv").read_text().splitlines()) == 3


def test_parquet_tables(store: ExpertStore, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    trees = two(store)
    folder = export_expert(store, ["rte", "imdb"], tmp_path / "out", format="parquet")
    assert parquet.read_table(folder / "statistics.parquet").to_pylist() == expert_statistics(trees)
    assert parquet.read_table(folder / "cosines.parquet").to_pylist() == expert_cosines(trees)


def test_what_gives_no_table(
    store: ExpertStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ElmError, match="named twice: rte, rte"):
        export_expert(store, ["rte", "rte"], out, format="csv")
    with pytest.raises(ElmError, match="format 'npz' is for one expert, got 0 ids"):
        export_expert(store, [], out, format="npz")
    with pytest.raises(ElmError, match="statistics of no expert"):
        export_expert(store, [], out, format="csv")
    with pytest.raises(ElmError, match=r"\.txt: a table is \.csv or \.parquet"):
        write_table(tmp_path / "table.txt", [{"a": 1}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ElmError, match="needs pyarrow: pip install pyarrow, or choose 'csv'"):
        export_expert(store, "rte", out, format="parquet")
    assert not out.exists()
