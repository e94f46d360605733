"""Backbones that go straight onto a mesh."""

from __future__ import annotations

import os

from jax.sharding import Mesh

from elm_jax.checkpoints.backbone import Backbone, load_backbone
from elm_jax.checkpoints.infer import ConfigLike
from elm_jax.experts.apply import backbone_shapes, logical_axes
from elm_jax.experts.tree import Tree
from elm_jax.models import T5Config
from elm_jax.training.sharding import shardings


def backbone_shardings(mesh: Mesh, config: T5Config) -> Tree:
    """Returns the sharding of every array of a backbone, by the rules of `training.sharding`.

    Raises:
      ElmError: for an array that the mesh does not divide.
    """
    return shardings(mesh, logical_axes(config, None)[0], backbone_shapes(config))


def load_backbone_on_mesh(
    name_or_path: str | os.PathLike[str],
    mesh: Mesh,
    *,
    dtype: str | None = None,
    config: ConfigLike = None,
) -> Backbone:
    """Loads a backbone as `load_backbone` does, each array sharded over a mesh as it is read.

    Args:
      name_or_path: see `load_backbone`.
      mesh: with the axes of `training.sharding`.
      dtype: see `load_backbone`.
      config: see `load_backbone`.

    Returns:
      The backbone. Beside its shards, a host holds no more than one array at a time.

    Raises:
      ElmError: as `load_backbone`, and for an array that the mesh does not divide.
    """
    return load_backbone(
        name_or_path,
        dtype=dtype,
        config=config,
        shardings=lambda found: backbone_shardings(mesh, found),
    )
