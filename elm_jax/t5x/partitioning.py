"""The library's sharding rules in the words of t5x's partitioner."""

from __future__ import annotations

from elm_jax.training.sharding import RULES

MESH_AXES = {"data": "data", "tensor": "model"}
"""Our mesh axes and t5x's; fully sharded parameters are split over t5x's data axis too."""


def logical_axis_rules(shard_parameters: bool = True) -> list[tuple[str, str | None]]:
    """Returns a rule for every logical axis of backbone, expert and batch.

    t5x's `standard_logical_axis_rules` lack the experts' own axes, and an axis without a rule is
    replicated without a word.

    Args:
      shard_parameters: whether parameters are split over the data axis as well (ZeRO-3; t5x calls
        it `parameter_partitioning_dims=2`), so that the frozen backbone is held once.

    >>> dict(logical_axis_rules())['mlp'], dict(logical_axis_rules())['embed']
    ('model', 'data')
    >>> dict(logical_axis_rules(shard_parameters=False))['embed'] is None
    True
    """
    known = dict(MESH_AXES, fsdp="data") if shard_parameters else MESH_AXES
    return [
        (name, next((known[axis] for axis in axes if axis in known), None)) for name, axes in RULES
    ]
