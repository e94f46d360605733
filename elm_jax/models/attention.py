"""The attention product: softmax(Q K^T + bias + mask) V, computed in one of three ways.

All give the same result up to rounding; `T5Config.attention` chooses:

    plain             all scores [B, N, U, T] at once. Fastest where they are few.
    memory_efficient  `attention_chunk` queries at a time, computed again in the backward pass, so
                      that only [B, N, chunk, T] scores are ever held. Runs everywhere.
    fused             `jax.nn.dot_product_attention`: cuDNN's kernel where `cudnn_takes` the
                      inputs (CUDA, bfloat16, whole multiples of sizes), else its XLA
                      implementation, which holds all scores as plain does.
    auto              cuDNN's kernel where it takes the inputs and there are `CUDNN_QUERIES` queries
                      or more; else plain, but memory_efficient from `LONG` * `LONG` scores per
                      head on.

A single query (a decoding step) is always plain. So is training with a dropout mask for each score
(`dropout_broadcast=False`); a mask shared along the queries acts on the values instead, before any
of these functions, and suits them all. The position bias [N, U, T] is held whole in each.
Softmax is float32 in all of them. cuDNN's kernel takes the bias in bfloat16, so there the results
agree with the others to that precision only.
Shapes: B batch, U queries, T keys, N heads, K head dim, C chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import backend

Array = jax.Array
LONG = 1024
"""From this many queries times this many keys on, 'auto' bounds the memory of the scores."""
CUDNN_QUERIES = 128
"""Fewest queries for which 'auto' takes cuDNN's kernel."""


def choose(kind: str, query: Array, keys: Array) -> str:
    """Returns 'plain', 'fused' or 'memory_efficient' for `T5Config.attention` and given inputs.

    Args:
      kind: 'auto' or one of the three.
      query: [B, N, U, K].
      keys: [B, N, T, K].
    """
    queries, length = query.shape[-2], keys.shape[-2]
    if queries == 1:
        return "plain"
    if kind != "auto":
        return kind
    if queries >= CUDNN_QUERIES and cudnn_takes(query, keys):
        return "fused"
    return "memory_efficient" if queries * length >= LONG * LONG else "plain"


def cudnn_takes(query: Array, keys: Array) -> bool:
    """Whether cuDNN's kernel takes these inputs with an additive bias, gradients included.

    It does on CUDA, in bfloat16, with a head dim of at most 128 that 8 divides, and even lengths.
    """
    return (
        _on_cuda()
        and query.dtype == jnp.bfloat16
        and query.shape[-1] <= 128
        and query.shape[-1] % 8 == 0
        and query.shape[-2] % 2 == 0
        and keys.shape[-2] % 2 == 0
    )


def _on_cuda() -> bool:
    return "cuda" in backend.get_backend().platform_version.lower()


def attend(
    kind: str,
    query: Array,
    keys: Array,
    values: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    chunk: int = 128,
    drop: Callable[[Array], Array] | None = None,
) -> Array:
    """Mixes values by the softmax of unscaled scores, as T5's attention does.

    Args:
      kind: `T5Config.attention`.
      query: [B, N, U, K].
      keys: [B, N, T, K].
      values: [B, N, T, K].
      bias: float32, broadcast to [B, N, U, T], or None.
      mask: float32, 0 or a large negative number, broadcast to [B, N, U, T], or None.
      chunk: queries at a time in 'memory_efficient'.
      drop: dropout of single weights, which only 'plain' can do.

    Returns:
      [B, N, U, K] in the dtype of `values`.
    """
    chosen = "plain" if drop is not None else choose(kind, query, keys)
    if chosen == "fused":
        return _fused(query, keys, values, bias, mask, cudnn_takes(query, keys))
    if chosen == "memory_efficient":
        return _memory_efficient(query, keys, values, bias, mask, chunk)
    return _plain(query, keys, values, bias, mask, drop)


def _plain(
    query: Array,
    keys: Array,
    values: Array,
    bias: Array | None,
    mask: Array | None,
    drop: Callable[[Array], Array] | None = None,
) -> Array:
    scores = jnp.einsum("bnqk,bntk->bnqt", query, keys, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + mask
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    if drop is not None:
        weights = drop(weights)
    return jnp.einsum("bnqt,bntk->bnqk", weights, values)


def _memory_efficient(
    query: Array, keys: Array, values: Array, bias: Array | None, mask: Array | None, chunk: int
) -> Array:
    """Rows of the softmax need nothing of each other, so chunks of queries go one by one."""
    queries = query.shape[-2]
    chunk = min(chunk, queries)
    count = -(-queries // chunk)
    padding = count * chunk - queries

    def split(x: Array) -> Array:
        """[..., U, last] -> [count, ..., C, last], padded with queries that are dropped later."""
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:-2], count, chunk, x.shape[-1]), -3, 0)

    # What is the same for all queries is not split.
    added = {name: x for name, x in (("bias", bias), ("mask", mask)) if x is not None}
    by_row = {name: split(x) for name, x in added.items() if x.ndim > 1 and x.shape[-2] > 1}
    common = {name: x for name, x in added.items() if name not in by_row}

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def rows(part: tuple[Array, dict[str, Array]]) -> Array:
        terms = {**common, **part[1]}
        return _plain(part[0], keys, values, terms.get("bias"), terms.get("mask"))

    mixed = jnp.moveaxis(jax.lax.map(rows, (split(query), by_row)), 0, -3)
    return mixed.reshape(*mixed.shape[:-3], count * chunk, mixed.shape[-1])[..., :queries, :]


def _fused(
    query: Array,
    keys: Array,
    values: Array,
    bias: Array | None,
    mask: Array | None,
    cudnn: bool,
) -> Array:
    batch, heads, queries, _ = query.shape
    added = [x for x in (bias, mask) if x is not None]
    total = functools.reduce(jnp.add, added) if added else None
    if total is not None:
        total = jnp.broadcast_to(total, (batch, heads, queries, keys.shape[-2]))
    if cudnn:
        # Its batching rule wants all inputs batched or none; under a vmap over experts some,
        # such as masks, are not. Adding nothing of each to all the others makes them alike.
        tie = sum(0 * x[..., :1, :1] for x in (query, keys, values))
        query, keys, values = query + tie, keys + tie, values + tie
        total = None if total is None else total.astype(query.dtype) + tie
    mixed = jax.nn.dot_product_attention(
        query.swapaxes(1, 2),
        keys.swapaxes(1, 2),
        values.swapaxes(1, 2),
        bias=total,
        scale=1.0,
        implementation="cudnn" if cudnn else "xla",
    )
    return mixed.swapaxes(1, 2)
