"""The sizes and variants of a T5 backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from elm_jax.errors import ElmError, nearest
from elm_jax.models.quantize import check_quantization

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "linear")
"""Names accepted in `mlp_activations`; `gelu` is exact, `gelu_tanh` is T5 1.1's approximation."""
DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "minimal", "full")
"""t5x's names: keep all activations of a block, the results of its projections, or none."""
ATTENTIONS = ("auto", "plain", "fused", "memory_efficient")
"""How attention is computed; see `elm_jax.models.attention`."""
RUN_FIELDS = (
    "dtype",
    "dropout_rate",
    "dropout_broadcast",
    "scan_layers",
    "remat",
    "attention",
    "attention_chunk",
    "quantization",
)
"""Fields which say how a backbone is run, not what it is."""


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and variants of a T5 encoder-decoder; field names are t5x's.

    T5 1.0 is `mlp_activations=('relu',), logits_via_embedding=True`; T5 1.1, LM-adapt, T0 and
    mT5 are `('gelu_tanh', 'linear'), logits_via_embedding=False`.

    Attributes:
      vocab_size: rows of the embedding, V.
      emb_dim: width of the residual stream, D.
      num_heads: attention heads, N.
      head_dim: width of a head, K; N * K need not be D.
      mlp_dim: width of the feed-forward block, F.
      num_encoder_layers: encoder blocks, L.
      num_decoder_layers: decoder blocks, L.
      mlp_activations: one activation per input projection; their product feeds the output
        projection, so two of them are a gated unit.
      logits_via_embedding: tie the output layer to the embedding (scaled by D ** -0.5).
      dropout_rate: default dropout probability in training.
      dropout_broadcast: share one dropout mask along the length, as Mesh-TensorFlow and t5x do.
      relative_attention_num_buckets: buckets of the relative position bias.
      relative_attention_max_distance: distance from which all positions share the last bucket.
      relative_attention_per_layer: every layer has a position bias of its own, as in umT5 and in
        all of t5x's `scalable_t5`; by default the layers of a stack share one.
      layer_norm_epsilon: added to the mean square in the layer norm.
      dtype: dtype of the computation, 'float32' or 'bfloat16'; layer norms' statistics, softmax
        and logits are always float32.
      scan_layers: compile one encoder and one decoder block and loop over stacked parameters, so
        that compilation takes as long for 24 layers as for one; see `elm_jax.models.scan`.
      remat: what of each block is computed again in the backward pass, to save memory: 'none',
        'minimal' (all but the results of projections) or 'full'.
      attention: 'auto', 'plain', 'fused' or 'memory_efficient'; all give equal results. See
        `elm_jax.models.attention`.
      attention_chunk: queries at a time in memory-efficient attention.
      quantization: None, or 'int8' for frozen matrices in int8; see `elm_jax.models.quantize`.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu_tanh", "linear")
    logits_via_embedding: bool = False
    dropout_rate: float = 0.1
    dropout_broadcast: bool = True
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_attention_per_layer: bool = False
    layer_norm_epsilon: float = 1e-6
    dtype: str = "float32"
    scan_layers: bool = False
    remat: str = "none"
    attention: str = "auto"
    attention_chunk: int = 128
    quantization: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):  # as configs of other libraries hold; JSON has none
                value = value.item()
                object.__setattr__(self, field.name, value)
            where = f"T5Config.{field.name}"
            integral = isinstance(value, int) and not isinstance(value, bool)
            if field.type == "int" and (not integral or value < 1):
                raise ElmError(f"{where} must be a positive integer, got {value!r}")
            if field.type == "bool" and not isinstance(value, bool):
                raise ElmError(f"{where} must be True or False, got {value!r}")
        if not self.mlp_activations:
            raise ElmError("T5Config.mlp_activations must name at least one activation")
        for name in self.mlp_activations:
            if name not in ACTIVATIONS:
                raise ElmError(
                    f"T5Config.mlp_activations: unknown activation {name!r}"
                    f"{nearest(name, ACTIVATIONS)}; accepted: {', '.join(ACTIVATIONS)}"
                )
        if self.quantization is not None:
            check_quantization(self.quantization)
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ElmError(f"T5Config.dropout_rate must be in [0, 1), got {self.dropout_rate!r}")
        for name, accepted in (
            ("dtype", DTYPES),
            ("remat", REMAT_POLICIES),
            ("attention", ATTENTIONS),
        ):
            value = getattr(self, name)
            if value not in accepted:
                raise ElmError(
                    f"T5Config.{name} must be one of {', '.join(accepted)}, got {value!r}"
                    f"{nearest(str(value), accepted)}"
                )

    @property
    def compute_dtype(self) -> Any:
        """The jax dtype of the computation."""
        return jnp.dtype(self.dtype)

    def replace(self, **changes: Any) -> T5Config:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Returns a dict that `from_json` reads back."""
        return dataclasses.asdict(self) | {"mlp_activations": list(self.mlp_activations)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> T5Config:
        """Builds a config from `to_json`'s dict.

        Raises:
          ElmError: for a key that is no field of this class, or a missing one.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in data:
            if key not in fields:
                raise ElmError(f"unknown T5Config field {key!r}{nearest(key, fields)}")
        required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in data]
        if missing:
            raise ElmError(f"T5Config lacks {', '.join(missing)}")
        return cls(**data)
