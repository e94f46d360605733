"""From stored arrays to a backbone's parameters: read once, cast, placed on host, device or mesh.

Threads read ahead, and transpose as they read, while the arrays before are hashed and placed. What
is on its way at a time is no more than the largest array, and the largest arrays come first, so
that this is never needed on top of all the rest: the peak stays below 1.5 times the largest array
plus this host's shards. (Where the largest is below some 100 MiB, what tensorstore's code and the C
library's allocator keep, tens of MiB, can come on top.)
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from elm_jax.checkpoints.fingerprint import Fingerprint
from elm_jax.checkpoints.stored import StoredArray, as_buffer
from elm_jax.errors import ElmError
from elm_jax.experts.tree import Tree, flatten, unflatten
from elm_jax.models import T5Config

_THREADS = min(8, os.cpu_count() or 1)
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
    with Fingerprint(config, arrays) as found:
        for paths, whole in _read(arrays, everything=on_host or single or jax.process_index() == 0):
            for path in paths:
                stored, values = arrays[path], whole
                if whole is not None and len(paths) > 1:
                    values = as_buffer(stored.cut(whole), stored.dtype, copy=kept)
                if values is not None:
                    found.add(path, values, stays=kept)
                if on_host or flat_shardings is None:
                    values = stored.read_contiguous() if values is None else values
                    # A part that is used as it is would keep the whole in memory.
                    copy = len(paths) > 1 and not kept
                    host = as_buffer(values, dtypes[path], copy=copy)
                    params[path] = host if on_host else jax.device_put(host)
                    del host
                else:
                    params[path] = _shard(stored, values, dtypes[path], flat_shardings[path])
                del values
            del whole
        return unflatten(params), str(found) if single else _agree(found)


def stored_fingerprint(config: T5Config, arrays: Mapping[str, StoredArray]) -> str:
    """Returns the fingerprint of stored arrays, of which few are in memory at a time."""
    with Fingerprint(config, arrays) as found:
        for paths, whole in _read(arrays):
            for path in paths:
                found.add(path, whole if len(paths) == 1 else arrays[path].cut(whole), stays=False)
            del whole
        return str(found)


def _read(
    arrays: Mapping[str, StoredArray], everything: bool = True
) -> Iterator[tuple[list[str], Any]]:
    """Reads each array in the files once, some ahead of what they are used for, in threads.

    All that is read at a time is no larger than the largest array.

    Args:
      arrays: path -> stored array.
      everything: whether to read at all.

    Yields:
      The paths that come from an array in the files, and its values, or None if nothing is to be
      read: contiguous and those of the path if it is one, else those of the array in the file, to
      be cut.
    """
    groups = _groups(arrays)
    if not everything:
        yield from ((paths, None) for _, paths in groups)
        return
    # One that is decompressed takes more memory than its own, and threads of its reader.
    for source, paths in groups:
        if source.slow is None:
            yield paths, _reader(arrays, source, paths)()
    todo = collections.deque(group for group in groups if group[0].slow is not None)
    limit = max((source.nbytes for source, _ in todo), default=0)
    taken = 0
    reading: collections.deque[tuple[list[str], int, Future[np.ndarray]]] = collections.deque()
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="elm_jax_read")
    try:
        while todo or reading:
            while todo and (not reading or taken + todo[0][0].nbytes <= limit):
                source, paths = todo.popleft()
                future = pool.submit(_reader(arrays, source, paths))
                reading.append((paths, source.nbytes, future))
                taken += source.nbytes
                del future
            paths, size, future = reading.popleft()
            yield paths, future.result()
            del future
            taken -= size
    finally:
        pool.shutdown(cancel_futures=True)


def _reader(
    arrays: Mapping[str, StoredArray], source: StoredArray, paths: Sequence[str]
) -> Callable[[], np.ndarray]:
    return arrays[paths[0]].read_contiguous if len(paths) == 1 else source.read


def _groups(arrays: Mapping[str, StoredArray]) -> list[tuple[StoredArray, list[str]]]:
    """Returns each array in the files with the paths that come from it.

    Those which take most memory beside their own come first, the largest first; the others in the
    order in which a fingerprint takes them.
    """
    groups: dict[int, tuple[StoredArray, list[str]]] = {}
    for path in flatten(unflatten(arrays)):
        source = arrays[path].source
        groups.setdefault(id(source), (source, []))[1].append(path)
    largest = max((source.nbytes for source, _ in groups.values()), default=0)

    def rank(group: tuple[StoredArray, list[str]]) -> int:
        source, _ = group
        return -source.nbytes if source.slow is None or 4 * source.nbytes > largest else 0

    return sorted(groups.values(), key=rank)


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


def _agree(found: Fingerprint) -> str:
    """Returns the first process's fingerprint to all."""
    from jax.experimental import multihost_utils

    digest = bytes(32)
    if jax.process_index() == 0:
        digest = bytes.fromhex(str(found).removeprefix("sha256:"))
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
