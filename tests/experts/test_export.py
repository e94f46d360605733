"""Experts as plain files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from elm_jax.errors import ElmError
from elm_jax.experts import ExpertInfo, ExpertStore, checksum, export_expert, unflatten
from elm_jax.models import get_spec

TREE = {"encoder": {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T}, "b": np.ones(4)}


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    made = ExpertStore(tmp_path / "store", create=True)
    made.write(ExpertInfo("rte", get_spec("lora"), ("rte",), ("p",), {"name": "tiny"}), TREE)
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
