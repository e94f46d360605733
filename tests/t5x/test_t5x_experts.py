"""Experts in t5x's checkpoints, tasks and vocabularies for it; all of it without t5x."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
import tensorstore
import tiny
from flax import serialization

from elm_jax.checkpoints import load_backbone
from elm_jax.errors import ElmError
from elm_jax.experts import init_expert
from elm_jax.experts.tree import flatten, unflatten
from elm_jax.models import AdapterSpec, FullSpec, LoraSpec, get_spec
from elm_jax.t5x.experts import (
    checkpoint_shapes,
    find_checkpoint,
    join,
    load_t5x_expert,
    read_arrays,
    save_t5x_expert,
    split,
)

CONFIG = tiny.CONFIG


def same(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def made(spec, seed=0):
    """A fresh expert whose arrays are all different from zero."""
    tree = flatten(init_expert(CONFIG, spec, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    return unflatten({k: rng.normal(size=v.shape).astype(np.float32) for k, v in tree.items()})


def write_legacy(folder, params, step=3):
    """Writes t5x's legacy layout by hand: msgpack, with arrays of rank 2 as zarr folders."""
    folder.mkdir(parents=True)
    leaves = {}
    for path, array in flatten(params).items():
        array = np.asarray(array)
        if array.ndim < 2:
            leaves[path] = array
            continue
        name = "target." + path.replace("/", ".")
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(folder / name)},
            "metadata": {"compressor": {"id": "gzip"}},
        }
        tensorstore.open(
            spec, create=True, dtype=array.dtype.name, shape=array.shape
        ).result().write(array).result()
        leaves[path] = {
            "driver": "zarr",
            "dtype": array.dtype.name,
            "kvstore": {"driver": "file", "path": name},
            "metadata": {"shape": list(array.shape)},
        }
    state = {"target": unflatten(leaves), "state": {"step": np.int32(step), "param_states": {}}}
    packed = serialization.msgpack_serialize({"version": 3, "optimizer": state})
    (folder / "checkpoint").write_bytes(packed)
    return folder


@pytest.mark.parametrize("name", ["adapter", "elm_code", "lora", "full"])
def test_an_expert_comes_back_as_it_went(name, tmp_path):
    spec = get_spec(name)
    expert = made(spec)
    saved = save_t5x_expert(spec, expert, CONFIG, tmp_path / "run", step=4)
    assert saved.name == "checkpoint_4" and list(checkpoint_shapes(saved)) == ["expert"]
    for path in (tmp_path / "run", saved):
        found, arrays = load_t5x_expert(path, CONFIG)
        assert found == spec and same(arrays, expert)


def test_stacked_layers_come_back_layer_by_layer(tmp_path):
    config, spec = CONFIG.replace(num_encoder_layers=2, num_decoder_layers=2), LoraSpec(rank=2)
    expert = unflatten(
        {k: np.asarray(v) for k, v in flatten(init_expert(config, spec, jax.random.key(0))).items()}
    )
    saved = save_t5x_expert(spec, expert, config.replace(scan_layers=True), tmp_path / "run")
    assert "encoder" in checkpoint_shapes(saved)["expert"]["encoder"]
    _, arrays = load_t5x_expert(saved, config)
    assert same(arrays, expert)


def test_the_last_checkpoint_of_a_run_is_taken(tmp_path):
    spec = AdapterSpec(bottleneck=4)
    for step in (2, 10):
        save_t5x_expert(spec, made(spec, step), CONFIG, tmp_path / "run", step=step)
    assert find_checkpoint(tmp_path / "run").name == "checkpoint_10"
    assert same(load_t5x_expert(tmp_path / "run", CONFIG)[1], made(spec, 10))
    with pytest.raises(FileExistsError, match="checkpoint_10"):
        save_t5x_expert(spec, made(spec), CONFIG, tmp_path / "run", step=10)


def test_legacy_layout(tmp_path):
    spec = AdapterSpec(bottleneck=4, use_bias=True)
    backbone = load_backbone(tiny.backbone(tmp_path / "tiny")).params
    folder = write_legacy(tmp_path / "checkpoint_3", join(backbone, made(spec)))
    found, arrays = load_t5x_expert(tmp_path, CONFIG, spec=spec)
    assert found == spec and same(arrays, made(spec))
    whole, expert = split(read_arrays(folder))
    assert same(whole, backbone) and same(expert, made(spec))
    shutil.rmtree(folder / "target.expert.encoder.layers_0.mlp_adapter.up_kernel")
    with pytest.raises(FileNotFoundError, match="up_kernel: missing"):
        load_t5x_expert(folder, CONFIG, spec=spec)


def test_a_plain_model_is_a_full_expert_over_its_backbone(tmp_path):
    backbone = load_backbone(tiny.backbone(tmp_path / "tiny")).params
    delta = made(FullSpec())
    tuned = jax.tree.map(lambda p, d: np.asarray(p) + d, backbone, delta)
    folder = write_legacy(tmp_path / "checkpoint_3", tuned)
    spec, arrays = load_t5x_expert(folder, CONFIG, backbone=backbone)
    assert spec == FullSpec()
    jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d, atol=1e-5), arrays, delta)
    with pytest.raises(ElmError, match="plain T5X model; give its backbone"):
        load_t5x_expert(folder, CONFIG)


def test_without_its_side_file_the_spec_has_to_be_given(tmp_path):
    for spec, text in (
        (LoraSpec(4, targets=("k", "q"), blocks=("cross",)), "do not say alpha; give.*rank=4.*'k'"),
        (AdapterSpec(4), "do not say placement, activation.*bottleneck=4"),
    ):
        saved = save_t5x_expert(spec, made(spec), CONFIG, tmp_path / spec.kind)
        (saved.parent / "expert.json").unlink()
        with pytest.raises(ElmError, match=text):
            load_t5x_expert(saved, CONFIG)
        assert same(load_t5x_expert(saved, CONFIG, spec=spec)[1], made(spec))
    with pytest.raises(ElmError, match="'decoder/layers_0/mlp_adapter/down_kernel' has shape"):
        load_t5x_expert(saved, CONFIG, spec=AdapterSpec(5))


def test_what_is_wrong_is_named(tmp_path):
    spec = LoraSpec(rank=2)
    saved = save_t5x_expert(spec, made(spec), CONFIG, tmp_path / "run")
    with pytest.raises(ElmError, match="its backbone has emb_dim 16, this one 32"):
        load_t5x_expert(saved, CONFIG.replace(emb_dim=32))
    with pytest.raises(ElmError, match="the run says LoraSpec.*not AdapterSpec"):
        load_t5x_expert(saved, CONFIG, spec=AdapterSpec())
    with pytest.raises(FileNotFoundError, match="did you mean 'run'"):
        load_t5x_expert(tmp_path / "rnu", CONFIG)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds none: neither 'state/'"):
        load_t5x_expert(tmp_path / "empty", CONFIG)
    facts = tmp_path / "run" / "expert.json"
    facts.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ElmError, match="expert.json: expected format"):
        load_t5x_expert(saved, CONFIG)
    facts.unlink()
    for file in (saved / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ElmError, match="damaged"):
        load_t5x_expert(saved, CONFIG, spec=spec)


def test_axes_of_all_kinds_have_a_rule():
    from elm_jax.experts.apply import logical_axes
    from elm_jax.models import PRESETS
    from elm_jax.t5x.partitioning import logical_axis_rules

    rules = dict(logical_axis_rules())
    for spec in PRESETS.values():
        for tree in logical_axes(CONFIG, spec):
            assert {name for names in flatten(tree).values() for name in names} <= set(rules)
    assert {rules[name] for name in ("embed", "batch")} == {"data"}
    assert {rules[name] for name in ("mlp", "joined_kv", "vocab")} == {"model"}


def test_folders_become_seqio_tasks(tmp_path):
    seqio = pytest.importorskip("seqio")
    from elm_jax.t5x.tasks import register_folders, task_vocabulary

    backbone = tiny.backbone(tmp_path / "tiny")
    rows = [{"inputs": f"{i}?", "targets": "yes", "prompt": "ab"[i % 2]} for i in range(6)]
    folders = [
        str(tiny.task(tmp_path / name, {"train": rows, "test": rows[:2]}))
        for name in ("t5x_one", "t5x_two")
    ]
    name = register_folders(folders[0], str(backbone), prompt="a")
    rows = list(
        seqio.get_mixture_or_task(name)
        .get_dataset(None, "train", shuffle=False)
        .as_numpy_iterator()
    )
    assert [row["inputs_pretokenized"] for row in rows] == [b"0?", b"2?", b"4?"]
    both = register_folders(folders, str(backbone))
    assert len(seqio.get_mixture_or_task(both).tasks) == 2
    assert register_folders(folders, str(backbone)) == both
    vocabulary = task_vocabulary(both, "inputs", CONFIG, str(backbone))
    assert vocabulary.vocab_size == 400
    with pytest.raises(ElmError, match="no task has a prompt 'c'.*'a', 'b'"):
        register_folders(folders, str(backbone), prompt="c")
    with pytest.raises(ElmError, match="400 ids in 'inputs', but the backbone has 300"):
        task_vocabulary(both, "inputs", CONFIG.replace(vocab_size=300))
    with pytest.raises(ElmError, match="no seqio task or mixture 'elm_jax:t5x_on:t5x'.*did you"):
        task_vocabulary("elm_jax:t5x_on:t5x", "inputs", CONFIG)
    with pytest.raises(ElmError, match="another SentencePiece model"):
        task_vocabulary(both, "inputs", CONFIG.replace(vocab_size=4096), "elm-tiny")
