"""Rematerialisation: the same gradients from less memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.experts.apply import backbone_shapes, expert_shapes
from elm_jax.models import T5, T5Config, get_spec

CONFIG = T5Config(
    vocab_size=31, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_encoder_layers=4,
    num_decoder_layers=1, dropout_rate=0.2, scan_layers=True,
)  # fmt: skip
SPEC = get_spec("lora", rank=2)
POLICIES = ("minimal", "full")


def loss(config: T5Config, tokens: Any, expert: Any, params: Any) -> Any:
    logits = T5(config, SPEC).apply(
        {"params": params, "expert": expert}, tokens, tokens, deterministic=False,
        rngs={"dropout": jax.random.key(0)},
    )  # fmt: skip
    return jax.nn.logsumexp(logits, axis=-1).mean()


@functools.cache
def compiled(config: T5Config) -> Any:
    """Compiles the gradient for B=8, T=64; of shapes alone."""
    shapes = expert_shapes(config, SPEC), backbone_shapes(config)
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    gradient = jax.grad(functools.partial(loss, config), argnums=1)
    return jax.jit(gradient).lower(tokens, *shapes).compile()


def draw(shapes: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_the_same(policy: str) -> None:
    tokens = np.random.default_rng(0).integers(1, 31, (8, 64)).astype(np.int32)
    expert, params = draw(expert_shapes(CONFIG, SPEC), 0), draw(backbone_shapes(CONFIG), 1)
    kept = compiled(CONFIG)(tokens, expert, params)
    again = compiled(CONFIG.replace(remat=policy))(tokens, expert, params)
    assert max(np.abs(g).max() for g in jax.tree.leaves(kept)) > 1e-3
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4), again, kept)


def test_each_policy_needs_less_memory_than_the_one_before() -> None:
    def temporary(policy: str) -> int:
        return compiled(CONFIG.replace(remat=policy)).memory_analysis().temp_size_in_bytes

    everything, products, inputs = (temporary(policy) for policy in ("none", *POLICIES))
    scores = 4 * 8 * 2 * 64 * 64 * 4  # of the encoder's layers: the largest thing not kept
    assert everything - products > scores
    assert products > inputs


@pytest.mark.parametrize("policy", POLICIES)
def test_unrolled_layers_are_computed_again_too(policy: str) -> None:
    config = CONFIG.replace(scan_layers=False, num_encoder_layers=1, remat=policy)
    tokens = np.ones((1, 2), np.int32)
    shapes = expert_shapes(config, SPEC), backbone_shapes(config)
    traced = jax.make_jaxpr(functools.partial(loss, config, tokens))(*shapes)
    names = [equation.primitive.name for equation in traced.eqns]
    remat = jax.make_jaxpr(jax.checkpoint(jnp.sin))(1.0).eqns[0].primitive.name
    assert names.count(remat) == 2, set(names)
