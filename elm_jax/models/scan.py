"""The two layouts of a stack's layers, and the way from one to the other.

    per layer   encoder/layers_0/mlp/wo/kernel [F, D], encoder/layers_1/mlp/wo/kernel [F, D], ...
    stacked     encoder/encoder/mlp/wo/kernel [L, F, D]

`T5Config.scan_layers` chooses the layout that the model reads. The stacked one has the names of
t5x's `scalable_t5`; but the layers come first, where t5x has them second by default: a loop over
any other axis makes XLA copy the whole backbone in every step, to bring the layers to the front.
What is stored (backbones, experts, merges) is always per layer: arrays change layout where they
enter and leave a model, through `from_storage` and `to_storage`. Both layouts hold for a backbone
and for an expert of any kind.
Shapes: D model, F mlp, L layers.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.errors import ElmError
from elm_jax.models.config import T5Config

SCAN_AXIS = 0
"""Where the axis over L layers stands in a stacked array."""
STACKS = ("encoder", "decoder")
Tree = Any
_LAYER = re.compile(r"layers_(\d+)$")


def _layers(config: T5Config, stack: str) -> int:
    return config.num_encoder_layers if stack == "encoder" else config.num_decoder_layers


def stack_layers(tree: Tree, config: T5Config, axis: int = SCAN_AXIS) -> Tree:
    """Joins the layers of each stack: per layer -> stacked.

    Args:
      tree: backbone or expert, a nested dict of arrays (NumPy stays NumPy) per layer.
      config: says how many layers there are.
      axis: where the layers go in a stacked array; for other programs, as the model reads one only.

    Returns:
      The stacked tree; arrays outside of layers are those of `tree`.

    Raises:
      ElmError: if a layer is missing or left over, or layers differ in their arrays.

    >>> config = T5Config(8, 2, 1, 2, 4, num_encoder_layers=3, num_decoder_layers=1)
    >>> tree = {'encoder': {f'layers_{i}': {'scale': np.full(2, i)} for i in range(3)}}
    >>> stack_layers(tree, config)['encoder']['encoder']['scale']
    array([[0, 0],
           [1, 1],
           [2, 2]])
    """
    result = dict(tree)
    for stack in STACKS:
        parts = tree.get(stack, {})
        names = [name for name in parts if _LAYER.match(name)]
        if not names:
            continue
        wanted = [f"layers_{i}" for i in range(_layers(config, stack))]
        for name in {*names} ^ {*wanted}:
            fault = "is missing" if name in wanted else "is one too many"
            raise ElmError(f"{stack}/{name} {fault}: the config has {len(wanted)} {stack} layers")
        layers = [parts[name] for name in wanted]
        if len({jax.tree.structure(layer) for layer in layers}) > 1:
            raise ElmError(f"the layers of {stack} differ in their arrays, so they do not stack")
        rest = {name: part for name, part in parts.items() if name not in wanted}
        result[stack] = {**rest, stack: jax.tree.map(functools.partial(_join, axis), *layers)}
    return result


def unstack_layers(tree: Tree, config: T5Config) -> Tree:
    """Takes the layers of each stack apart: stacked -> per layer; undoes `stack_layers`.

    Raises:
      ElmError: if an array has another number of layers than the config.
    """
    result = dict(tree)
    for stack in STACKS:
        parts = tree.get(stack, {})
        if stack not in parts:
            continue
        count = _layers(config, stack)
        for path, leaf in jax.tree.leaves_with_path(parts[stack]):
            if leaf.shape[:1] != (count,):
                raise ElmError(
                    f"{stack}/{stack}{_path(path)} has shape {tuple(leaf.shape)}: its first axis "
                    f"should hold {count} layers"
                )
        rest = {name: part for name, part in parts.items() if name != stack}
        layers = {
            f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], parts[stack])
            for i in range(count)
        }
        result[stack] = {**rest, **layers}
    return result


def from_storage(tree: Tree, config: T5Config) -> Tree:
    """Brings a stored backbone or expert (per layer) to the layout that the model reads."""
    return stack_layers(tree, config) if config.scan_layers else tree


def to_storage(tree: Tree, config: T5Config) -> Tree:
    """Brings a model's backbone or expert to the layout in which it is stored, per layer."""
    return unstack_layers(tree, config) if config.scan_layers else tree


def _join(axis: int, *leaves: Any) -> Any:
    xp: Any = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
    return xp.stack(leaves, axis=axis)


def _path(path: Any) -> str:
    return "".join(f"/{key.key}" for key in path)
