"""Trains experts from a gin configuration; the same code as `elm-jax train`.

example:
  python -m elm_jax.train --gin_file=gin/runs/train_experts.gin \\
    --gin.TASKS="['tasks/*']" --gin.MODEL_DIR=store --gin.TRAIN_STEPS=200
several processes: the same with --distributed slurm, auto, kubernetes or HOST:PORT
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elm_jax.models import ExpertSpec
    from elm_jax.training import MeshSpec, RunConfig
    from elm_jax.training.experts import TrainingOptions


def train(
    backbone: str,
    tasks: Sequence[str] | str,
    store: str,
    expert: ExpertSpec,
    options: TrainingOptions,
    run: RunConfig,
    mesh: MeshSpec | None = None,
    modules: Sequence[str] = (),
) -> None:
    """Trains experts with a progress bar; see `elm_jax.training.experts.train_experts`.

    Args:
      backbone: name or folder.
      tasks: patterns of tasks, or one.
      store: folder of the store.
      expert: what the experts are made of.
      options: what to train on and for how long.
      run: optimizer, loss, seed, checkpoints.
      mesh: how to split over devices.
      modules: modules to import, which register seqio tasks.
    """
    import importlib

    from elm_jax.cli.common import ProgressBar
    from elm_jax.training import MeshSpec, distributed, make_mesh
    from elm_jax.training.experts import train_experts

    mesh = mesh or MeshSpec()
    for module in modules:
        importlib.import_module(module)
    bar = ProgressBar("steps", hide=not distributed.is_writer())
    try:
        outcomes = train_experts(
            backbone,
            [tasks] if isinstance(tasks, str) else list(tasks),
            store,
            expert=expert,
            options=options,
            run=run,
            mesh=make_mesh(mesh),
            rules=mesh.logical_rules(),
            report=lambda label, done, total, metrics: bar.update(done, total, label, metrics),
        )
    finally:
        bar.close()
    for outcome in outcomes if distributed.is_writer() else ():
        loss = outcome.info.metrics["loss"]
        print(f"{outcome.info.id}: {outcome.status}, loss {loss:.4f}, in {store}")


if __name__ == "__main__":
    from elm_jax import gin_utils

    sys.exit(gin_utils.run(train, distributed=True))
