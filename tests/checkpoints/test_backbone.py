"""Backbones on disk, and the fingerprint that names them."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_jax.checkpoints import (
    Backbone,
    backbone,
    fingerprint,
    initialize,
    load_backbone,
    save_backbone,
)  # fmt: skip
from elm_jax.errors import ElmError
from elm_jax.experts.apply import backbone_shapes
from elm_jax.experts.tree import flatten, unflatten
from elm_jax.models import T5, T5Config

CONFIG = T5Config(
    vocab_size=31, emb_dim=12, num_heads=2, head_dim=5, mlp_dim=16,
    num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip
BF16 = ml_dtypes.bfloat16


def make_params(config: T5Config = CONFIG, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: rng.normal(0, 0.3, s.shape).astype(dtype), backbone_shapes(config)
    )


def make_backbone(**changes: Any) -> Backbone:
    params = changes.pop("params", make_params())
    made = Backbone("little", CONFIG, params, fingerprint(CONFIG, params))
    return dataclasses.replace(made, **changes)


def assert_same_arrays(a: Any, b: Any) -> None:
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_backbone(make_backbone(), tmp_path / "little")


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes keys of config.json; None deletes one."""
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


# Round trips


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16], ids=["f32", "bf16", "f16"])
def test_round_trip_keeps_every_byte(tmp_path: Path, dtype: Any) -> None:
    vocabulary = tmp_path / "some.model"
    vocabulary.write_bytes(b"pieces")
    saved = make_backbone(params=make_params(dtype=dtype), vocabulary_path=vocabulary)
    saved = dataclasses.replace(saved, fingerprint=fingerprint(CONFIG, saved.params))
    loaded = load_backbone(save_backbone(saved, tmp_path / "new" / "little"), on_host=True)
    assert_same_arrays(loaded.params, saved.params)
    assert (loaded.name, loaded.config, loaded.fingerprint) == ("little", CONFIG, saved.fingerprint)
    assert loaded.vocabulary_path == tmp_path / "new" / "little" / "spiece.model"
    assert loaded.vocabulary_path.read_bytes() == b"pieces"
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["little"]


def test_arrays_are_on_the_device_unless_asked_otherwise(folder: Path) -> None:
    on_device, on_host = load_backbone(folder), load_backbone(folder, on_host=True)
    assert {type(x) for x in jax.tree.leaves(on_host.params)} == {np.ndarray}
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(on_device.params))
    assert_same_arrays(on_device.params, on_host.params)
    assert on_device.vocabulary_path is None


def test_jax_arrays_and_views_are_saved_right(tmp_path: Path) -> None:
    params = make_params()
    odd = {k: v.T.copy().T if i % 2 else jnp.asarray(v)
           for i, (k, v) in enumerate(flatten(params).items())}  # fmt: skip
    path = save_backbone(make_backbone(params=unflatten(odd)), tmp_path / "odd")
    assert_same_arrays(load_backbone(path).params, params)


def test_bfloat16_loads_what_bfloat16_computation_reads(folder: Path) -> None:
    stored, half = load_backbone(folder), load_backbone(folder, dtype="bfloat16")
    assert half.config == CONFIG.replace(dtype="bfloat16")
    assert half.fingerprint == stored.fingerprint
    dtypes = {path: x.dtype for path, x in flatten(half.params).items()}
    assert dtypes["token_embedder/embedding"] == BF16
    assert dtypes["encoder/layers_0/mlp/wo/kernel"] == BF16
    assert dtypes["encoder/encoder_norm/scale"] == dtypes["decoder/relpos_bias/rel_embedding"]
    assert dtypes["encoder/encoder_norm/scale"] == np.float32

    tokens = np.array([[3, 4, 1, 0]], np.int32)
    run = jax.jit(lambda params: T5(half.config).apply({"params": params}, tokens, tokens))
    np.testing.assert_array_equal(run(half.params), run(stored.params))


def test_a_cast_backbone_is_saved_under_its_own_fingerprint(folder: Path, tmp_path: Path) -> None:
    half = load_backbone(folder, dtype="bfloat16")
    again = load_backbone(save_backbone(half, tmp_path / "half"))
    assert again.fingerprint != half.fingerprint
    assert_same_arrays(again.params, half.params)
    assert load_backbone(tmp_path / "half", dtype="float32").config.dtype == "float32"


def test_initialize_is_a_function_of_the_seed(tmp_path: Path) -> None:
    one, same, other = (initialize(CONFIG, seed) for seed in (1, 1, 2))
    assert one.name == "random"
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert_same_arrays(one.params, same.params)
    assert_same_arrays(load_backbone(save_backbone(one, tmp_path / "one")).params, one.params)


def test_the_embedded_backbone() -> None:
    embedded = importlib.resources.files("elm_jax") / backbone.EMBEDDED["elm-tiny"]
    if not embedded.is_dir():
        pytest.skip("elm-tiny is not in this checkout")
    tiny = load_backbone("elm-tiny", on_host=True)
    assert tiny.name == "elm-tiny"
    assert tiny.vocabulary_path is not None and tiny.vocabulary_path.is_file()


@pytest.mark.parametrize(
    "changes",
    [{}, {"relative_attention_per_layer": True}, {"scan_layers": True}, {"quantization": "int8"}],
)
def test_shapes_from_one_layer_are_those_of_all(changes: Any) -> None:
    config = CONFIG.replace(num_encoder_layers=3, num_decoder_layers=2, **changes)
    assert flatten(backbone.param_shapes(config)) == flatten(backbone_shapes(config))


# Failures


def test_an_unknown_name_hints_at_the_nearest() -> None:
    with pytest.raises(ElmError, match=r"unknown backbone 'elm-tinny' \(did you mean 'elm-tiny'"):
        load_backbone("elm-tinny")


def test_a_missing_path_hints_at_its_neighbours(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"litle: no such .*did you mean 'little'"):
        load_backbone(folder.parent / "litle")
    with pytest.raises(FileNotFoundError, match="no such backbone folder"):
        load_backbone("no/such/parent")


def test_a_missing_embedded_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backbone.EMBEDDED, "elm-lost", "assets/lost")
    with pytest.raises(FileNotFoundError, match="'elm-lost' is missing from this installation"):
        load_backbone("elm-lost")


def test_nothing_is_overwritten(folder: Path) -> None:
    before = (folder / "config.json").read_text()
    with pytest.raises(FileExistsError, match="little exists"):
        save_backbone(make_backbone(name="other"), folder)
    assert (folder / "config.json").read_text() == before


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    broken = make_backbone(vocabulary_path=tmp_path / "missing.model")
    with pytest.raises(FileNotFoundError, match=r"missing\.model"):
        save_backbone(broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(FileExistsError, match="was filled"), backbone.new_folder(path):
        path.mkdir()
        (path / "theirs").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (path / "theirs").exists()


def test_arrays_that_do_not_fit_are_not_saved(tmp_path: Path) -> None:
    norm = "encoder/encoder_norm/scale"
    for path, array, message in (
        (norm, np.ones(5, np.float32), r"encoder_norm/scale.*\(5,\).*\(12,\)"),
        (norm, np.ones(12, np.int32), "encoder_norm/scale.*int32"),
        ("decoder/final_norm/scale", np.ones(12, np.float32), "unknown.*final_norm.*did you mean"),
    ):
        params = unflatten(flatten(make_params()) | {path: array})
        with pytest.raises(ElmError, match=message):
            save_backbone(make_backbone(params=params), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "neither 'format'"),
        ({"format_version": 2}, "format_version 2, but this elm_jax reads 1"),
        ({"fingerprint": None}, "key 'fingerprint' is missing"),
        ({"config": CONFIG.to_json() | {"emb_dims": 3}}, "'emb_dims'.*did you mean 'emb_dim'"),
        ({"config": CONFIG.to_json() | {"mlp_activations": 3}}, "config.json"),
        ({"config": "sizes"}, "config.json"),
        (
            {"config": CONFIG.to_json() | {"mlp_dim": 8}},
            r"params\.safetensors.*layers_0/mlp/wi_0/kernel.*\(12, 16\).*\(12, 8\)",
        ),
        ({"config": CONFIG.to_json() | {"num_decoder_layers": 2}}, "lacks 'decoder/layers_1/"),
        ({"config": CONFIG.to_json() | {"layer_norm_epsilon": 1e-5}}, "fingerprint.*damaged"),
        ({"fingerprint": "sha256:0"}, "fingerprint.*says sha256:0"),
    ],
)
def test_a_wrong_config_names_the_place(folder: Path, changes: Any, message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ElmError, match=message) as caught:
        load_backbone(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files_are_named(folder: Path) -> None:
    params, config = folder / "params.safetensors", folder / "config.json"
    content = params.read_bytes()
    flipped = bytearray(content)
    flipped[-1] ^= 1
    params.write_bytes(flipped)
    with pytest.raises(ElmError, match="fingerprint"):
        load_backbone(folder)
    for damaged in (content[:-7], content[:20], b"", b"version https://git-lfs.github.com/spec/v1"):
        params.write_bytes(damaged)
        with pytest.raises(ElmError, match=r"params\.safetensors: truncated or damaged"):
            load_backbone(folder)
    params.unlink()
    with pytest.raises(FileNotFoundError, match=r"params\.safetensors"):
        load_backbone(folder)
    for text, message in (("{", "invalid JSON"), ("[1]", "expected a JSON object, got list")):
        config.write_text(text)
        with pytest.raises(ElmError, match=rf"config\.json: {message}"):
            load_backbone(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_backbone(folder)
    params.touch()
    with pytest.raises(ElmError, match="is a file"):
        load_backbone(params)


def test_a_wrong_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(ElmError, match="bfloat17.*did you mean 'bfloat16'"):
        load_backbone(folder, dtype="bfloat17")


# Fingerprints

PARAMS = make_params()
FINGERPRINT = fingerprint(CONFIG, PARAMS)


def test_fingerprint_ignores_how_the_same_weights_are_kept() -> None:
    assert FINGERPRINT.startswith("sha256:") and len(FINGERPRINT) == len("sha256:") + 64
    backwards = unflatten(dict(reversed(flatten(PARAMS).items())))
    assert fingerprint(CONFIG, backwards) == FINGERPRINT
    assert fingerprint(CONFIG, jax.tree.map(jnp.asarray, PARAMS)) == FINGERPRINT
    assert fingerprint(CONFIG, jax.tree.map(np.asfortranarray, PARAMS)) == FINGERPRINT
    half = jax.tree.map(lambda x: x.astype(BF16), PARAMS)
    back = jax.tree.map(lambda x: x.astype(np.float32), half)
    assert fingerprint(CONFIG, half) == fingerprint(CONFIG, back) != FINGERPRINT
    assert fingerprint(CONFIG, jax.tree.map(jnp.asarray, half)) == fingerprint(CONFIG, half)


def test_fingerprint_covers_what_the_model_is_not_how_it_runs() -> None:
    for same in ({"dtype": "bfloat16"}, {"dropout_rate": 0.0}, {"dropout_broadcast": False}):
        assert fingerprint(CONFIG.replace(**same), PARAMS) == FINGERPRINT
    for other in (
        {"layer_norm_epsilon": 1e-5},
        {"relative_attention_max_distance": 64},
        {"mlp_activations": ("gelu", "linear")},
        {"num_heads": 5, "head_dim": 2},
    ):
        assert fingerprint(CONFIG.replace(**other), PARAMS) != FINGERPRINT


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fingerprint_changes_with_any_element_of_a_small_array(data: st.DataObject) -> None:
    flat = flatten(PARAMS)
    path = data.draw(st.sampled_from(list(flat)))
    changed = flat[path].copy()
    index = data.draw(st.integers(0, changed.size - 1))
    changed.flat[index] = np.nextafter(changed.flat[index], np.float32(9), dtype=np.float32)
    assert fingerprint(CONFIG, unflatten(flat | {path: changed})) != FINGERPRINT


def test_fingerprint_covers_names_and_shapes() -> None:
    flat = flatten(PARAMS)
    renamed = {k.replace("encoder_norm", "encoder_nrom"): v for k, v in flat.items()}
    assert fingerprint(CONFIG, unflatten(renamed)) != FINGERPRINT
    reshaped = {k: v.reshape(-1) for k, v in flat.items()}
    assert fingerprint(CONFIG, unflatten(reshaped)) != FINGERPRINT


@pytest.mark.parametrize("shape", [(3000, 512), (4096, 512), (1500, 768)])
def test_fingerprint_samples_every_column_of_a_large_array(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    before = fingerprint(CONFIG, {"a": array})
    assert fingerprint(CONFIG, {"a": jnp.asarray(array)}) == before
    for column in (0, 1, 255, shape[-1] // 2, shape[-1] - 1):
        changed = array.copy()
        changed[8:-8, column] += 1  # away from the ends, which count in full
        assert fingerprint(CONFIG, {"a": changed}) != before, column
    for end in (0, -1):
        changed = array.copy()
        changed[end, 1] += 1
        assert fingerprint(CONFIG, {"a": changed}) != before
