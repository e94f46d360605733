"""The expert store: whole experts or none, damage named, and no expert that touches another."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from elm_jax.errors import ElmError
from elm_jax.experts import ExpertInfo, ExpertStore, check_backbone, expert_id, flatten
from elm_jax.models import get_spec

BACKBONE = {"name": "tiny", "fingerprint": "sha256:" + "a" * 64}
TREE = {
    "encoder": {"layers_0": {"mlp_adapter": {"down_kernel": np.arange(600, dtype=np.float32)}}},
    "decoder": {"norm": {"scale_delta": np.linspace(0, 1, 7, dtype=np.float32)}},
}
INSTANCES = [{"inputs": "two\u2028lines\nof \x85text", "targets": ["é"], "answer_choices": None}]


def info(name: str, **changes: object) -> ExpertInfo:
    fields = {"spec": get_spec("adapter"), "tasks": (name,), "prompts": ("p",)}
    return ExpertInfo(id=name, backbone=BACKBONE, **fields | changes)


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    made = ExpertStore(tmp_path / "store", create=True)
    made.write(info("rte"), TREE, INSTANCES)
    return made


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of every file."""
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def test_round_trip(store: ExpertStore) -> None:
    tree = TREE | {"half": np.ones((2, 3), ml_dtypes.bfloat16)}
    written = store.write(
        info("full", spec=get_spec("full"), metrics={"loss": 0.5}, history=({"step": 1},)), tree
    )
    found, params = store.load("full", backbone=BACKBONE)
    assert found == written and found.parameters == 613 and found.kind == "full"
    for path, leaf in flatten(tree).items():
        array = flatten(params)[path]
        assert isinstance(array, np.ndarray) and array.dtype == leaf.dtype
        np.testing.assert_array_equal(array, leaf)
    assert store.ids() == ["full", "rte"] and [i.id for i in store] == store.ids()
    assert store.instances("rte") == INSTANCES and store.instances("full") == []
    assert store.verify("full") == store.verify("rte") == store.leftovers() == []


def test_some_arrays_alone(store: ExpertStore) -> None:
    path = "decoder/norm/scale_delta"
    read = flatten(store.params("rte", [path]))
    assert list(read) == [path]
    np.testing.assert_array_equal(read[path], flatten(TREE)[path])
    assert flatten(store.shapes("rte"))[path].shape == (7,)


def test_expert_is_the_same_bytes_whoever_writes_it(store: ExpertStore, tmp_path: Path) -> None:
    other = ExpertStore(tmp_path / "other", create=True)
    reordered = dict(reversed(TREE.items()))
    assert other.write(info("rte"), reordered).checksum == store.info("rte").checksum


def test_nothing_is_overwritten(store: ExpertStore) -> None:
    before = contents(store.path)
    with pytest.raises(FileExistsError, match="rte already exists"):
        store.write(info("rte"), TREE)
    assert contents(store.path) == before


@pytest.mark.parametrize("name", [".hidden", "a/b", "", "a b", "../rte"])
def test_id_that_is_no_folder_name(store: ExpertStore, name: str) -> None:
    with pytest.raises(ElmError, match="must be letters, digits"):
        store.write(info(name), TREE)
    assert store.ids() == ["rte"] and store.leftovers() == []


def test_adding_an_expert_touches_no_other(store: ExpertStore) -> None:
    before = contents(store.path / "rte")
    store.write(info("cb"), TREE, INSTANCES)
    assert contents(store.path / "rte") == before


def test_failed_write_leaves_nothing(store: ExpertStore) -> None:
    with pytest.raises(TypeError):
        store.write(info("cb"), TREE, [{"inputs": object()}])
    assert os.listdir(store.path) == ["rte"]


def test_killed_writer_is_never_listed(store: ExpertStore) -> None:
    """SIGKILL after the arrays are on disk, before the expert is whole."""
    program = textwrap.dedent("""
        import os, signal, sys
        import numpy as np
        from elm_jax.experts import ExpertInfo, ExpertStore
        from elm_jax.models import get_spec

        class Kills(dict):
            def keys(self):
                os.kill(os.getpid(), signal.SIGKILL)
            __iter__ = keys
            items = keys

        info = ExpertInfo(id='killed', spec=get_spec('lora'), tasks=(), prompts=(), backbone={})
        ExpertStore(sys.argv[1]).write(info, {'w': np.ones(5)}, [{'a': 1}, Kills(b=2)])
    """)
    command = [sys.executable, "-c", program, str(store.path)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert store.ids() == ["rte"] and "killed" not in store
    [left] = store.leftovers()
    assert "killed" in left.name and (left / "params").is_dir()
    assert store.write(info("killed"), TREE).id == "killed"


def test_folder_without_description_is_a_leftover(store: ExpertStore) -> None:
    (store.path / "stray").mkdir()
    (store.path / ".runs").mkdir()
    assert store.ids() == ["rte"] and [p.name for p in store.leftovers()] == ["stray"]


def test_flipped_byte_is_found(store: ExpertStore) -> None:
    files = [p for p in (Path(store.path) / "rte/params").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x10
    largest.write_bytes(data)
    with pytest.raises(ElmError, match=r"rte/params.*damaged") as error:
        store.load("rte")
    assert "\n" not in str(error.value)
    [problem] = store.verify("rte")
    assert "damaged" in problem


def test_other_arrays_fail_the_checksum(store: ExpertStore) -> None:
    changed = TREE | {"decoder": {"norm": {"scale_delta": np.zeros(7, np.float32)}}}
    other = store.write(info("cb"), changed)
    shutil.rmtree(store.path / "rte/params")
    shutil.copytree(store.path / "cb/params", store.path / "rte/params")
    with pytest.raises(ElmError, match=f"checksum {other.checksum} is not the recorded"):
        store.load("rte")
    assert len(store.verify("rte")) == 1
    assert store.load("rte", verify=False)[0].id == "rte"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "broken JSON"),
        (lambda text: "[]", "expected a JSON object, got list"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 9'), "version 9"),
        (lambda text: text.replace('"parallel"', '"paralel"'), "did you mean 'parallel'"),
        (lambda text: text.replace('"checksum"', '"sum"'), "lacks checksum"),
        (
            lambda text: text.replace('"metrics": {', '"metrics": null, "m": {'),
            "metrics should be an",
        ),
        (lambda text: text.replace('"fingerprint"', '"print"'), "backbone lacks fingerprint"),
        (lambda text: text.replace('"id": "rte"', '"id": "cb"'), "says id 'cb'"),
    ],
)
def test_damaged_description_names_its_file(
    store: ExpertStore, damage: object, message: str
) -> None:
    path = store.path / "rte/expert.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ElmError, match=message) as error:
        store.info("rte")
    assert str(path) in str(error.value)


def test_damaged_instances_and_keys_are_named(store: ExpertStore) -> None:
    folder = store.path / "rte"
    with (folder / "instances.jsonl").open("a") as file:
        file.write('{"inputs"')
    data = json.loads((folder / "expert.json").read_text())
    data["embedder"] = {"name": "e", "dimension": 3, "text_format": "1"}
    (folder / "expert.json").write_text(json.dumps(data))
    with pytest.raises(ElmError, match=r"instances.jsonl:2: broken JSON"):
        store.instances("rte")
    assert "missing" in store.verify("rte")[0] and "instances.jsonl:2" in store.verify("rte")[1]
    (folder / "keys.npy").write_bytes(b"")
    assert "damaged or truncated" in store.verify("rte")[0]
    np.save(folder / "keys.npy", np.zeros((5, 4), np.float32))
    assert "shape (5, 4), expected (S, 3)" in store.verify("rte")[0]


def test_missing_params(store: ExpertStore) -> None:
    shutil.rmtree(store.path / "rte/params")
    with pytest.raises(ElmError, match=r"rte/params: damaged or incomplete"):
        store.load("rte")


def test_other_backbone_is_refused_by_name(store: ExpertStore) -> None:
    other = {"name": "large", "fingerprint": "sha256:" + "b" * 64}
    with pytest.raises(ElmError, match=r"'rte' belongs to backbone 'tiny'.*not to 'large'"):
        store.load("rte", backbone=other)
    check_backbone(store.info("rte"), BACKBONE | {"name": "renamed"})


def test_unknown_id_gives_the_nearest(store: ExpertStore) -> None:
    with pytest.raises(ElmError, match="no 'rt'.*did you mean 'rte'"):
        store.load("rt")
    with pytest.raises(FileNotFoundError, match="no expert store at"):
        ExpertStore(store.path / "nowhere")


def test_ids_of_names_that_look_alike() -> None:
    names = ["a b", "a  b", "a_b", "a b ", " a b", "a/b", "a?b", "A b", ".a b", "é", "ü", "a-b"]
    ids = [expert_id("t", name) for name in names]
    assert len(set(ids)) == len(names)
    assert expert_id("t", "a_b") == "t--a_b"


def test_ids_of_p3_prompts_never_collide(shared_data: Path) -> None:
    pairs = set()
    for path in sorted((shared_data / "p3/prompted").rglob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        pairs |= {(path.parent.name, row.get("prompt", row.get("template"))) for row in rows}
    assert len(pairs) > 100
    ids = {expert_id(*pair) for pair in pairs}
    assert len(ids) == len(pairs)
    assert all(len(name.encode()) < 200 and name.isascii() and "/" not in name for name in ids)
