"""Orbax pytrees, read array by array through tensorstore.

<folder>/_METADATA        which arrays there are: names and kinds
         manifest.ocdbt   their values in one key-value store, 'a.b.c/0.0', ...
         a.b.c/           or, in older ones, a zarr folder for each
         checkpoint       in older ones, msgpack in place of _METADATA
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from elm_jax.checkpoints.flax_msgpack import PLACEHOLDER, array_name, flatten_state, read_msgpack
from elm_jax.checkpoints.stored import StoredArray, in_memory, open_zarr
from elm_jax.errors import ElmError
from elm_jax.experts.files import read_json
from elm_jax.experts.tree import Tree

METADATA_FILE = "_METADATA"
MANIFEST_FILE = "manifest.ocdbt"
STRUCTURE_FILE = "checkpoint"
MAX_NAME = 1000
_ARRAYS = ("jax.Array", "np.ndarray")


def is_orbax(folder: Path) -> bool:
    """Whether a folder looks like an Orbax pytree."""
    return any((folder / name).is_file() for name in (METADATA_FILE, MANIFEST_FILE))


def save_orbax(tree: Tree, folder: Path) -> None:
    """Writes a tree as an Orbax pytree to a folder that is not there yet."""
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), tree)


def open_orbax(
    folder: Path, wanted: Callable[[str], bool] = lambda path: True
) -> dict[str, StoredArray]:
    """Opens the arrays of an Orbax pytree.

    Args:
      folder: which Orbax wrote, with OCDBT or a zarr folder for each array.
      wanted: says by its 'a/b/c' path whether to open an array.

    Returns:
      path -> array.

    Raises:
      FileNotFoundError: when it is no Orbax pytree.
      ElmError: when it is damaged.
    """
    if (folder / METADATA_FILE).is_file():
        names, driver = _from_metadata(folder / METADATA_FILE)
        arrays: dict[str, StoredArray] = {}
    elif (folder / STRUCTURE_FILE).is_file():
        names, arrays = _from_structure(folder / STRUCTURE_FILE)
        driver = "zarr"
    else:
        raise FileNotFoundError(f"{folder}: neither {METADATA_FILE} nor {STRUCTURE_FILE}")
    ocdbt = (folder / MANIFEST_FILE).is_file()
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    stores = {}
    for path, name in names.items():
        if not wanted(path):
            continue
        if ocdbt:
            stores[path] = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        else:
            inside = folder.resolve() / array_name(name, folder)
            stores[path] = {"driver": "file", "path": f"{inside}/"}
    arrays = {path: array for path, array in arrays.items() if wanted(path)}
    return arrays | open_zarr(stores, folder, driver=driver)


def _from_metadata(file: Path) -> tuple[dict[str, str], str]:
    """Returns path -> name of the arrays, and tensorstore's driver for them."""
    data = read_json(file)
    entries = data.get("tree_metadata")
    if not isinstance(entries, Mapping):
        raise ElmError(f"{file}: key 'tree_metadata' is missing")
    names = {}
    for entry in entries.values():
        try:
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            kind = entry["value_metadata"]["value_type"]
        except (TypeError, KeyError) as error:
            raise ElmError(f"{file}: an entry of 'tree_metadata' lacks {error}") from error
        if kind not in _ARRAYS:
            continue
        name = ".".join(keys)
        if not name.isprintable() or len(name) > MAX_NAME:
            raise ElmError(f"{file}: {name!r:.100} is no name of an array")
        names["/".join(keys)] = name
    return names, "zarr3" if data.get("use_zarr3") is True else "zarr"


def _from_structure(file: Path) -> tuple[dict[str, str], dict[str, StoredArray]]:
    """Returns path -> name of the arrays beside an older structure file, and those in it."""
    names, arrays = {}, {}
    for path, leaf in flatten_state(read_msgpack(file)).items():
        if isinstance(leaf, str) and leaf.startswith(PLACEHOLDER):
            names[path] = array_name(leaf.removeprefix(PLACEHOLDER), f"{file}: {path}")
        elif isinstance(leaf, np.ndarray):
            arrays[path] = in_memory(leaf, f"{file}: {path}")
        elif isinstance(leaf, Mapping):
            raise ElmError(f"{file}: {path} names a tensorstore of T5X, in an Orbax pytree")
    return names, arrays
