"""Training: mesh and sharding, the jitted step over a stack of experts, the loop, entry points."""

from elm_jax.training.loop import Member, RunConfig, TrainedExpert, train_stack
from elm_jax.training.optimizers import OptimizerSpec, make_optimizer
from elm_jax.training.sharding import MeshSpec, make_mesh
from elm_jax.training.step import LossSpec, TrainState, make_train_step

__all__ = [
    "LossSpec",
    "Member",
    "MeshSpec",
    "OptimizerSpec",
    "RunConfig",
    "TrainState",
    "TrainedExpert",
    "make_mesh",
    "make_optimizer",
    "make_train_step",
    "train_stack",
]
