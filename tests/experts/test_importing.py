"""Experts from outside into a store; files of strangers."""

from __future__ import annotations

import json
import runpy
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_peft import GATED, PLAIN, assert_same_arrays, random_tree

from elm_jax.errors import ElmError
from elm_jax.experts import (
    ExpertInfo,
    ExpertStore,
    expert_shapes,
    export_expert,
    import_expert,
    save_adapters_expert,
    save_peft_expert,
)
from elm_jax.experts.imports import detect_format
from elm_jax.models import AdapterSpec, ExpertSpec, FullSpec, LoraSpec

BACKBONE = {"name": "little", "fingerprint": "sha256:0123"}
LORA = LoraSpec(rank=2, alpha=4)
HOULSBY = AdapterSpec(bottleneck=3, placement="sequential", use_bias=True, inner_residual=True)


def tree_of(spec: ExpertSpec) -> Any:
    return random_tree(expert_shapes(GATED, spec), 1)


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    made = ExpertStore(tmp_path / "store", create=True)
    for name, spec in (("lora", LORA), ("houlsby", HOULSBY), ("full", FullSpec())):
        info = ExpertInfo(name, spec, ("rte", "cb"), ("p",), BACKBONE, {"seed": 3}, {"loss": 0.5})
        made.write(info, tree_of(spec), [{"text": "a"}, {"text": "b\u2028c"}])
    return made


def take(store: ExpertStore, path: Path, name: str = "new", **options: Any) -> ExpertInfo:
    return import_expert(store, path, name, config=GATED, backbone=BACKBONE, **options)


@pytest.mark.parametrize("format", ["peft", "adapters", None])
def test_from_another_library(format: str | None, store: ExpertStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spec: ExpertSpec = HOULSBY if format == "adapters" else LORA
    save: Any = save_adapters_expert if format == "adapters" else save_peft_expert
    save(spec, tree_of(spec), out, base_model="google/t5")
    info = take(store, out, format=format, tasks=["rte"])
    assert info == store.info("new") and not store.leftovers()
    assert (info.spec, info.tasks, info.backbone) == (spec, ("rte",), BACKBONE)
    assert info.settings["imported"] == {
        "format": format or "peft", "path": str(out), "base_model": "google/t5",
    }  # fmt: skip
    assert_same_arrays(store.load("new", backbone=BACKBONE)[1], tree_of(spec))
    with pytest.raises(FileExistsError, match="already exists; experts are never overwritten"):
        take(store, out)


def test_zeros_are_recorded(store: ExpertStore, tmp_path: Path) -> None:
    tree = tree_of(LORA)
    del tree["encoder"]["layers_1"]["attention"]["query"]
    assert len(tree["encoder"]["layers_1"]["attention"]) == 1
    spec = LoraSpec(rank=2, alpha=4, blocks=("encoder",))
    out = save_peft_expert(spec, {"encoder": tree["encoder"]}, tmp_path / "out")
    assert take(store, out).settings["imported"]["projections_without_update"] == "1 of 4"


@pytest.mark.parametrize("format", ["safetensors", "npz", None])
@pytest.mark.parametrize("name", ["lora", "full"])
def test_our_own(format: str | None, name: str, store: ExpertStore, tmp_path: Path) -> None:
    """None is the expert's folder in a store, which has its instances too."""
    folder = store.path / name
    if format is not None:
        folder = export_expert(store, name, tmp_path / "out", format=format)
    there = ExpertStore(tmp_path / "there", create=True)
    info = take(there, folder)
    before = store.info(name)
    assert (info.spec, info.checksum, info.metrics) == (before.spec, before.checksum, {"loss": 0.5})
    assert info.tasks == ("rte", "cb") and info.settings["seed"] == 3
    assert info.settings["imported"] == {"format": "own", "path": str(folder)}
    assert there.instances("new") == (store.instances(name) if format is None else [])
    assert there.verify("new") == []
    assert take(there, folder, "named", tasks=["other"]).tasks == ("other",)


def test_a_loader_of_another_room(store: ExpertStore, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoint_3").mkdir(parents=True)
    assert detect_format(tmp_path / "run") == "t5x"
    with pytest.raises(ElmError, match="'t5x' needs a loader"):
        take(store, tmp_path / "run")
    info = take(store, tmp_path / "run", loader=lambda path, config: (LORA, tree_of(LORA)))
    assert info.settings["imported"]["format"] == "t5x" and info.spec == LORA


def test_an_expert_of_another_backbone(store: ExpertStore, tmp_path: Path) -> None:
    folder = export_expert(store, "lora", tmp_path / "out", format="npz")
    other = {"name": "other", "fingerprint": "sha256:9"}
    with pytest.raises(ElmError, match=r"belongs to backbone 'little' .* not to 'other'"):
        import_expert(store, folder, "new", config=GATED, backbone=other)
    with pytest.raises(ElmError, match=r"npz: unknown array 'encoder/layers_1/.*did you mean"):
        import_expert(
            store, folder, "new", config=PLAIN.replace(num_encoder_layers=1), backbone=BACKBONE
        )
    assert store.ids() == ["full", "houlsby", "lora"] and not store.leftovers()


def test_what_is_no_expert(store: ExpertStore, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ElmError, match=r"holds no expert: expected adapter_config\.json"):
        take(store, empty)
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(ElmError, match="neither 'peft_type'"):
        take(store, empty)
    with pytest.raises(FileNotFoundError, match="no such folder .did you mean 'empty'"):
        take(store, tmp_path / "emty")
    with pytest.raises(ElmError, match="is a file; an expert to import is a folder"):
        take(store, empty / "adapter_config.json")
    with pytest.raises(ElmError, match="unknown format 'pft'.*did you mean 'peft'"):
        take(store, empty, format="pft")
    with pytest.raises(ElmError, match=r"expert id '\.\./x' must be"):
        take(store, empty, "../x")


@pytest.fixture
def npz(store: ExpertStore, tmp_path: Path) -> Path:
    return export_expert(store, "lora", tmp_path / "out", format="npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": {}}, "backbone lacks fingerprint and name"),
        ({"backbone": {"name": 1, "fingerprint": 2}}, "'backbone' is"),
        ({"spec": {"kind": "lora", "rank": 2**30}}, "'rank' is 1073741824, which is out"),
        ({"spec": {"kind": "lora", "alpha": 10**400}}, "'alpha' is 1000"),
        ({"spec": {"kind": "lora", "dropout_rate": False}}, "'dropout_rate' is False"),
        ({"settings": 3}, "settings should be an object, got 3"),
        ({"history": [3]}, r"'history' is \(3,\)"),
        ({"tasks": [3]}, r"'tasks' is \(3,\)"),
        ({"spec": {"kind": "lora", "rank": "2"}}, "lora.rank must be a positive integer"),
        ({"spec": {"kind": "lora", "rank": 3}}, r"has shape \(12, 2\).*expected \(12, 3\)"),
        ({"spec": 3}, "expert.json"),
        ({"checksum": "sha256:0"}, "is not the recorded sha256:0; the expert is damaged"),
    ],
)
def test_a_damaged_expert_json(npz: Path, store: ExpertStore, change: Any, message: str) -> None:
    path = npz / "expert.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ElmError, match=message):
        take(store, npz)


def test_an_npz_that_asks_for_too_much(npz: Path, store: ExpertStore) -> None:
    """The header of a member is believed only when it says what the expert needs."""
    path = npz / "params.npz"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    victim = sorted(members)[0]
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n"
    for data, message in (
        (b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head, r"\(1000000000000,\)"),
        (members[victim][:-7], "truncated or damaged npz file"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            for name, member in members.items():
                archive.writestr(name, data if name == victim else member)
        with pytest.raises(ElmError, match=message):
            take(store, npz)
    np.savez(path, allow_pickle=False, **{"../../x": np.ones(2)})
    with pytest.raises(ElmError, match=r"unknown array '\.\./\.\./x'"):
        take(store, npz)
    path.unlink()
    shutil.copy(npz / "expert.json", npz / "params")  # a file where a folder could be
    with pytest.raises(FileNotFoundError, match=r"params\.npz"):
        take(store, npz)


def test_random_damage() -> None:
    """A short run of `python -m tests.experts.fuzz`."""
    run = runpy.run_path(str(Path(__file__).with_name("fuzz.py")))
    outcomes, _ = run["fuzz"](0, count=200)
    assert sum(outcomes.values()) == 200
    assert outcomes["ElmError"] > 100 and outcomes["FileNotFoundError"] > 0
    assert sum(n for name, n in outcomes.items() if name.startswith("read as")) > 0
