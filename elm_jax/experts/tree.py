"""Pytrees of arrays: flat names, sizes, checksums and comparison of shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from elm_jax.errors import ElmError, nearest

Tree = Any
"""A nested dict of arrays (numpy or jax)."""


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of a nested dict by 'a/b/c' path, sorted.

    >>> flatten({'b': {'x': 1}, 'a': 2})
    {'a': 2, 'b/x': 1}
    """
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        path = f"{prefix}/{key}" if prefix else str(key)
        value = tree[key]
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Returns the nested dict that `flatten` came from.

    >>> unflatten({'a': 2, 'b/x': 1})
    {'a': 2, 'b': {'x': 1}}
    """
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def count_parameters(tree: Tree) -> int:
    """Returns the number of scalars in a tree of arrays or `ShapeDtypeStruct`s."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def checksum(tree: Tree) -> str:
    """Returns 'sha256:<hex>' over every path, dtype, shape and byte, whatever the dict order."""
    digest = Checksum()
    for path, leaf in flatten(tree).items():
        digest.add(path, leaf)
    return str(digest)


class Checksum:
    """`checksum` of a tree whose arrays come one after the other, in the order of `flatten`."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, path: str, leaf: Any) -> None:
        """Takes the next array in."""
        array = np.asarray(leaf)
        self._digest.update(f"{path}|{array.dtype.name}|{array.shape}|".encode())
        self._digest.update(np.ascontiguousarray(array).tobytes())

    def __str__(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"


def check_shapes(what: str, tree: Tree, expected: Tree) -> None:
    """Checks that a tree has exactly the expected paths and shapes.

    Args:
      what: names the tree in the message.
      tree: arrays.
      expected: arrays or `ShapeDtypeStruct`s.

    Raises:
      ElmError: naming the first path that is missing, left over or of another shape.
    """
    found, wanted = flatten(tree), flatten(expected)
    for path in wanted:
        if path not in found:
            raise ElmError(f"{what} lacks {path!r} of shape {wanted[path].shape}")
    for path, leaf in found.items():
        if path not in wanted:
            raise ElmError(f"{what} has an unknown array {path!r}{nearest(path, wanted)}")
        if tuple(leaf.shape) != tuple(wanted[path].shape):
            raise ElmError(
                f"{what}: {path!r} has shape {tuple(leaf.shape)}, "
                f"expected {tuple(wanted[path].shape)}"
            )


def stack(trees: list[Tree]) -> Tree:
    """Stacks X trees of equal structure along a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def unstack(tree: Tree, index: int) -> Tree:
    """Returns tree `index` of a stack, as numpy arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf[index]), tree)
