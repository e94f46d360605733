"""T5 as a Flax linen module with t5x's parameter names and an `expert` collection.

    model = T5(config, get_spec('adapter'))
    model.apply({'params': backbone, 'expert': expert}, encoder_input_tokens, decoder_input_tokens)

With `config.scan_layers` the layers of a stack are one loop over stacked arrays, named as in t5x's
`scalable_t5`: encoder/encoder/mlp/wo/kernel [L, F, D]; `models.scan` converts.

Backbone tree (t5x's): token_embedder/embedding, encoder/relpos_bias/rel_embedding,
encoder/layers_0/{pre_attention_layer_norm,attention,pre_mlp_layer_norm,mlp}, encoder/encoder_norm,
decoder/relpos_bias/rel_embedding, decoder/layers_0/{pre_self_attention_layer_norm,self_attention,
pre_cross_attention_layer_norm,encoder_decoder_attention,pre_mlp_layer_norm,mlp},
decoder/decoder_norm, decoder/logits_dense.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning

from elm_jax.models import layers
from elm_jax.models.config import T5Config
from elm_jax.models.layers import MASK_VALUE, Array
from elm_jax.models.scan import SCAN_AXIS
from elm_jax.models.specs import AdapterSpec, ExpertSpec


def _padding_mask(tokens: Array) -> Array:
    """Returns [B, 1, 1, T]: 0 where a token stands, MASK_VALUE on padding (id 0)."""
    return jnp.where(tokens > 0, 0.0, MASK_VALUE)[:, None, None, :]


def _segment_mask(query_segments: Array, key_segments: Array) -> Array:
    """Returns [B, 1, U, T]: 0 within a packed example, MASK_VALUE across examples."""
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return jnp.where(same, 0.0, MASK_VALUE)[:, None]


def _cache_slots(
    position: Array, length: int, ancestors: Array | None, *, hypotheses: int
) -> tuple[Array, Array, Array]:
    """Lays H hypotheses of each input out in one cache: slot p * H + h is h's token at position p.

    Slots never move. Whose token it was at each position says which slots a hypothesis sees, as the
    nodes above it in a tree.

    Args:
      position: int32 scalar.
      length: positions that the cache holds.
      ancestors: int32 [B, H, length], see `T5.decode_step`.
      hypotheses: H.

    Returns:
      The queries' position int32 [1]; the slots' positions int32 [length * H]; and the
      mask float32 [B or 1, 1, H, length * H].
    """
    places, owners = jnp.arange(length), jnp.arange(hypotheses)
    if ancestors is None:
        ancestors = jnp.broadcast_to(owners[None, :, None], (1, hypotheses, length))
    visible = (ancestors[..., None] == owners) & (places <= position)[:, None]
    mask = jnp.where(visible.reshape(*visible.shape[:2], -1), 0.0, MASK_VALUE)
    return position[None], jnp.repeat(places, hypotheses), mask[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Given:
    """What every layer of a stack is given alike.

    Attributes:
      queries: int32 [U] or [B, U], positions of the queries in self-attention.
      keys: int32 [T] or [B, T], positions of its keys.
      mask: float32, 0 or `MASK_VALUE`, broadcast to [B, N, U, T], or None.
      bias: float32 [..., N, U, T], the position bias where the layers share one.
      encoded: [B, T, D], the encoder's states (decoder), unless their keys are cached.
      cross_mask: float32 [B, 1, 1 or U, T], for attention to the encoder (decoder).
      position: int32 scalar, of the queries in a cached step; the keys are then its cache's slots.
      tree: whether the tokens are few beside the encoder's; see `Attention.read`.
      deterministic: whether dropout is off.
    """

    queries: Array
    keys: Array
    mask: Array | None
    bias: Array | None = None
    encoded: Array | None = None
    cross_mask: Array | None = None
    position: Array | None = None
    tree: bool = dataclasses.field(default=False, metadata={"static": True})
    deterministic: bool = dataclasses.field(default=True, metadata={"static": True})


class _Block(nn.Module):
    """What encoder, decoder and their layers share: norms, dropout, adapters, position bias."""

    config: T5Config
    spec: ExpertSpec | None

    def norm(self, name: str) -> layers.LayerNorm:
        trained = isinstance(self.spec, AdapterSpec) and self.spec.train_layer_norms
        return layers.LayerNorm(
            self.config.layer_norm_epsilon, self.config.compute_dtype, trained, name=name
        )

    def drop(self, x: Array, deterministic: bool, name: str) -> Array:
        cfg = self.config
        return layers.dropout(x, cfg.dropout_rate, cfg.dropout_broadcast, deterministic, name)

    def adapt(self, sublayer: str, x: Array, y: Array) -> Array:
        """Adds the adapter of a sublayer with input x and output y, where the spec has one."""
        spec = layers.adapter_of(self.spec, sublayer)
        if spec is None:
            return y
        adapter = layers.Adapter(spec, self.config.compute_dtype, name=f"{sublayer}_adapter")
        return y + adapter(x) if spec.placement == "parallel" else adapter(y)

    def position_bias(self, given: _Given, bidirectional: bool) -> Array:
        """Returns the stack's position bias or, where each layer has its own, makes this one's."""
        if given.bias is not None:
            return given.bias
        relpos_bias = layers.RelativePositionBias(self.config, bidirectional, name="relpos_bias")
        return relpos_bias(given.queries, given.keys)

    def feed_forward(self, x: Array, block: str, deterministic: bool) -> Array:
        h = self.norm("pre_mlp_layer_norm")(x)
        y = layers.Mlp(self.config, layers.lora_of(self.spec, block), name="mlp")(h, deterministic)
        return x + self.drop(self.adapt("mlp", h, y), deterministic, "mlp_dropout")


class EncoderLayer(_Block):
    """Self-attention and feed-forward, each with a residual; returns (x, None), as a scan wants."""

    @nn.compact
    def __call__(self, x: Array, given: _Given) -> tuple[Array, None]:
        bias, deterministic = self.position_bias(given, bidirectional=True), given.deterministic
        h = self.norm("pre_attention_layer_norm")(x)
        lora = layers.lora_of(self.spec, "encoder")
        attention = layers.Attention(self.config, lora, name="attention")
        y = attention(h, h, bias, given.mask, deterministic)
        y = self.adapt("self_attention", h, y)
        x = x + self.drop(y, deterministic, "attention_dropout")
        return self.feed_forward(x, "encoder", deterministic), None


class DecoderLayer(_Block):
    """Self-attention, attention to the encoder and feed-forward, each with a residual.

    Runs over U tokens, or in a cached step, where a position is given, over H hypotheses' tokens.
    """

    @nn.compact
    def __call__(self, x: Array, given: _Given) -> tuple[Array, None]:
        bias, deterministic = self.position_bias(given, bidirectional=False), given.deterministic
        encoded, cross_mask = given.encoded, given.cross_mask
        h = self.norm("pre_self_attention_layer_norm")(x)
        attention = layers.Attention(
            self.config, layers.lora_of(self.spec, "decoder"), name="self_attention"
        )
        if given.position is None:
            y = attention(h, h, bias, given.mask, deterministic)
        else:
            assert given.mask is not None
            y = attention.decode_self(h, given.position, bias, given.mask)
        y = self.adapt("self_attention", h, y)
        x = x + self.drop(y, deterministic, "self_attention_dropout")

        h = self.norm("pre_cross_attention_layer_norm")(x)
        attention = layers.Attention(
            self.config, layers.lora_of(self.spec, "cross"), name="encoder_decoder_attention"
        )
        assert cross_mask is not None
        if given.position is not None:
            y = attention.decode_cross(h, encoded, cross_mask)
        else:
            assert encoded is not None  # only a cached step may go without
            if given.tree:
                y = attention.read(h, encoded, cross_mask)
            else:
                y = attention(h, encoded, None, cross_mask, deterministic)
        x = x + self.drop(y, deterministic, "cross_attention_dropout")
        return self.feed_forward(x, "decoder", deterministic), None


_REMAT: dict[str, Any] = {
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


class _Stack(_Block):
    """What encoder and decoder share: their layers, in a loop that is compiled or unrolled."""

    def run_layers(self, layer: Any, name: str, count: int, x: Array, given: _Given) -> Array:
        """Runs x through `count` layers of a class; `name` is that of the scanned ones."""
        cfg = self.config
        if not cfg.relative_attention_per_layer:
            bias = self.position_bias(given, bidirectional=layer is EncoderLayer)
            given = dataclasses.replace(given, bias=bias)
        if cfg.remat != "none":
            layer = nn.remat(layer, policy=_REMAT[cfg.remat], prevent_cse=not cfg.scan_layers)
        if not cfg.scan_layers:
            for i in range(count):
                x, _ = layer(cfg, self.spec, name=f"layers_{i}")(x, given)
            return x
        scanned = partitioning.scan_with_axes(
            layer,
            variable_axes={"params": SCAN_AXIS, "expert": SCAN_AXIS, "cache": 0},
            split_rngs={"params": True, "expert": True, "dropout": True},
            in_axes=(nn.broadcast,),
            length=count,
            axis_name="layers",
            axes_collections=("params", "expert"),
        )
        return scanned(cfg, self.spec, name=name)(x, given)[0]


class Encoder(_Stack):
    """Token embeddings [B, T, D] to hidden states [B, T, D]."""

    @nn.compact
    def __call__(self, x: Array, mask: Array, deterministic: bool) -> Array:
        positions = jnp.arange(x.shape[1])
        given = _Given(positions, positions, mask, deterministic=deterministic)
        x = self.drop(x, deterministic, "input_dropout")
        x = self.run_layers(EncoderLayer, "encoder", self.config.num_encoder_layers, x, given)
        return self.drop(self.norm("encoder_norm")(x), deterministic, "output_dropout")


class Decoder(_Stack):
    """Target tokens int32 [B, U] to hidden states [B, U, D], attending to the encoder's states."""

    embedder: layers.Embed

    def setup(self) -> None:
        cfg = self.config
        if not cfg.logits_via_embedding:
            self.logits_dense = layers.Dense(
                cfg.vocab_size, ("embed", "vocab"), cfg.compute_dtype, out_dtype=jnp.float32
            )

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        encoded: Array | None,
        segment_mask: Array | None,
        cross_mask: Array,
        deterministic: bool,
        step: tuple[Array, int, Array | None] | None = None,
        tree: tuple[Array, Array] | None = None,
    ) -> Array:
        """Runs over a sequence, over hypotheses' tokens at one position with a cache (`step`:
        position, length, ancestors; see `T5.decode_step`), or over a tree of tokens (`tree`: depths
        int32 [B, U], visible bool [B, U, U])."""
        mask: Array | None = None
        if tree is not None:
            queries = keys = tree[0]
            mask = jnp.where(tree[1], 0.0, MASK_VALUE)[:, None]
        elif step is None:
            queries = keys = jnp.arange(tokens.shape[1])
            mask = jnp.where(keys[None, :] <= queries[:, None], 0.0, MASK_VALUE)
            if segment_mask is not None:
                mask = jnp.minimum(mask, segment_mask)
        else:
            queries, keys, mask = _cache_slots(*step, hypotheses=tokens.shape[1])
        given = _Given(
            queries,
            keys,
            mask,
            encoded=encoded,
            cross_mask=cross_mask,
            position=None if step is None else step[0],
            tree=tree is not None,
            deterministic=deterministic,
        )
        x = self.drop(self.embedder(tokens), deterministic, "input_dropout")
        x = self.run_layers(DecoderLayer, "decoder", self.config.num_decoder_layers, x, given)
        return self.drop(self.norm("decoder_norm")(x), deterministic, "output_dropout")

    def logits(self, x: Array) -> Array:
        """Scores hidden states [..., D] against each token: float32 [..., V]."""
        cfg = self.config
        if cfg.logits_via_embedding:
            return self.embedder.attend(x * cfg.emb_dim**-0.5)
        return self.logits_dense(x)


class T5(nn.Module):
    """The encoder-decoder of Raffel et al. (2020), specialised by an expert.

    Initialise with random streams `params` and (with an adapter or LoRA) `expert`; train with
    `dropout`.

    Attributes:
      config: sizes and variants.
      spec: the expert's parts inside the model; None and `FullSpec` have none.
    """

    config: T5Config
    spec: ExpertSpec | None = None

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = layers.Embed(cfg.vocab_size, cfg.emb_dim, cfg.compute_dtype)
        self.encoder = Encoder(cfg, self.spec)
        self.decoder = Decoder(cfg, self.spec, self.token_embedder)

    def encode(
        self,
        encoder_input_tokens: Array,
        *,
        encoder_segment_ids: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Encodes tokens int32 [B, T] (0 is padding) to hidden states [B, T, D]."""
        mask = _padding_mask(encoder_input_tokens)
        if encoder_segment_ids is not None:
            mask = jnp.minimum(mask, _segment_mask(encoder_segment_ids, encoder_segment_ids))
        return self.encoder(self.token_embedder(encoder_input_tokens), mask, deterministic)

    def decode(
        self,
        encoded: Array,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        *,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Scores the next token at each target position.

        Args:
          encoded: [B, T, D], from `encode`.
          encoder_input_tokens: int32 [B, T], for the padding mask.
          decoder_input_tokens: int32 [B, U], the targets shifted right by one.
          encoder_segment_ids: int32 [B, T], for packed examples.
          decoder_segment_ids: int32 [B, U], for packed examples.
          deterministic: whether dropout is off.

        Returns:
          Logits, float32 [B, U, V].
        """
        cross_mask = _padding_mask(encoder_input_tokens)
        segment_mask = None
        if encoder_segment_ids is not None and decoder_segment_ids is not None:
            segment_mask = _segment_mask(decoder_segment_ids, decoder_segment_ids)
            cross_mask = jnp.minimum(
                cross_mask, _segment_mask(decoder_segment_ids, encoder_segment_ids)
            )
        return self.logits(
            self.decoder(decoder_input_tokens, encoded, segment_mask, cross_mask, deterministic)
        )

    def decode_tree(
        self,
        encoded: Array,
        encoder_input_tokens: Array,
        nodes: Array,
        depths: Array,
        visible: Array,
    ) -> Array:
        """Decodes several continuations of one input at once, each shared beginning a single time.

        Args:
          encoded: [B, T, D], from `encode`.
          encoder_input_tokens: int32 [B, T], for the padding mask.
          nodes: int32 [B, U], the tokens of a prefix tree in any order.
          depths: int32 [B, U], each node's position in its sequence, from 0 at the root.
          visible: bool [B, U, U], whether the second node is the first one or above it.

        Returns:
          Hidden states [B, U, D], for `logits`.
        """
        cross_mask = _padding_mask(encoder_input_tokens)
        return self.decoder(nodes, encoded, None, cross_mask, True, tree=(depths, visible))

    def logits(self, hidden: Array) -> Array:
        """Scores each token after decoder states [..., D]: float32 [..., V]."""
        return self.decoder.logits(hidden)

    def decode_step(
        self,
        tokens: Array,
        position: Array,
        encoder_input_tokens: Array,
        *,
        length: int,
        ancestors: Array | None = None,
        encoded: Array | None = None,
    ) -> Array:
        """Scores the token after `tokens` with a KV cache (the mutable collection `cache`).

        H hypotheses of an input share the keys and values of its encoder states, and one cache of
        their own. A beam search, where a hypothesis goes on from another, says so in `ancestors`
        and need not move the cache.

        Args:
          tokens: int32 [B, H], the tokens at `position`; 0 at the start.
          position: int32 scalar, counted from 0.
          encoder_input_tokens: int32 [B, T], for the padding mask.
          length: capacity of the cache, at least the number of steps.
          ancestors: int32 [B, H, length], as whose the token of each hypothesis at each position
            was given: its own at `position`, any after it. None where all are their own.
          encoded: [B, T, D]; needed in the first step, which caches its keys and values.

        Returns:
          Logits, float32 [B, H, V].
        """
        cross_mask = _padding_mask(encoder_input_tokens)
        step = (jnp.asarray(position, jnp.int32), length, ancestors)
        return self.logits(self.decoder(tokens, encoded, None, cross_mask, True, step))

    def __call__(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        *,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Encodes, then decodes under teacher forcing; see `encode` and `decode`."""
        encoded = self.encode(
            encoder_input_tokens,
            encoder_segment_ids=encoder_segment_ids,
            deterministic=deterministic,
        )
        return self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            deterministic=deterministic,
        )
