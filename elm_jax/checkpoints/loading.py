"""From stored arrays to a backbone's parameters: read once, cast, placed on host, device or mesh.

The largest arrays come first, so that what reading takes beside the result (the values of one
array as stored, and what a decompressor needs) is never needed on top of all the rest: the peak
stays below 1.5 times the largest array plus this host's shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from elm_jax.checkpoints.fingerprint import Samples, fingerprint
from elm_jax.checkpoints.stored import StoredArray, empty
from elm_jax.errors import ElmError
from elm_jax.experts.tree import Tree, flatten, unflatten
from elm_jax.models import T5Config

_COLUMNS = 256
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def storage_dtype(path: str, stored: np.dtype[Any], dtype: str | None) -> np.dtype[Any]:
    """Returns the dtype in which a parameter is kept for a computation in `dtype`.

    With 'bfloat16', arrays which the model reads in float32 (layer norms, position biases) are
    float32. None keeps the stored dtype.
    """
    if dtype is None:
        return stored
    read_in_full = path.endswith(("/scale", "/rel_embedding"))
    return _BFLOAT16 if dtype == "bfloat16" and not read_in_full else np.dtype(np.float32)


def load_params(
    config: T5Config,
    arrays: Mapping[str, StoredArray],
    *,
    dtype: str | None = None,
    shardings: Tree | None = None,
    on_host: bool = False,
) -> tuple[Tree, str]:
    """Reads parameters.

    Args:
      config: the backbone's, for its fingerprint.
      arrays: path -> stored array, per layer.
      dtype: 'float32', 'bfloat16', or None to keep dtypes as stored; see `storage_dtype`.
      shardings: a sharding for each path; None puts arrays whole on the default device.
      on_host: keep NumPy arrays instead.

    Returns:
      The parameters, and the fingerprint of the values as stored. With several processes, each
      reads no more than its own shards, but the first reads all for the fingerprint.

    Raises:
      ElmError: naming the file that is truncated or damaged.
    """
    flat_shardings = None if shardings is None else flatten(shardings)
    dtypes = {path: storage_dtype(path, a.dtype, dtype) for path, a in arrays.items()}
    # Where the values stay as they are in host memory, the fingerprint needs no copy of them.
    kept = on_host or (flat_shardings is None and jax.default_backend() == "cpu")
    kept = kept and all(dtypes[path] == a.dtype for path, a in arrays.items())
    single = jax.process_count() == 1
    params: dict[str, Any] = {}
    with Samples() as samples:
        for source, paths in _groups(arrays):
            whole = source.read() if on_host or single or jax.process_index() == 0 else None
            for path in paths:
                stored = arrays[path]
                values = None if whole is None else stored.cut(whole)
                if values is not None and not kept:
                    values = as_buffer(values, stored.dtype)
                    samples.add(path, values)
                if on_host or flat_shardings is None:
                    values = stored.read() if values is None else values
                    host = as_buffer(values, dtypes[path], copy=len(paths) > 1)
                    params[path] = host if on_host else jax.device_put(host)
                else:
                    params[path] = _shard(stored, values, dtypes[path], flat_shardings[path])
                del values
            del whole
        tree = unflatten(params)
        if kept:
            return tree, fingerprint(config, jax.tree.map(np.asarray, tree))
        return tree, samples.fingerprint(config) if single else _agree(samples, config)


def stored_fingerprint(config: T5Config, arrays: Mapping[str, StoredArray]) -> str:
    """Returns the fingerprint of stored arrays, which are read one after the other."""
    with Samples() as samples:
        for source, paths in _groups(arrays):
            whole = source.read()
            for path in paths:
                samples.add(path, arrays[path].cut(whole))
            del whole
        return samples.fingerprint(config)


def _groups(arrays: Mapping[str, StoredArray]) -> list[tuple[StoredArray, list[str]]]:
    """Returns each array in the files with the paths that come from it, the largest first."""
    groups: dict[int, tuple[StoredArray, list[str]]] = {}
    for path, stored in arrays.items():
        groups.setdefault(id(stored.source), (stored.source, []))[1].append(path)
    return sorted(groups.values(), key=lambda group: -group[0].nbytes)


def as_buffer(values: np.ndarray, dtype: np.dtype[Any], *, copy: bool = False) -> np.ndarray:
    """Returns values as a contiguous array of a dtype that JAX can use without a copy.

    Args:
      values: of any strides.
      dtype: what they are cast to.
      copy: whether to copy even what fits, as when a small part should not keep the whole alive.
    """
    if values.dtype == dtype and values.flags.c_contiguous and not copy:
        return values
    out = empty(values.shape, dtype)
    if values.ndim == 2 and values.T.flags.c_contiguous:
        # Block by block a transpose stays in the cache; a cast is fast along the rows of the file.
        for start in range(0, values.shape[1], _COLUMNS):
            rows = values.T[start : start + _COLUMNS].astype(dtype, copy=False)
            out[:, start : start + _COLUMNS] = rows.T
    else:
        out[...] = values
    return out


def _shard(
    stored: StoredArray, values: np.ndarray | None, dtype: np.dtype[Any], sharding: Any
) -> jax.Array:
    """Places this host's shards of an array, out of its values or else from the file."""
    made: dict[str, np.ndarray] = {}  # replicas share memory until they are on their devices

    def shard(index: Any) -> np.ndarray:
        key = str(index)
        if key not in made:
            part = stored.read(index) if values is None else values[index]
            made[key] = as_buffer(part, dtype, copy=values is not None)
        return made[key]

    return jax.make_array_from_callback(stored.shape, sharding, shard)


def _agree(samples: Samples, config: T5Config) -> str:
    """Returns the first process's fingerprint to all."""
    from jax.experimental import multihost_utils

    digest = bytes(32)
    if jax.process_index() == 0:
        digest = bytes.fromhex(samples.fingerprint(config).removeprefix("sha256:"))
    shared = multihost_utils.broadcast_one_to_all(jnp.frombuffer(digest, jnp.uint8))
    return f"sha256:{np.asarray(shared).tobytes().hex()}"


def check_dtype(dtype: str | None) -> None:
    """Refuses a dtype that no computation has.

    Raises:
      ElmError: naming the accepted ones.
    """
    from elm_jax.errors import nearest

    if dtype not in (None, "float32", "bfloat16"):
        raise ElmError(
            f"dtype must be 'float32' or 'bfloat16', got {dtype!r}"
            f"{nearest(str(dtype), ('float32', 'bfloat16'))}"
        )
