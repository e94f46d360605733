"""The three ways of attention against one another, and who takes which."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.models import T5, T5Config, attention
from elm_jax.models.attention import attend, choose
from elm_jax.models.layers import MASK_VALUE, Attention

B, N, U, T, K = 2, 3, 10, 14, 8
WAYS = ("fused", "memory_efficient")


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def additions(name: str) -> tuple[Any, Any]:
    """Returns the bias and mask of a case, in the shapes that the model gives them."""
    rng = np.random.default_rng(0)
    bias = 3 * draw(N, U, T)
    padding = np.where(np.arange(T) < [[9], [14]], 0.0, MASK_VALUE)[:, None, None].astype("f4")
    causal = np.where(np.arange(T) <= np.arange(U)[:, None], 0.0, MASK_VALUE).astype("f4")
    segments = [np.sort(rng.integers(1, 4, (B, n)), axis=1) for n in (U, T)]
    same = segments[0][:, :, None] == segments[1][:, None]
    packed = np.where(same, 0.0, MASK_VALUE)[:, None].astype("f4")
    return {
        "nothing": (None, None),
        "bias": (bias, None),
        "bias of each example": (draw(B, N, U, T), None),
        "padding": (None, padding),
        "bias and padding": (bias, padding),
        "bias and causal": (bias, causal),
        "bias and packed": (bias, np.minimum(packed, padding)),
        "packed": (None, packed),  # some rows see nothing at all
    }[name]


CASES = (
    "nothing", "bias", "bias of each example", "padding", "bias and padding", "bias and causal",
    "bias and packed", "packed",
)  # fmt: skip


@functools.partial(jax.jit, static_argnums=0, static_argnames="chunk")
def with_gradients(kind: str, arrays: Any, added: Any, weights: Any, chunk: int = 4) -> Any:
    """Returns the result and the gradients of a weighted sum with respect to all inputs."""

    def loss(arrays: Any, added: Any) -> Any:
        mixed = attend(kind, *arrays, *added, chunk=chunk)
        return jnp.sum(mixed * weights), mixed

    gradients, mixed = jax.grad(loss, argnums=(0, 1), has_aux=True)(arrays, added)
    return mixed, gradients


@pytest.mark.parametrize("name", CASES)
def test_all_ways_give_the_same_in_float32(name: str) -> None:
    arrays = (draw(B, N, U, K), draw(B, N, T, K, seed=1), draw(B, N, T, K, seed=2))
    weights, added = draw(B, N, U, K, seed=3), additions(name)
    plain, gradients = with_gradients("plain", arrays, added, weights)
    for kind in WAYS:
        mixed, others = with_gradients(kind, arrays, added, weights)
        np.testing.assert_allclose(mixed, plain, atol=1e-5, err_msg=kind)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=2e-5, err_msg=kind),
            others, gradients,
        )  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
def test_any_chunk_will_do(chunk: int) -> None:
    arrays = (draw(B, N, U, K), draw(B, N, T, K, seed=1), draw(B, N, T, K, seed=2))
    added = additions("bias and packed")
    plain = attend("plain", *arrays, *added)
    mixed = attend("memory_efficient", *arrays, *added, chunk=chunk)
    np.testing.assert_allclose(mixed, plain, atol=1e-5)


@pytest.mark.parametrize("kind", WAYS)
def test_bfloat16_is_as_near_to_float32_as_plain(kind: str) -> None:
    arrays = [draw(B, N, U, K), draw(B, N, T, K, seed=1), draw(B, N, T, K, seed=2)]
    added = additions("bias and padding")
    exact = attend("plain", *arrays, *added)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    mixed = attend(kind, *halves, *added, chunk=4)
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_allclose(mixed.astype(jnp.float32), exact, atol=0.05)


def equations(jaxpr: Any) -> Any:
    """Yields every equation of a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("kind", ["plain", *WAYS])
def test_softmax_is_float32_in_bfloat16_computation(kind: str) -> None:
    halves = [jnp.zeros((B, N, n, K), jnp.bfloat16) for n in (U, T, T)]
    added = additions("bias and padding")
    jaxpr = jax.make_jaxpr(lambda *x: attend(kind, *x, *added, chunk=4))(*halves).jaxpr
    exponentials = [e for e in equations(jaxpr) if e.primitive.name == "exp"]
    assert exponentials
    assert {e.invars[0].aval.dtype for e in exponentials} == {jnp.dtype("float32")}


def test_memory_efficient_attention_holds_few_scores() -> None:
    shapes = [jax.ShapeDtypeStruct((1, 2, 512, 4), jnp.float32)] * 3

    def memory(kind: str) -> int:
        def loss(*arrays: Any) -> Any:
            return attend(kind, *arrays, chunk=32).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = 2 * 512 * 512 * 4
    assert memory("plain") > scores
    assert memory("memory_efficient") < scores / 2


@pytest.mark.skipif(not attention._on_cuda(), reason="cuDNN's kernel needs a CUDA device")
@pytest.mark.parametrize("batched", [(0, 0, 0), (0, None, 0), (None, None, 0)], ids=str)
def test_cudnn_agrees_with_plain_under_a_vmap_over_experts(batched: Any) -> None:
    rng = np.random.default_rng(0)

    def half(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    arrays = [half(*([2] if axis == 0 else []), 3, 4, 128, 64) for axis in batched]
    bias = jnp.asarray(half(4, 128, 128), jnp.float32)
    mask = jnp.where(jnp.arange(128) < jnp.array([[128], [64], [2]]), 0.0, MASK_VALUE)[
        :, None, None
    ]

    def gradients(kind: str) -> Any:
        def loss(*arrays: Any) -> Any:
            return jnp.square(attend(kind, *arrays, bias, mask).astype(jnp.float32)).sum()

        return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1, 2)), in_axes=batched))(*arrays)

    single = [x[0] if axis == 0 else x for x, axis in zip(arrays, batched, strict=True)]
    assert choose("auto", *single[:2]) == "fused"
    for ours, theirs in zip(*map(jax.tree.leaves, map(gradients, ("fused", "plain"))), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(ours, theirs, atol=0.05 * np.abs(theirs).max())


# Who takes which


def inputs(queries: int, keys: int, dtype: Any = jnp.bfloat16, width: int = 64) -> Any:
    return tuple(jax.ShapeDtypeStruct((2, 4, n, width), dtype) for n in (queries, keys))


def test_auto_without_a_fused_kernel_goes_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_on_cuda", lambda: False)
    assert choose("auto", *inputs(512, 512)) == "plain"
    assert choose("auto", *inputs(1024, 1024)) == "memory_efficient"
    assert choose("auto", *inputs(128, 8192)) == "memory_efficient"
    assert choose("auto", *inputs(1, 2**24)) == "plain"


def test_auto_on_cuda_takes_cudnn_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_on_cuda", lambda: True)
    assert choose("auto", *inputs(512, 512)) == "fused"
    assert choose("auto", *inputs(2048, 2048)) == "fused"
    assert choose("auto", *inputs(64, 512)) == "plain"  # few queries
    assert choose("auto", *inputs(512, 512, jnp.float32)) == "plain"
    assert choose("auto", *inputs(512, 511)) == "plain"
    assert choose("auto", *inputs(512, 512, width=60)) == "plain"
    assert choose("auto", *inputs(2048, 2048, width=256)) == "memory_efficient"


def test_a_named_way_is_taken_but_for_single_queries() -> None:
    for kind in ("plain", *WAYS):
        assert choose(kind, *inputs(2, 2)) == kind
        assert choose(kind, *inputs(1, 64)) == "plain"


# In the model

CONFIG = T5Config(
    vocab_size=53, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24, num_encoder_layers=1,
    num_decoder_layers=1, attention_chunk=4, dropout_rate=0.3,
)  # fmt: skip


@functools.cache
def params() -> Any:
    ones = jnp.ones((1, 2), jnp.int32)
    return jax.jit(T5(CONFIG).init)(jax.random.key(0), ones, ones)["params"]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "dropout"])
def test_the_model_gives_the_same_logits(training: bool) -> None:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(2, 53, (2, n)).astype(np.int32) for n in (12, 10)]
    tokens[0][0, 7:] = 0
    segments = {
        "encoder_segment_ids": np.array([[1] * 5 + [2] * 7] * 2),
        "decoder_segment_ids": np.array([[1] * 4 + [2] * 6] * 2),
    }

    def logits(kind: str) -> Any:
        model = T5(CONFIG.replace(attention=kind))
        rngs = {"dropout": jax.random.key(1)}
        return jax.jit(
            lambda p: model.apply(
                {"params": p}, *tokens, deterministic=not training, rngs=rngs, **segments
            )
        )(params())

    plain = logits("plain")
    for kind in WAYS:  # with dropout, too, as its masks fall on the values
        np.testing.assert_allclose(logits(kind), plain, atol=1e-5, err_msg=kind)


def test_dropout_of_single_weights_leaves_the_kernels_aside() -> None:
    drop = lambda weights: weights * 0  # noqa: E731
    arrays = (draw(B, N, U, K), draw(B, N, T, K), draw(B, N, T, K))
    for kind in WAYS:
        assert not np.any(attend(kind, *arrays, drop=drop))


def test_shared_dropout_drops_whole_keys_and_keeps_the_mean() -> None:
    # With one head and values of one, the output is the share of the weights that was kept.
    config = T5Config(9, 8, 1, 4, 8, 1, 1, dropout_rate=0.25)
    x = jnp.ones((400, 16, 8))
    variables = {
        "params": {
            "query": {"kernel": jnp.zeros((8, 4))},
            "key": {"kernel": jnp.zeros((8, 4))},
            "value": {"kernel": jnp.full((8, 4), 1 / 8)},
            "out": {"kernel": jnp.eye(4, 8)},
        }
    }
    y = Attention(config).apply(
        variables, x, x, deterministic=False, rngs={"dropout": jax.random.key(0)}
    )
    kept = np.asarray(y[..., 0]) * 16 * 0.75  # of 16 keys
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-4)
    assert np.ptp(kept, axis=1).max() < 1e-4  # the same for all queries of an example
    assert kept.mean() == pytest.approx(12, abs=0.3) and kept.std() > 1
