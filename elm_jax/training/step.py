"""The training step: X experts over one frozen backbone, in one compiled function.

Each expert of the stack has its own batch, random stream, optimizer state, clipping and metrics;
the backbone is an argument without gradient, is not in the state, and is never donated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from elm_jax.errors import ElmError
from elm_jax.experts.apply import bind_variables
from elm_jax.experts.tree import Tree
from elm_jax.models import T5, ExpertSpec

Batch = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes, for a stack of X experts.

    Attributes:
      step: int32 scalar, optimizer steps done; also the position in every data stream.
      expert: the stacked experts, each array [X, ...].
      opt_state: the stacked optimizer states.
    """

    step: jax.Array
    expert: Tree
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """The training loss.

    Attributes:
      label_smoothing: probability mass spread evenly over the vocabulary.
      z_loss: weight of log(Z)^2, which keeps the logits' scale (Mesh-TensorFlow, t5x).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ElmError(f"label_smoothing must be in [0, 1), got {self.label_smoothing!r}")
        if not 0.0 <= self.z_loss < math.inf:
            raise ElmError(f"z_loss must not be negative, got {self.z_loss!r}")


def token_loss(logits: jax.Array, targets: jax.Array, spec: LossSpec) -> jax.Array:
    """Returns the cross-entropy of each token, float32 [B, U].

    Args:
      logits: float32 [B, U, V].
      targets: int32 [B, U].
      spec: smoothing and z-loss.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - picked
    if spec.label_smoothing:
        even = log_z - jnp.mean(logits, axis=-1)
        loss = (1 - spec.label_smoothing) * loss + spec.label_smoothing * even
    if spec.z_loss:
        loss = loss + spec.z_loss * jnp.square(log_z)
    return loss


def loss_and_metrics(
    model: T5,
    spec: ExpertSpec,
    loss_spec: LossSpec,
    expert: Tree,
    backbone: Tree,
    batch: Batch,
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the summed loss of a batch and its sums: loss, target tokens, hits, all tokens."""
    logits: Any = model.apply(
        bind_variables(spec, backbone, expert),
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        encoder_segment_ids=batch.get("encoder_segment_ids"),
        decoder_segment_ids=batch.get("decoder_segment_ids"),
        deterministic=False,
        rngs={"dropout": key},
    )
    targets = batch["decoder_target_tokens"]
    weights = batch["decoder_loss_weights"].astype(jnp.float32)
    loss = jnp.sum(token_loss(logits, targets, loss_spec) * weights)
    # Not argmax, which a CPU is slow at; the maximum is the loss's own. A tie counts as a hit.
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    hits = jnp.sum((picked >= jnp.max(logits, axis=-1)) * weights)
    tokens = jnp.sum(batch["encoder_input_tokens"] > 0) + jnp.sum(targets > 0)
    sums = {"loss": loss, "targets": jnp.sum(weights), "hits": hits, "tokens": tokens}
    return loss, {name: value.astype(jnp.float32) for name, value in sums.items()}


def make_train_step(
    model: T5,
    spec: ExpertSpec,
    optimizer: optax.GradientTransformation,
    *,
    loss_spec: LossSpec | None = None,
    accumulation: int = 1,
    one_by_one: bool = False,
) -> Callable[[TrainState, Tree, jax.Array, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the step over a stack of experts; jit it with the state donated.

    Args:
      model: T5(config, spec).
      spec: what the experts are made of.
      optimizer: of one expert.
      loss_spec: the loss; cross-entropy over target tokens by default.
      accumulation: microbatches per step; they must divide B.
      one_by_one: loop over the experts inside the step instead of batching them. On a CPU that is
        faster, as the activations of one expert fit its caches, and needs less memory; the
        experts' axis must not be sharded then.

    Returns:
      step(state, backbone, keys [X], batch of [X, B, ...]) -> (state, metrics), where the metrics
      are float32 [X]: 'loss' (mean per target token), 'accuracy' (of target tokens, in [0, 1]),
      'tokens' (without padding, inputs and targets), 'grad_norm' (before clipping), and
      'expert_norm' (after the update).
    """
    losses = loss_spec or LossSpec()
    grad_fn = jax.grad(
        lambda *args: loss_and_metrics(model, spec, losses, *args), argnums=0, has_aux=True
    )

    def summed_gradients(
        expert: Tree, backbone: Tree, batch: Batch, key: jax.Array
    ) -> tuple[Tree, dict[str, jax.Array]]:
        if accumulation == 1:
            return grad_fn(expert, backbone, batch, key)
        size = jax.tree.leaves(batch)[0].shape[0]
        if size % accumulation:
            raise ElmError(f"batch size {size} is not divisible by accumulation {accumulation}")
        parts = jax.tree.map(
            lambda x: x.reshape(accumulation, size // accumulation, *x.shape[1:]), dict(batch)
        )

        def add(total: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            index, microbatch = part
            new = grad_fn(expert, backbone, microbatch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, new), None

        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(grad_fn, expert, backbone, first, key),
        )
        return jax.lax.scan(add, zeros, (jnp.arange(accumulation), parts))[0]

    def one(
        expert: Tree, opt_state: Any, key: jax.Array, batch: Batch, step: jax.Array, backbone: Tree
    ) -> tuple[Tree, Any, dict[str, jax.Array]]:
        grads, sums = summed_gradients(expert, backbone, batch, jax.random.fold_in(key, step))
        targets = jnp.maximum(sums["targets"], 1.0)
        grads = jax.tree.map(lambda g: g / targets, grads)
        updates, opt_state = optimizer.update(grads, opt_state, expert)
        expert = optax.apply_updates(expert, updates)
        metrics = {
            "loss": sums["loss"] / targets,
            "accuracy": sums["hits"] / targets,
            "tokens": sums["tokens"],
            "grad_norm": optax.global_norm(grads),
            "expert_norm": optax.global_norm(expert),
        }
        return expert, opt_state, metrics

    def step(
        state: TrainState, backbone: Tree, keys: jax.Array, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def member(inputs: tuple[Any, ...]) -> tuple[Tree, Any, dict[str, jax.Array]]:
            expert, opt_state, key, part = inputs
            return one(expert, opt_state, key, part, state.step, backbone)

        stack = (state.expert, state.opt_state, keys, batch)
        # A stack of one is a loop too: even an axis of size 1 gives products slower layouts.
        looped = one_by_one or len(keys) == 1
        expert, opt_state, metrics = (
            jax.lax.map(member, stack) if looped else jax.vmap(member)(stack)
        )
        return TrainState(state.step + 1, expert, opt_state), metrics

    return step
