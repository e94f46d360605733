"""The trainable model that t5x's train, eval and infer scripts take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import seqio
from flax.core import unfreeze
from t5x import models as t5x_models
from t5x import optimizers as t5x_optimizers

from elm_jax.decoding.greedy import greedy_decode
from elm_jax.errors import ElmError
from elm_jax.experts.apply import bind_variables, init_expert, logical_axes
from elm_jax.experts.tree import Tree, flatten, unflatten
from elm_jax.models import T5, ExpertSpec, T5Config
from elm_jax.t5x.experts import join, split
from elm_jax.training.loop import expert_key
from elm_jax.training.step import LossSpec, token_loss

Batch = Mapping[str, jax.Array]


class ExpertModel(t5x_models.BaseTransformerModel):
    """A frozen backbone with one expert, as t5x wants a model.

    t5x's `params` are `experts.join(backbone, expert)`. The backbone gets no gradient
    (`stop_gradient`) and no update (`optimizers.ExpertOptimizer`). Loss, metrics, z-loss, label
    smoothing and the loss's normalisation are t5x's own.

    Args:
      config: the backbone's.
      spec: what the expert is made of; None is the bare backbone, for eval and infer.
      input_vocabulary: the task's, of 'inputs'.
      output_vocabulary: the task's, of 'targets'.
      optimizer_def: unused by eval and infer, which take None.
      label_smoothing: t5x's.
      z_loss: t5x's.
      loss_normalizing_factor: t5x's; by default the mean over target tokens, as the native loop.
      decode_fn: called with (T5, variables, tokens [B, T], max_decode_len=U), returns [B, U].
      seed: with it the expert starts as the native loop's does from that seed; None takes t5x's
        random stream.
      expert_id: the other half of that start.
    """

    FEATURE_CONVERTER_CLS = seqio.EncDecFeatureConverter

    def __init__(
        self,
        config: T5Config,
        spec: ExpertSpec | None,
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        optimizer_def: t5x_optimizers.OptimizerDefType | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        loss_normalizing_factor: float | str | None = "NUM_REAL_TARGET_TOKENS",
        decode_fn: Callable[..., jax.Array] = greedy_decode,
        seed: int | None = None,
        expert_id: str = "expert",
    ) -> None:
        self.config = config
        self.spec = spec
        self.seed = seed
        self.expert_id = expert_id
        super().__init__(
            module=T5(config, spec),
            input_vocabulary=input_vocabulary,
            output_vocabulary=output_vocabulary,
            optimizer_def=optimizer_def,
            decode_fn=decode_fn,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            loss_normalizing_factor=loss_normalizing_factor,
        )

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Any],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Returns a random backbone, a fresh expert, and the axis names of both.

        Args:
          rng: for the backbone, and for the expert where the model has no seed.
          input_shapes: of the batch; the variables do not depend on them.
          input_types: likewise.

        Returns:
          `params` and `params_axes`, the latter with an AxisMetadata for each array.
        """
        del input_shapes, input_types
        tokens = jnp.ones((1, 8), jnp.int32)
        backbone = T5(self.config).init({"params": rng}, tokens, tokens)["params"]
        axes, expert_axes = logical_axes(self.config, self.spec)
        if self.spec is None:
            return {"params": dict(backbone), "params_axes": _metadata(axes)}
        key = rng if self.seed is None else expert_key(self.seed, self.expert_id)
        expert = init_expert(self.config, self.spec, key)
        return {
            "params": join(backbone, expert),
            "params_axes": _metadata(join(axes, expert_axes)),
        }

    def _compute_logits(
        self, params: Mapping[str, Any], batch: Batch, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """Scores each target token, float32 [B, U, V]; dropout where there is a random key."""
        return self.module.apply(
            self.variables(params),
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            encoder_segment_ids=batch.get("encoder_segment_ids"),
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            deterministic=dropout_rng is None,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        )

    def variables(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what `T5.apply` takes, for t5x's params; the backbone is frozen.

        Raises:
          ElmError: if the params hold no expert and the model has a spec, or the other way round.
        """
        backbone, expert = split(unfreeze({**params}))
        if (expert is None) != (self.spec is None):
            found = "no expert" if expert is None else "an expert"
            raise ElmError(f"the parameters hold {found}, but the model's spec is {self.spec}")
        return bind_variables(self.spec, jax.lax.stop_gradient(backbone), expert)

    def predict_batch_with_aux(
        self, params: Mapping[str, Any], batch: Batch, rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Decodes a batch.

        Args:
          params: t5x's.
          batch: `encoder_input_tokens` int32 [B, T]; the width of `decoder_input_tokens` [B, U]
            is the most tokens to decode.
          rng: unused, decoding is greedy by default.

        Returns:
          Tokens int32 [B, U], and {'scores': float32 [B]}, their log-probability.
        """
        del rng
        variables = self.variables(params)
        length = batch["decoder_input_tokens"].shape[1]
        tokens = self.decode_fn(
            self.module, variables, batch["encoder_input_tokens"], max_decode_len=length
        )
        decoded = {
            "encoder_input_tokens": batch["encoder_input_tokens"],
            "decoder_input_tokens": jnp.pad(tokens[:, :-1], ((0, 0), (1, 0))),
            "decoder_target_tokens": tokens,
            "decoder_loss_weights": tokens > 0,
        }
        return tokens, {"scores": self.score_batch(params, decoded)}

    def score_batch(
        self, params: Mapping[str, Any], batch: Batch, return_intermediates: bool = False
    ) -> jax.Array:
        """Returns the log-probability of each row's targets, float32 [B].

        Raises:
          ElmError: for `return_intermediates`, of which this model has none.
        """
        if return_intermediates:
            raise ElmError("score_batch: this model records no intermediates")
        logits = self._compute_logits(params, batch)
        loss = token_loss(logits, batch["decoder_target_tokens"], LossSpec())
        return -jnp.sum(loss * batch["decoder_loss_weights"], axis=-1)


def _metadata(axes: Tree) -> Tree:
    """Turns a tree of axis names into what flax records: `<name>_axes` with an AxisMetadata."""
    from flax.linen.partitioning import AxisMetadata

    return unflatten(
        {f"{path}_axes": AxisMetadata(names=tuple(names)) for path, names in flatten(axes).items()}
    )
