"""The layers of a T5, each of which may carry a part of an expert.

Backbone arrays live in `params` under t5x's names, expert arrays in `expert` under the same module
path. Every array has logical axis names (recorded in `params_axes` and `expert_axes` by `init`).
Shapes: B batch, T keys, U queries, D model, F mlp, N heads, K head dim, E adapter, R rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning

from elm_jax.models.attention import attend
from elm_jax.models.config import T5Config
from elm_jax.models.quantize import dequantize_kernel, int8_matmul
from elm_jax.models.specs import AdapterSpec, ExpertSpec, LoraSpec

Array = jax.Array
MASK_VALUE = -1e10
"""Added to attention scores of masked positions (t5x's value)."""
FEW_ROWS = 64
"""Up to so many rows a CPU is faster if their logits are made from the embedding's side."""

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}
_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
# PEFT's kaiming_uniform(a=sqrt(5)): uniform in +-1/sqrt(fan_in).
_lora_a_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def _expert_array(
    module: nn.Module,
    name: str,
    init: Callable[..., Array],
    shape: tuple[int, ...],
    axes: tuple[str, ...],
) -> Array:
    """Declares one array of the `expert` collection, drawn from the `expert` random stream."""
    variable = partitioning.variable_with_axes(
        "expert",
        name,
        lambda: init(module.make_rng("expert"), shape, jnp.float32),
        axes=axes,
        module=module,
    )
    return variable.value


def _apply_expert(
    module: nn.Module, fn: Callable[..., Array], x: Array, *arrays: Array, ndim: int
) -> Array:
    """Applies a part of an expert, fn(x, *arrays); in a mixed batch, to each example its own.

    In a mixed batch (see `experts.routing`) the arrays have a leading axis over the B examples, or
    over G groups of examples that share an expert; 'rows' [G * S] and 'places' [B] beside the
    arrays then say who is in which group.

    Args:
      module: whose `expert` collection holds the arrays.
      fn: the part, as for one expert; it keeps x's leading axis.
      x: [B, ...].
      *arrays: what the expert has here.
      ndim: axes that the first array has in one expert.

    Returns:
      [B, ...], what `fn` makes of x.
    """
    if arrays[0].ndim == ndim:
        return fn(x, *arrays)
    groups = arrays[0].shape[0]
    if not module.has_variable("expert", "rows"):
        return jax.vmap(fn)(x[:, None], *arrays)[:, 0]
    rows: Array = module.get_variable("expert", "rows")
    places: Array = module.get_variable("expert", "places")
    grouped = jnp.take(x, rows, axis=0, mode="fill", fill_value=0)
    y = jax.vmap(fn)(grouped.reshape(groups, -1, *x.shape[1:]), *arrays)
    return y.reshape(len(rows), *y.shape[2:])[places]


def dropout(x: Array, rate: float, broadcast: bool, deterministic: bool, name: str) -> Array:
    """Applies dropout to [..., length, features], sharing the mask along the length if asked."""
    dims = (-2,) if broadcast else ()
    return nn.Dropout(rate=rate, broadcast_dims=dims, name=name)(x, deterministic=deterministic)


class Dense(nn.Module):
    """x @ kernel without bias, plus a low-rank update where `lora` is given.

    params: kernel [in, out]; expert: lora_a [in, R], lora_b [R, out]. Inputs are cast to `dtype`;
    the product is of that dtype, too, unless `out_dtype` keeps more of its sums. Quantised, the
    kernel is int8 and has a kernel_scale [out] beside it.
    """

    features: int
    kernel_axes: tuple[str, str]
    dtype: Any
    lora: LoraSpec | None = None
    kernel_init: Callable[..., Array] = _kernel_init
    out_dtype: Any = None
    quantization: str | None = None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        shape = (x.shape[-1], self.features)
        x = x.astype(self.dtype)
        if self.quantization is None:
            kernel = partitioning.param_with_axes(
                "kernel", self.kernel_init, shape, jnp.float32, axes=self.kernel_axes
            )
            y = jnp.matmul(x, kernel.astype(self.dtype), preferred_element_type=self.out_dtype)
        else:
            kernel = partitioning.param_with_axes(
                "kernel", nn.initializers.zeros, shape, jnp.int8, axes=self.kernel_axes
            )
            scale = partitioning.param_with_axes(
                "kernel_scale",
                nn.initializers.ones,
                shape[1:],
                jnp.float32,
                axes=self.kernel_axes[1:],
            )
            y = int8_matmul(x, kernel, scale)
        if self.lora is not None:
            spec = self.lora
            fan_in, fan_out = self.kernel_axes
            a = _expert_array(self, "lora_a", _lora_a_init, (shape[0], spec.rank), (fan_in, "rank"))
            b = _expert_array(
                self, "lora_b", nn.initializers.zeros, (spec.rank, shape[1]), ("rank", fan_out)
            )
            h = nn.Dropout(spec.dropout_rate)(x, deterministic=deterministic)
            a, b = a.astype(self.dtype), (b * spec.scale).astype(self.dtype)
            y = y + _apply_expert(self, lambda h, a, b: (h @ a) @ b, h, a, b, ndim=2)
        return y

    def from_heads(self, x: Array) -> Array:
        """Multiplies x [B, N, U, K] by the transpose of each head's part: [B, N, U, in]."""
        heads, width = x.shape[1], x.shape[3]

        def update(x: Array, a: Array, b: Array) -> Array:
            low = jnp.einsum("bnqk,rnk->bnqr", x, b.reshape(-1, heads, width))
            return jnp.einsum("bnqr,dr->bnqd", low, a)

        y = jnp.einsum("bnqk,dnk->bnqd", x, self._kernel().reshape(-1, heads, width))
        return y + self._low_rank(update, x) if self.lora is not None else y

    def to_heads(self, x: Array) -> Array:
        """Multiplies x [B, N, U, in] by each head's part: [B, U, N, K]."""
        heads = x.shape[1]

        def update(x: Array, a: Array, b: Array) -> Array:
            low = jnp.einsum("bnqd,dr->bnqr", x, a)
            return jnp.einsum("bnqr,rnk->bqnk", low, b.reshape(len(b), heads, -1))

        kernel = self._kernel().reshape(x.shape[3], heads, -1)
        y = jnp.einsum("bnqd,dnk->bqnk", x, kernel)
        return y + self._low_rank(update, x) if self.lora is not None else y

    def _kernel(self) -> Array:
        kernel: Array = self.get_variable("params", "kernel")
        if self.quantization is not None:
            kernel = dequantize_kernel(kernel, self.get_variable("params", "kernel_scale"))
        return kernel.astype(self.dtype)

    def _low_rank(self, update: Callable[..., Array], x: Array) -> Array:
        assert self.lora is not None
        a: Array = self.get_variable("expert", "lora_a")
        b: Array = self.get_variable("expert", "lora_b")
        a, b = a.astype(self.dtype), (b * self.lora.scale).astype(self.dtype)
        return _apply_expert(self, update, x, a, b, ndim=2)


class Adapter(nn.Module):
    """The bottleneck adapter of Jang et al. (2023), FFN_e (equation 3).

    expert: down_kernel [D, E], up_kernel [E, D] and, with biases, down_bias [E], up_bias [D].
    """

    spec: AdapterSpec
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        spec, dim = self.spec, x.shape[-1]
        down_init = (
            nn.initializers.lecun_normal()
            if spec.init_stddev is None
            else nn.initializers.normal(spec.init_stddev)
        )
        up_init = (
            nn.initializers.normal(spec.up_init_stddev)
            if spec.up_init_stddev
            else nn.initializers.zeros
        )
        x = x.astype(self.dtype)
        down = _expert_array(
            self, "down_kernel", down_init, (dim, spec.bottleneck), ("embed", "adapter")
        )
        up = _expert_array(self, "up_kernel", up_init, (spec.bottleneck, dim), ("adapter", "embed"))
        arrays = [down, up]
        if spec.use_bias:
            zeros = nn.initializers.zeros
            arrays += [
                _expert_array(self, "down_bias", zeros, (spec.bottleneck,), ("adapter",)),
                _expert_array(self, "up_bias", zeros, (dim,), ("embed",)),
            ]

        def feed_forward(x: Array, down: Array, up: Array, *biases: Array) -> Array:
            h = x @ down + biases[0] if biases else x @ down
            y = _ACTIVATIONS[spec.activation](h) @ up
            return y + biases[1] if biases else y

        arrays = [array.astype(self.dtype) for array in arrays]
        y = _apply_expert(self, feed_forward, x, *arrays, ndim=2)
        return x + y if spec.inner_residual else y


class LayerNorm(nn.Module):
    """T5's layer norm: scale by the root mean square, no centring, no bias.

    params: scale [D]; expert (only where layer norms are trained): scale_delta [D].
    """

    epsilon: float
    dtype: Any
    trained: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        shape = (x.shape[-1],)
        scale = partitioning.param_with_axes(
            "scale", nn.initializers.ones, shape, jnp.float32, axes=("embed",)
        ).astype(jnp.float32)
        y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        if not self.trained:
            return (y * scale).astype(self.dtype)
        delta = _expert_array(self, "scale_delta", nn.initializers.zeros, shape, ("embed",))
        y = _apply_expert(self, lambda y, delta: y * (scale + delta), y, delta, ndim=1)
        return y.astype(self.dtype)


class Embed(nn.Module):
    """Token embedding [V, D], used for look-up and, where tied, for the logits."""

    num_embeddings: int
    features: int
    dtype: Any

    def setup(self) -> None:
        self.embedding = partitioning.param_with_axes(
            "embedding",
            nn.initializers.normal(1.0),
            (self.num_embeddings, self.features),
            jnp.float32,
            axes=("vocab", "embed"),
            module=self,
        )

    def __call__(self, tokens: Array) -> Array:
        """Looks tokens [B, T] up: [B, T, D]."""
        return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

    def attend(self, x: Array) -> Array:
        """Scores x [B, U, D] against each token: float32 [B, U, V]."""
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        embedding = self.embedding.astype(x.dtype)
        if jax.default_backend() == "cpu" and math.prod(x.shape[:-1]) <= FEW_ROWS:
            # XLA would take the embedding for the right operand, which it packs anew in each call;
            # the barrier keeps it the left one, which is read as it lies.
            scores = jax.lax.optimization_barrier(product("vd,...d->v...", embedding, x))
            return jnp.moveaxis(scores, 0, -1)
        return product("...d,vd->...v", x, embedding)


def relative_position_bucket(
    relative_position: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """Maps key position minus query position to a bucket (Raffel et al. 2020, section 2.1).

    Half of the buckets hold exact offsets, half grow logarithmically up to `max_distance`.

    Args:
      relative_position: int32, any shape.
      bidirectional: whether keys after the query have buckets of their own.
      num_buckets: how many buckets there are in all.
      max_distance: from here on every offset is in the last bucket.

    Returns:
      int32 of the same shape, in [0, num_buckets).
    """
    bucket = jnp.zeros_like(relative_position)
    distance = -relative_position
    if bidirectional:
        num_buckets //= 2
        bucket = bucket + (distance < 0).astype(jnp.int32) * num_buckets
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(distance, 0)
    exact = num_buckets // 2
    logarithmic = exact + (
        jnp.log(distance.astype(jnp.float32) / exact + jnp.finfo(jnp.float32).eps)
        / jnp.log(max_distance / exact)
        * (num_buckets - exact)
    ).astype(jnp.int32)
    logarithmic = jnp.minimum(logarithmic, num_buckets - 1)
    return bucket + jnp.where(distance < exact, distance, logarithmic)


class RelativePositionBias(nn.Module):
    """T5's learned bias per head and bucket; params: rel_embedding [N, buckets]."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, query_positions: Array, key_positions: Array) -> Array:
        """Returns float32 [..., N, U, T] for positions int32 [..., U] and [..., T]."""
        cfg = self.config
        embedding = partitioning.param_with_axes(
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (cfg.num_heads, cfg.relative_attention_num_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        ).astype(jnp.float32)
        bucket = relative_position_bucket(
            key_positions[..., None, :] - query_positions[..., :, None],
            bidirectional=self.bidirectional,
            num_buckets=cfg.relative_attention_num_buckets,
            max_distance=cfg.relative_attention_max_distance,
        )
        return jnp.moveaxis(jnp.take(embedding, bucket, axis=1), 0, -3)


class Attention(nn.Module):
    """Multi-head attention without scaling of the scores, as T5's.

    params: query, key, value, out, each with a kernel of [D, N * K] or [N * K, D].
    cache (decoding): key, value [B, N, length * H, K] in self-attention, where H hypotheses of an
    input share it; [B, N, T, K] in cross-attention.
    """

    config: T5Config
    lora: LoraSpec | None = None

    def setup(self) -> None:
        cfg = self.config
        joined = cfg.num_heads * cfg.head_dim

        def projection(
            short: str, features: int, axes: tuple[str, str], init: Any = _kernel_init
        ) -> Dense:
            lora = self.lora if self.lora is not None and short in self.lora.targets else None
            return Dense(
                features, axes, cfg.compute_dtype, lora, init, quantization=cfg.quantization
            )

        # T5 folds the usual 1 / sqrt(K) of the scores into the initial query kernel.
        query_init = nn.initializers.variance_scaling(
            1.0 / cfg.head_dim, "fan_in", "truncated_normal"
        )
        self.query = projection("q", joined, ("embed", "joined_kv"), query_init)
        self.key = projection("k", joined, ("embed", "joined_kv"))
        self.value = projection("v", joined, ("embed", "joined_kv"))
        self.out = projection("o", cfg.emb_dim, ("joined_kv", "embed"))
        # A mask shared along the queries drops whole keys: dropping their values [B, N, T, K] is
        # the same, costs less, and leaves the weights to any kernel.
        self.attention_dropout = nn.Dropout(
            cfg.dropout_rate, broadcast_dims=(-1,) if cfg.dropout_broadcast else ()
        )

    def _split(self, x: Array) -> Array:
        # Heads before the length: the batched products below need no other layout, in a cache too.
        heads = x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)
        return heads.swapaxes(-2, -3)

    def keys_values(self, x: Array, deterministic: bool = True) -> tuple[Array, Array]:
        """Projects x [B, T, D] to keys and values, each [B, N, T, K]."""
        return self._split(self.key(x, deterministic)), self._split(self.value(x, deterministic))

    def attend(
        self,
        x: Array,
        keys: Array,
        values: Array,
        bias: Array | None,
        mask: Array | None,
        deterministic: bool,
    ) -> Array:
        """Attends from x [B, U, D] to keys and values [B, N, T, K].

        Args:
          x: queries' source.
          keys: [B, N, T, K].
          values: [B, N, T, K].
          bias: float32, broadcast to [B, N, U, T], or None.
          mask: float32, 0 or `MASK_VALUE`, broadcast to [B, N, U, T], or None.
          deterministic: whether dropout is off.

        Returns:
          [B, U, D].
        """
        cfg = self.config
        query = self._split(self.query(x, deterministic))
        drop = None
        if not deterministic and cfg.dropout_rate > 0:
            drop = functools.partial(self.attention_dropout, deterministic=False)
            if cfg.dropout_broadcast:
                values, drop = drop(values), None
        mixed = attend(
            cfg.attention, query, keys, values, bias, mask, chunk=cfg.attention_chunk, drop=drop
        ).swapaxes(-2, -3)
        return self.out(mixed.reshape(*mixed.shape[:-2], -1), deterministic)

    def __call__(
        self,
        x: Array,
        source: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Attends from x [B, U, D] to source [B, T, D]; see `attend`."""
        keys, values = self.keys_values(source, deterministic)
        return self.attend(x, keys, values, bias, mask, deterministic)

    def read(self, x: Array, source: Array, mask: Array) -> Array:
        """Attends from x [B, U, D] to source [B, T, D] as `__call__` does, without dropout.

        For few queries it is cheaper to bring them to the source than to make its keys and
        values: q (s W_k)^T = (q W_k^T) s^T, and w (s W_v) = (w s) W_v.
        """
        cfg, queries, length = self.config, x.shape[1], source.shape[1]
        brought = queries * cfg.emb_dim * (cfg.head_dim + length)
        made = length * cfg.head_dim * (cfg.emb_dim + queries)
        if 2 * brought > made:  # 2: products with a kernel run nearer to the machine's peak
            return self(x, source, None, mask)
        query = self.key.from_heads(self._split(self.query(x)))
        scores = jnp.einsum("bnqd,btd->bnqt", query, source, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores + mask, axis=-1).astype(cfg.compute_dtype)
        mixed = jnp.einsum("bnqt,btd->bnqd", weights, source)
        mixed = self.value.to_heads(mixed)
        return self.out(mixed.reshape(*mixed.shape[:-2], -1))

    @nn.compact
    def decode_self(self, x: Array, position: Array, bias: Array, mask: Array) -> Array:
        """One step of self-attention with a cache of T slots, H for each position.

        Args:
          x: [B, H, D], the tokens of H hypotheses at `position`.
          position: int32 scalar.
          bias: float32 [N, 1, T].
          mask: float32, 0 or `MASK_VALUE`, broadcast to [B, 1, H, T].
        """
        keys, values = self.keys_values(x)
        shape = (*keys.shape[:2], mask.shape[-1], keys.shape[3])
        cached_key = self.variable("cache", "self_key", jnp.zeros, shape, keys.dtype)
        cached_value = self.variable("cache", "self_value", jnp.zeros, shape, values.dtype)
        start = (0, 0, position * x.shape[1], 0)
        cached_key.value = jax.lax.dynamic_update_slice(cached_key.value, keys, start)
        cached_value.value = jax.lax.dynamic_update_slice(cached_value.value, values, start)
        return self.attend(x, cached_key.value, cached_value.value, bias, mask, deterministic=True)

    def decode_cross(self, x: Array, encoded: Array | None, mask: Array) -> Array:
        """One step of cross-attention from x [B, H, D]; caches keys and values of `encoded`."""
        if encoded is not None:
            keys, values = self.keys_values(encoded)
            self.put_variable("cache", "cross_key", keys)
            self.put_variable("cache", "cross_value", values)
        keys = self.get_variable("cache", "cross_key")
        values = self.get_variable("cache", "cross_value")
        return self.attend(x, keys, values, None, mask, deterministic=True)


class Mlp(nn.Module):
    """T5's feed-forward block, plain or gated.

    params: wi (or wi_0, wi_1, ... when gated) kernel [D, F], wo kernel [F, D].
    """

    config: T5Config
    lora: LoraSpec | None = None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        cfg = self.config

        def projection(short: str, name: str, features: int, axes: tuple[str, str]) -> Dense:
            lora = self.lora if self.lora is not None and short in self.lora.targets else None
            return Dense(
                features,
                axes,
                cfg.compute_dtype,
                lora,
                quantization=cfg.quantization,
                name=name,
            )

        h: Array | None = None
        for i, activation in enumerate(cfg.mlp_activations):
            name = "wi" if len(cfg.mlp_activations) == 1 else f"wi_{i}"
            part = projection("wi", name, cfg.mlp_dim, ("embed", "mlp"))(x, deterministic)
            part = _ACTIVATIONS[activation](part)
            h = part if h is None else h * part
        assert h is not None  # T5Config requires at least one activation
        h = dropout(h, cfg.dropout_rate, cfg.dropout_broadcast, deterministic, "dropout")
        return projection("wo", "wo", cfg.emb_dim, ("mlp", "embed"))(h, deterministic)


def lora_of(spec: ExpertSpec | None, block: str) -> LoraSpec | None:
    """Returns the LoRA spec if `spec` is one that reaches this block."""
    return spec if isinstance(spec, LoraSpec) and block in spec.blocks else None


def adapter_of(spec: ExpertSpec | None, sublayer: str) -> AdapterSpec | None:
    """Returns the adapter spec if `spec` is one that sits on this sublayer."""
    return spec if isinstance(spec, AdapterSpec) and sublayer in spec.sublayers else None
