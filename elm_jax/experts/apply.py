"""How an expert meets its backbone: variables for `apply`, initial values, shapes, axis names."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.linen import partitioning

from elm_jax.errors import ElmError
from elm_jax.experts.tree import Tree, check_shapes, count_parameters
from elm_jax.models import T5, ExpertSpec, FullSpec, T5Config


def bind_variables(spec: ExpertSpec | None, params: Tree, expert: Tree | None) -> dict[str, Any]:
    """Returns the variables of `T5(config, spec).apply` for a backbone and an expert.

    A `full` expert is a task vector and is added to the backbone (theta_pre + tau); the others are
    a collection of their own. Without an expert (spec None) it is the bare backbone.
    """
    if spec is None:
        return {"params": params}
    if expert is None:
        raise ElmError(f"an expert of kind {spec.kind!r} was announced, but no arrays were given")
    if isinstance(spec, FullSpec):
        return {"params": jax.tree.map(_add, params, expert)}
    return {"params": params, "expert": expert}


def _add(param: jax.Array, tau: jax.Array) -> jax.Array:
    if not jnp.issubdtype(param.dtype, jnp.floating):
        raise ElmError("a `full` expert changes every weight: it needs the backbone unquantised")
    return param + tau.astype(param.dtype)


@functools.lru_cache(maxsize=32)
def _abstract_variables(config: T5Config, spec: ExpertSpec | None) -> dict[str, Any]:
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    rngs = {"params": jax.random.key(0), "expert": jax.random.key(0)}
    return dict(jax.eval_shape(T5(config, spec).init, rngs, tokens, tokens))


def backbone_shapes(config: T5Config) -> Tree:
    """Returns the backbone's tree of float32 `ShapeDtypeStruct`s; allocates nothing."""
    return _abstract_variables(config, None)["params"]


def expert_shapes(config: T5Config, spec: ExpertSpec) -> Tree:
    """Returns the expert's tree of float32 `ShapeDtypeStruct`s; allocates nothing.

    >>> cfg = T5Config(10, 4, 1, 4, 8, 1, 1)
    >>> from elm_jax.models import LoraSpec
    >>> tree = expert_shapes(cfg, LoraSpec(rank=2, targets=('q',), blocks=('encoder',)))
    >>> tree['encoder']['layers_0']['attention']['query']['lora_a'].shape
    (4, 2)
    """
    if isinstance(spec, FullSpec):
        if config.quantization is not None:
            raise ElmError(
                "a `full` expert changes every weight: it needs the backbone unquantised, not in "
                f"{config.quantization}"
            )
        return backbone_shapes(config)
    variables = _abstract_variables(config, spec)
    if "expert" not in variables:
        raise ElmError(f"expert {spec} adds no array to this backbone")
    return variables["expert"]


def logical_axes(config: T5Config, spec: ExpertSpec | None) -> tuple[Tree, Tree | None]:
    """Returns the logical axis names of backbone and expert, each a tree of PartitionSpecs."""
    variables = _abstract_variables(config, spec)
    backbone = unfreeze(partitioning.get_axis_names(variables["params_axes"]))
    if spec is None:
        return backbone, None
    if isinstance(spec, FullSpec):
        return backbone, backbone
    return backbone, unfreeze(partitioning.get_axis_names(variables["expert_axes"]))


def init_expert(config: T5Config, spec: ExpertSpec, key: jax.Array) -> Tree:
    """Returns a fresh expert, float32; it starts as the identity unless its spec says otherwise."""
    if isinstance(spec, FullSpec):
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), expert_shapes(config, spec))
    expert_shapes(config, spec)  # refuses a spec that adds nothing
    return _init_expert(config, spec, key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init_expert(config: T5Config, spec: ExpertSpec, key: jax.Array) -> Tree:
    tokens = jnp.ones((1, 8), jnp.int32)
    rngs = {"params": jax.random.key(0), "expert": key}
    return T5(config, spec).init(rngs, tokens, tokens)["expert"]


def check_expert(what: str, config: T5Config, spec: ExpertSpec, expert: Tree) -> None:
    """Checks an expert's paths and shapes against its spec.

    Raises:
      ElmError: naming the array that is missing, left over or of another shape.
    """
    check_shapes(what, expert, expert_shapes(config, spec))


def count_expert_parameters(config: T5Config, spec: ExpertSpec) -> int:
    """Returns how many parameters an expert of this spec has on this backbone."""
    return count_parameters(expert_shapes(config, spec))
