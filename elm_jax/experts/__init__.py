"""Experts as data: specs, arrays, the store on disk, merging and export."""

from elm_jax.experts.apply import (
    bind_variables,
    check_expert,
    count_expert_parameters,
    expert_shapes,
    init_expert,
    logical_axes,
)
from elm_jax.experts.export import export_expert
from elm_jax.experts.merging import WeightSearch, merge, merge_trees, search_weights
from elm_jax.experts.pool import ExpertPool
from elm_jax.experts.routing import route
from elm_jax.experts.store import ExpertInfo, ExpertStore, check_backbone, expert_id
from elm_jax.experts.tree import checksum, count_parameters, flatten, stack, unflatten, unstack

__all__ = [
    "ExpertInfo",
    "ExpertPool",
    "ExpertStore",
    "WeightSearch",
    "bind_variables",
    "check_backbone",
    "check_expert",
    "checksum",
    "count_expert_parameters",
    "count_parameters",
    "expert_id",
    "expert_shapes",
    "export_expert",
    "flatten",
    "init_expert",
    "logical_axes",
    "merge",
    "merge_trees",
    "route",
    "search_weights",
    "stack",
    "unflatten",
    "unstack",
]
