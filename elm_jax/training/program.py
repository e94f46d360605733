"""What a run compiles: initial state and step of a stack of experts, and where each array lies.

Training runs it; planning, benchmarks and tests look at the very same thing. A program can be made
for an abstract mesh, too, and then says what would lie where.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from elm_jax.experts.apply import backbone_shapes, expert_shapes, init_expert, logical_axes
from elm_jax.experts.tree import Tree
from elm_jax.models import T5, ExpertSpec, T5Config
from elm_jax.training import sharding
from elm_jax.training.optimizers import OptimizerSpec, make_optimizer
from elm_jax.training.sharding import RULES, AnyMesh, LogicalRules
from elm_jax.training.step import LossSpec, TrainState, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run and the layout of what they take and give.

    Attributes:
      initial_state: keys [X] -> TrainState, of fresh experts.
      state_from: stacked experts -> TrainState, of an optimizer that has seen nothing.
      step: (state, backbone, keys [X], batch of [X, B, ...]) -> (state, metrics).
      shapes: the state's ShapeDtypeStructs.
      state: the state's shardings.
      backbone: the backbone's shardings.
      keys: sharding of the experts' random keys, [X].
      batch: sharding of each array of a batch.
    """

    initial_state: Callable[[jax.Array], TrainState]
    state_from: Callable[[Tree], TrainState]
    step: Callable[..., Any]
    shapes: TrainState
    state: TrainState
    backbone: Tree
    keys: NamedSharding
    batch: NamedSharding

    def jit_initial_state(self) -> Callable[[jax.Array], TrainState]:
        """Returns the compiled initial state, laid out."""
        return jax.jit(self.initial_state, out_shardings=self.state)

    def jit_state_from(self) -> Callable[[Tree], TrainState]:
        """Returns the compiled state of given experts; it takes their memory for the state."""
        return jax.jit(
            self.state_from,
            donate_argnums=0,
            in_shardings=(self.state.expert,),
            out_shardings=self.state,
        )

    def jit_step(self) -> Any:
        """Returns the compiled step; it takes the state's memory for the new state."""
        return jax.jit(
            self.step,
            donate_argnums=0,
            in_shardings=(self.state, self.backbone, self.keys, self.batch),
            out_shardings=(self.state, sharding.replicated(self.keys.mesh)),
        )


def build_program(
    config: T5Config,
    spec: ExpertSpec,
    experts: int,
    mesh: AnyMesh,
    *,
    optimizer: OptimizerSpec | None = None,
    train_steps: int = 1,
    loss: LossSpec | None = None,
    accumulation: int = 1,
    one_by_one: bool = False,
    rules: LogicalRules = RULES,
) -> Program:
    """Builds the program of a stack of experts; allocates nothing.

    Args:
      config: the backbone's.
      spec: what the experts are made of.
      experts: X.
      mesh: where it runs, or an abstract one.
      optimizer: of each expert.
      train_steps: that the learning rate's schedule spans.
      loss: the training loss.
      accumulation: microbatches per step.
      one_by_one: see `make_train_step`.
      rules: logical axis -> mesh axes.

    Raises:
      ElmError: for an array that no rule covers, or a size that the mesh does not divide.
    """
    sharding.check_work(mesh, experts, rules=rules)
    initial_state, state_from, step = _functions(
        config,
        spec,
        optimizer or OptimizerSpec(),
        train_steps,
        loss or LossSpec(),
        accumulation,
        one_by_one,
    )
    backbone_axes, expert_axes = logical_axes(config, spec)
    backbone = sharding.backbone_shardings(mesh, backbone_axes, backbone_shapes(config), rules)
    expert = sharding.shardings(
        mesh, expert_axes, expert_shapes(config, spec), stacked=True, rules=rules
    )
    shapes = jax.eval_shape(initial_state, abstract_keys(experts))
    state: Any = TrainState(
        sharding.replicated(mesh),  # type: ignore[arg-type]
        expert,
        sharding.optimizer_shardings(mesh, shapes.opt_state, shapes.expert, expert, rules),
    )
    keys = sharding.stack_sharding(mesh, rules)
    batch = sharding.batch_sharding(mesh, rules)
    return Program(initial_state, state_from, step, shapes, state, backbone, keys, batch)


@functools.lru_cache(maxsize=32)
def _functions(
    config: T5Config,
    spec: ExpertSpec,
    optimizer_spec: OptimizerSpec,
    train_steps: int,
    loss: LossSpec,
    accumulation: int,
    one_by_one: bool,
) -> tuple[Callable[[jax.Array], TrainState], Callable[[Tree], TrainState], Callable[..., Any]]:
    """Builds the initial states and the step, kept so that runs alike compile them once."""
    optimizer = make_optimizer(optimizer_spec, train_steps)

    def state_from(expert: Tree) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), expert, jax.vmap(optimizer.init)(expert))

    def initial_state(keys: jax.Array) -> TrainState:
        return state_from(jax.vmap(lambda key: init_expert(config, spec, key))(keys))

    step = make_train_step(
        T5(config, spec),
        spec,
        optimizer,
        loss_spec=loss,
        accumulation=accumulation,
        one_by_one=one_by_one,
    )
    return initial_state, state_from, step


def runs_one_by_one(mesh: Mesh, rules: LogicalRules = RULES) -> bool:
    """Whether a step takes its experts one after the other: on a CPU, if they are not spread."""
    ways = math.prod(mesh.shape[axis] for axis in dict(rules)["experts"])
    return mesh.devices.flat[0].platform == "cpu" and ways == 1


def abstract_keys(experts: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of X random keys."""
    return jax.ShapeDtypeStruct((experts,), jax.eval_shape(jax.random.key, 0).dtype)


def abstract_batch(
    experts: int, rows: int, inputs_length: int, targets_length: int
) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a stacked batch of tokens, int32 [X, B, T] and [X, B, U]."""
    targets = jax.ShapeDtypeStruct((experts, rows, targets_length), jnp.int32)
    return {
        "encoder_input_tokens": jax.ShapeDtypeStruct((experts, rows, inputs_length), jnp.int32),
        "decoder_input_tokens": targets,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": targets,
    }
