"""How experts meet their backbone: shapes, initial values, axis names, counts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.errors import ElmError
from elm_jax.experts import (
    bind_variables,
    check_expert,
    count_expert_parameters,
    expert_shapes,
    flatten,
    init_expert,
    logical_axes,
)
from elm_jax.experts.apply import backbone_shapes
from elm_jax.models import PRESETS, T5, LoraSpec, T5Config, get_spec

CONFIG = T5Config(
    vocab_size=30,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    num_encoder_layers=1,
    num_decoder_layers=2,
)
D, F, NK, V, E, R = 16, 24, 16, 30, 64, 8
NORMS = 2 * 1 + 1 + 3 * 2 + 1
COUNTS = {
    "adapter": 3 * 2 * D * E,
    "elm_code": 6 * (2 * D * E + E + D) + NORMS * D,
    "lora": (1 + 2 + 2) * 2 * R * (D + NK),
    "full": 2 * V * D + (1 + 2 + 2) * 4 * D * NK + 3 * 3 * D * F + NORMS * D + 2 * 2 * 32,
}


@pytest.mark.parametrize("kind", PRESETS)
def test_counts_of_the_presets(kind: str) -> None:
    assert count_expert_parameters(CONFIG, get_spec(kind)) == COUNTS[kind]


@pytest.mark.parametrize("kind", PRESETS)
def test_initial_expert_has_the_announced_shapes(kind: str) -> None:
    spec = get_spec(kind)
    expert, shapes = init_expert(CONFIG, spec, jax.random.key(0)), expert_shapes(CONFIG, spec)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), expert) == jax.tree.map(
        lambda s: (s.shape, jnp.dtype(jnp.float32)), shapes
    )
    check_expert("it", CONFIG, spec, expert)
    backbone_axes, axes = logical_axes(CONFIG, spec)
    for names, tree in ((axes, shapes), (backbone_axes, backbone_shapes(CONFIG))):
        names, arrays = flatten(names), flatten(tree)
        assert set(names) == set(arrays)
        assert all(len(names[path]) == len(arrays[path].shape) for path in arrays)


def test_whole_tree_of_a_lora_expert() -> None:
    spec = LoraSpec(rank=2, targets=("q", "wo"), blocks=("encoder", "cross"))
    shapes = {path: leaf.shape for path, leaf in flatten(expert_shapes(CONFIG, spec)).items()}
    assert shapes == {
        "decoder/layers_0/encoder_decoder_attention/query/lora_a": (16, 2),
        "decoder/layers_0/encoder_decoder_attention/query/lora_b": (2, 16),
        "decoder/layers_1/encoder_decoder_attention/query/lora_a": (16, 2),
        "decoder/layers_1/encoder_decoder_attention/query/lora_b": (2, 16),
        "encoder/layers_0/attention/query/lora_a": (16, 2),
        "encoder/layers_0/attention/query/lora_b": (2, 16),
        "encoder/layers_0/mlp/wo/lora_a": (24, 2),
        "encoder/layers_0/mlp/wo/lora_b": (2, 16),
    }


@functools.cache
def backbone(config: T5Config, inputs: tuple, targets: tuple) -> tuple:
    """A random backbone and its logits."""
    model, arrays = T5(config), (np.array(inputs), np.array(targets))
    params = jax.jit(model.init)(jax.random.key(1), *arrays)["params"]
    return params, jax.jit(model.apply)(bind_variables(None, params, None), *arrays)


@pytest.mark.parametrize("kind", ["adapter", "lora", "full"])
def test_a_fresh_expert_is_the_identity(kind: str) -> None:
    spec = get_spec(kind)
    inputs, targets = ((3,) * 5,), ((7,) * 4,)
    params, bare = backbone(CONFIG, inputs, targets)
    expert = init_expert(CONFIG, spec, jax.random.key(0))
    variables = bind_variables(spec, params, expert)
    bound = jax.jit(T5(CONFIG, spec).apply)(variables, np.array(inputs), np.array(targets))
    np.testing.assert_array_equal(bare, bound)


def test_initial_values_follow_the_key() -> None:
    spec = get_spec("lora")
    one, same, other = (init_expert(CONFIG, spec, jax.random.key(k)) for k in (0, 0, 1))
    path = "encoder/layers_0/attention/query/lora_a"
    np.testing.assert_array_equal(flatten(one)[path], flatten(same)[path])
    assert not np.allclose(flatten(one)[path], flatten(other)[path])


def test_full_expert_keeps_the_backbones_dtype() -> None:
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    bound = bind_variables(get_spec("full"), params, {"w": jnp.ones(2, jnp.float32)})
    assert bound["params"]["w"].dtype == jnp.bfloat16


def test_what_does_not_fit_is_named() -> None:
    spec = get_spec("lora")
    with pytest.raises(ElmError, match="'lora' was announced, but no arrays"):
        bind_variables(spec, {}, None)
    expert = init_expert(CONFIG, spec, jax.random.key(0))
    flat = "decoder/layers_0/encoder_decoder_attention/query/lora_a"
    query = expert["decoder"]["layers_0"]["encoder_decoder_attention"]["query"]
    kept = query.pop("lora_a")
    with pytest.raises(ElmError, match=f"mine lacks '{flat}' of shape \\(16, 8\\)"):
        check_expert("mine", CONFIG, spec, expert)
    query["lora_a"] = kept[:, :4]
    with pytest.raises(ElmError, match=r"has shape \(16, 4\), expected \(16, 8\)"):
        check_expert("mine", CONFIG, spec, expert)
    query["lora_a"], query["lora_c"] = kept, kept
    with pytest.raises(ElmError, match="unknown array .*lora_c.*did you mean"):
        check_expert("mine", CONFIG, spec, expert)


def test_spec_that_adds_nothing_is_refused() -> None:
    with pytest.raises(ElmError, match="name no projection"):
        LoraSpec(targets=("wi",), blocks=("cross",))
