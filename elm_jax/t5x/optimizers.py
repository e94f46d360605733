"""The optimizer that trains the expert and leaves the backbone as it is."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import serialization, traverse_util
from flax.core import unfreeze
from t5x import optimizers as t5x_optimizers

from elm_jax.experts.tree import Tree, flatten
from elm_jax.t5x.experts import EXPERT
from elm_jax.training.optimizers import OptimizerSpec, learning_rate_schedule, make_optimizer


def partition(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies an optimizer to the expert alone.

    Clip inside of it: a global norm over all of t5x's params would need the gradient of every
    frozen weight, which XLA drops otherwise, and nearly doubles a step.
    """

    def labels(params: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: EXPERT if path[0].key == EXPERT else "frozen", params
        )

    return optax.partition({EXPERT: optimizer, "frozen": optax.set_to_zero()}, labels)


class AnyOptaxWrapper(t5x_optimizers.OptaxWrapper):
    """t5x's wrapper, for any optax transformation.

    t5x's own knows the states that it lists, which leaves out Adafactor and `inject_hyperparams`.
    Here a leaf whose path ends in a parameter's path, and that has its shape, takes its axes;
    every other one is replicated.
    """

    def derive_logical_axes(self, optimizer: Any, param_logical_axes: Tree) -> Any:
        """Returns the optimizer with axis names in place of arrays; see t5x."""
        names = flatten(unfreeze(param_logical_axes))
        shapes = {path: leaf.shape for path, leaf in flatten(unfreeze(optimizer.target)).items()}

        def axes(path: str, leaf: Any) -> Any:
            parts = path.split("/")
            for start in range(len(parts)):
                parameter = "/".join(parts[start:])
                if parameter in shapes:
                    return names[parameter] if shapes[parameter] == leaf.shape else None
            return None

        state = optimizer.state_dict()["state"]
        leaves = traverse_util.flatten_dict(state.get("param_states", {}), sep="/")
        derived = {path: axes(path, leaf) for path, leaf in leaves.items()}
        return optimizer.restore_state(
            {
                "target": serialization.to_state_dict(unfreeze(param_logical_axes)),
                "state": {
                    "step": None,
                    "param_states": traverse_util.unflatten_dict(derived, sep="/"),
                },
            }
        )


class ExpertOptimizer(AnyOptaxWrapper):
    """One of the native loop's optimizers, for the expert alone.

    Args:
      spec: the optimizer, its schedule and its clipping.
      train_steps: steps of this run, over which a schedule decays.
    """

    def __init__(self, spec: OptimizerSpec, train_steps: int) -> None:
        super().__init__(partition(make_optimizer(spec, train_steps)))


def learning_rate_fn(spec: OptimizerSpec, train_steps: int) -> optax.Schedule:
    """Returns the schedule for t5x's `Trainer`, which only logs it."""
    return learning_rate_schedule(spec, train_steps)
