"""One mesh and one set of rules from logical to mesh axes, for backbone and expert alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elm_jax.errors import ElmError, nearest
from elm_jax.experts.tree import Tree, flatten, unflatten

MESH_AXES = ("expert", "data", "fsdp", "tensor")

LogicalRules = tuple[tuple[str, tuple[str, ...]], ...]
RULES: LogicalRules = (
    ("experts", ("expert",)),
    ("batch", ("data", "fsdp")),
    ("embed", ("fsdp",)),
    ("vocab", ("tensor",)),
    ("mlp", ("tensor",)),
    ("joined_kv", ("tensor",)),
    ("heads", ()),
    ("relpos_buckets", ()),
    ("layers", ()),
    ("adapter", ()),
    ("rank", ()),
)
"""Logical axis -> mesh axes it is split over; an empty tuple means replicated on purpose."""


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """How many ways to split along each mesh axis.

    Attributes:
      expert: the stack of experts.
      data: the batch, with the backbone replicated; -1 takes the devices that are left.
      fsdp: the batch, with the backbone sharded.
      tensor: heads, feed-forward and vocabulary.
    """

    expert: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in MESH_AXES:
            value = getattr(self, name)
            if value < 1 and not (name == "data" and value == -1):
                raise ElmError(f"mesh axis {name!r} must be a positive integer, got {value}")


def make_mesh(spec: MeshSpec | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over all (or the given) devices.

    Raises:
      ElmError: if the sizes do not multiply to the number of devices.
    """
    spec = spec or MeshSpec()
    devices = list(jax.devices() if devices is None else devices)
    others = spec.expert * spec.fsdp * spec.tensor
    data = len(devices) // others if spec.data == -1 else spec.data
    if data * others != len(devices):
        raise ElmError(
            f"mesh expert={spec.expert} x data={spec.data} x fsdp={spec.fsdp} x "
            f"tensor={spec.tensor} does not fit {len(devices)} devices"
        )
    shape = (spec.expert, data, spec.fsdp, spec.tensor)
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES)


def partition_spec(axes: Sequence[str | None], where: str = "array") -> PartitionSpec:
    """Translates logical axis names to a PartitionSpec by `RULES`.

    Raises:
      ElmError: for a name without a rule, naming the array.

    >>> partition_spec(('embed', 'mlp')) == PartitionSpec('fsdp', 'tensor')
    True
    """
    rules = dict(RULES)
    entries: list[Any] = []
    for name in axes:
        if name is not None and name not in rules:
            raise ElmError(f"{where}: no sharding rule for axis {name!r}{nearest(name, rules)}")
        mesh_axes = rules[name] if name is not None else ()
        entries.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return PartitionSpec(*entries)


def shardings(mesh: Mesh, axes: Tree, shapes: Tree, *, stacked: bool = False) -> Tree:
    """Returns a NamedSharding for every array.

    Args:
      mesh: the mesh.
      axes: tree of logical axis names.
      shapes: tree of arrays or ShapeDtypeStructs, without the stack's axis.
      stacked: whether the arrays have a leading axis over X experts.

    Raises:
      ElmError: for an array that no rule covers, or a size that its mesh axes do not divide.
    """
    names, arrays = flatten(axes), flatten(shapes)
    out = {}
    for path, array in arrays.items():
        if path not in names:
            raise ElmError(f"{path}: has no logical axis names, so no sharding rule covers it")
        spec = partition_spec(tuple(names[path]), path)
        for size, name, entry in zip(array.shape, names[path], spec, strict=True):
            parts = (entry,) if isinstance(entry, str) else entry or ()
            check_split(mesh, size, parts, f"{path}: axis {name!r}")
        out[path] = NamedSharding(mesh, PartitionSpec("expert", *spec) if stacked else spec)
    return unflatten(out)


def check_split(mesh: Mesh, size: int, mesh_axes: Sequence[str], what: str) -> None:
    """Refuses a size that its mesh axes do not divide, naming both.

    Raises:
      ElmError: naming what it is the size of.
    """
    ways = int(np.prod([mesh.shape[axis] for axis in mesh_axes]))
    if size % ways:
        raise ElmError(
            f"{what} of size {size} cannot be split {ways} ways over mesh axes {tuple(mesh_axes)}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a stacked batch [X, B, T]."""
    return NamedSharding(mesh, PartitionSpec("expert", ("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
