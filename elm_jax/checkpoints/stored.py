"""Arrays that lie in files: shapes at once, values when and where they are needed.

A reader opens a checkpoint and returns a `StoredArray` for each array in it. What lies behind one
(safetensors, zarr, the bytes of a msgpack file) is known to the reader alone. Renaming, transposing
and taking layers apart happen on `StoredArray`s, so nothing is read before its place is known.

Safetensors files are read by offset, not mapped into memory: the pages of a mapped file would
count as memory of the process beside the arrays themselves.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from elm_jax.errors import ElmError

Index = tuple[slice, ...]
"""One slice of step 1 per axis, as `jax.make_array_from_callback` gives them."""

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Names of dtypes in safetensors files."""
UNREADABLE = (
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "F6_E2M3",
    "F6_E3M2",
    "F4",
    "C64",
)
"""Names of more of them, of which no backbone is made."""
MAX_HEADER = 100_000_000
"""Longest header of a safetensors file that is read; the format's own limit."""
BLOCK = 16 * 2**20
"""Bytes read at a time where only some columns of an array are wanted."""
PIECE = 2**20
"""Bytes read at a time where they are transposed: they should stay in the processor's cache."""
_COLUMNS = 256
_ALIGNMENT = 64
"""With this alignment JAX uses a buffer of the CPU as it is, instead of a copy."""


@dataclasses.dataclass(frozen=True, eq=False)
class StoredArray:
    """An array in a file.

    Several can be parts of one array in the file (the layers of a stack): then `base` is the whole,
    and `cut` takes the part out of it, so that the whole is read but once.

    Attributes:
      shape: its shape.
      dtype: its dtype as stored.
      where: the file, and the name in it, for messages.
      read_part: reads the elements of an `Index` with whole bounds.
      base: the array in the file; None for itself.
      cut: from the values of `base` to those of this array.
      slow: the axis of which the file holds one entry after the other, so that to read some of them
        costs no more than their bytes; None where a part may cost as much as the whole.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    where: str
    read_part: Callable[[Index], np.ndarray] = dataclasses.field(repr=False)
    base: StoredArray | None = dataclasses.field(default=None, repr=False)
    cut: Callable[[np.ndarray], np.ndarray] = dataclasses.field(default=lambda x: x, repr=False)
    slow: int | None = None

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def source(self) -> StoredArray:
        """The array in the file."""
        return self if self.base is None else self.base

    @property
    def T(self) -> StoredArray:  # noqa: N802  (NumPy's name)
        """The transpose."""
        transposed = self._derived(
            self.shape[::-1], lambda index: self.read(index[::-1]).T, lambda x: self.cut(x).T
        )
        if self.slow is None:
            return transposed
        return dataclasses.replace(transposed, slow=self.ndim - 1 - self.slow)

    def layer(self, number: int, axis: int) -> StoredArray:
        """Returns entry `number` along an axis, without that axis."""
        after = self.shape[:axis] + self.shape[axis + 1 :]
        taken: Any = (slice(None),) * axis + (number,)

        def read(index: Index) -> np.ndarray:
            one = (*index[:axis], slice(number, number + 1), *index[axis:])
            return self.read(one).reshape(
                tuple(part.stop - part.start for part in _whole(index, after))
            )

        return self._derived(after, read, lambda x: self.cut(x)[taken])

    def joined(self, axis: int) -> StoredArray:
        """Returns the array with axes `axis` and `axis + 1` made one."""
        inner = self.shape[axis + 1]
        shape = (*self.shape[:axis], self.shape[axis] * inner, *self.shape[axis + 2 :])

        def read(index: Index) -> np.ndarray:
            part = _whole(index, shape)
            start, stop = part[axis].start, part[axis].stop
            rows = slice(start // inner, -(-stop // inner))
            values = self.read((*part[:axis], rows, slice(0, inner), *part[axis + 1 :]))
            values = values.reshape(*values.shape[:axis], -1, *values.shape[axis + 2 :])
            begin = start - rows.start * inner
            return values[(slice(None),) * axis + (slice(begin, begin + stop - start),)]

        return self._derived(shape, read, lambda x: self.cut(x).reshape(shape))

    def _derived(
        self,
        shape: tuple[int, ...],
        read: Callable[[Index], np.ndarray],
        cut: Callable[[np.ndarray], np.ndarray],
    ) -> StoredArray:
        return StoredArray(shape, self.dtype, self.where, read, self.source, cut)

    def read(self, index: Index | None = None) -> np.ndarray:
        """Reads the array, or a part of it.

        Raises:
          ElmError: naming the file when it is truncated, damaged or larger than memory.
        """
        try:
            return self.read_part(_whole(index or (slice(None),) * self.ndim, self.shape))
        except MemoryError as error:
            raise self._too_large() from error

    def read_contiguous(self) -> np.ndarray:
        """Reads the array as `as_buffer` would make it, without a second copy where that can be.

        Raises:
          ElmError: as `read`.
        """
        if not self.slow:  # as it lies in the file, or in no order that is known
            return as_buffer(self.read(), self.dtype)
        try:
            out = empty(self.shape, self.dtype)
        except MemoryError as error:
            raise self._too_large() from error
        length = self.shape[self.slow]
        step = max(1, PIECE * length // max(1, self.nbytes))
        for start in range(0, length, step):
            part: list[slice] = [slice(0, size) for size in self.shape]
            part[self.slow] = slice(start, min(start + step, length))
            out[tuple(part)] = self.read(tuple(part))
        return out

    def _too_large(self) -> ElmError:
        return ElmError(f"{self.where}: {self.nbytes:,} bytes do not fit in memory")


def _whole(index: Index, shape: Sequence[int]) -> Index:
    """Returns the index with both ends of each slice."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """Returns an uninitialised array which the CPU backend of JAX can use without a copy."""
    count = math.prod(shape) * dtype.itemsize
    memory = np.empty(count + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + count].view(dtype).reshape(shape)


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


def in_memory(array: np.ndarray, where: str) -> StoredArray:
    """Returns a `StoredArray` of values that are in memory already."""
    return StoredArray(array.shape, array.dtype, where, lambda index: array[index])


def open_safetensors(path: Path) -> dict[str, StoredArray]:
    """Opens a safetensors file.

    Args:
      path: the file.

    Returns:
      The tensors by name. Header and file agree: every tensor lies within the file, as many bytes
      as its shape and dtype say, and the tensors fill it without gap or overlap.

    Raises:
      FileNotFoundError: when it is missing.
      ElmError: when it is truncated or damaged.

    Source: https://github.com/huggingface/safetensors, section "Format".
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")

    def damaged(reason: str) -> ElmError:
        return ElmError(f"{path}: truncated or damaged safetensors file ({reason})")

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise damaged(f"{size:,} bytes cannot hold a header of {length:,}")
        try:
            header = json.loads(file.read(length).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise damaged(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    opened: dict[str, StoredArray] = {}
    ends: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (TypeError, KeyError, ValueError) as error:
            raise damaged(f"tensor {name!r:.100} lacks dtype, shape or data_offsets") from error
        if dtype in UNREADABLE:
            raise ElmError(
                f"{path}: tensor {name!r:.100} has dtype {dtype}, which is not supported; save the "
                "model in float32, float16 or bfloat16"
            )
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise damaged(f"tensor {name!r:.100} has the unknown dtype {dtype!r:.50}")
        if any(type(n) is not int or n < 0 for n in numbers) or len(shape) > 8:
            raise damaged(f"tensor {name!r:.100} has shape {shape!r:.50} at [{begin}, {end}]")
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize or start + end > size:
            raise damaged(
                f"tensor {name!r:.100} of shape {shape!r:.50} and dtype {dtype} at bytes "
                f"{start + begin:,} to {start + end:,} of {size:,}"
            )
        ends.append((begin, end, name))
        opened[name] = _safetensor(path, name, DTYPES[dtype], tuple(shape), start + begin)
    position = 0
    for begin, end, name in sorted(ends):
        if begin != position:
            raise damaged(f"tensor {name!r:.100} overlaps another or leaves a gap")
        position = end
    if start + position != size:
        raise damaged(f"{size - start - position:,} bytes belong to no tensor")
    return opened


def _safetensor(
    path: Path, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int
) -> StoredArray:
    row = math.prod(shape[1:]) * dtype.itemsize

    def read(index: Index) -> np.ndarray:
        out = empty([part.stop - part.start for part in index], dtype)
        if not out.size:
            return out
        with path.open("rb", buffering=0) as file:
            first = index[0] if index else slice(0, 1)
            file.seek(offset + first.start * row)
            if out.nbytes == (first.stop - first.start) * row or not shape:
                _fill(file, out, path)
                return out
            step = max(1, BLOCK // row)  # rows
            for start in range(0, first.stop - first.start, step):
                part = out[start : start + step]
                block = np.empty((len(part), *shape[1:]), dtype)
                _fill(file, block, path)
                part[...] = block[(slice(None), *index[1:])]
        return out

    return StoredArray(shape, dtype, f"{path}: {name}", read, slow=0 if shape else None)


def _fill(file: Any, array: np.ndarray, path: Path) -> None:
    """Reads a contiguous array from where the file stands."""
    view = array.reshape(-1).view(np.uint8).data
    while view:
        try:
            count = file.readinto(view[: 2**30])
        except OSError as error:
            raise ElmError(f"{path}: cannot be read ({error})") from error
        if not count:
            raise ElmError(f"{path}: truncated while it was being read")
        view = view[count:]


MAX_RATIO = 1100
"""How many times its bytes on disk a zarr array may claim to be: what gzip reaches at best."""
LARGEST_CHUNK = 2**26
"""Bytes that a chunk of a zarr array may have, unless the array is as large."""
SMALL = 2**30
"""Arrays which claim fewer bytes in all are read whatever their ratio."""


def open_zarr(
    stores: Mapping[str, Mapping[str, Any]], folder: Path, *, driver: str = "zarr"
) -> dict[str, StoredArray]:
    """Opens zarr arrays through tensorstore.

    Args:
      stores: name -> key-value store of tensorstore, 'file' or 'ocdbt'.
      folder: which holds them all, for messages and sizes.
      driver: 'zarr' or 'zarr3'.

    Raises:
      ElmError: naming the array that is missing or damaged, that lacks a chunk, or that claims to
        be far larger than its files.
    """
    import tensorstore

    context = tensorstore.Context({"file_io_concurrency": {"limit": 16}})
    futures = {
        name: tensorstore.open(
            {"driver": driver, "kvstore": dict(kvstore)}, open=True, read=True, context=context
        )
        for name, kvstore in stores.items()
    }
    opened = {}
    for name, future in futures.items():
        try:
            opened[name] = _zarr(future.result(), name, folder)
        except (ValueError, OSError, OverflowError, TypeError) as error:
            if isinstance(error, ElmError):
                raise
            raise _damaged(folder, name, error) from error
    claimed = sum(array.nbytes for array in opened.values())
    if claimed > SMALL:
        held = folder_size(folder)
        if claimed > MAX_RATIO * held:
            raise ElmError(
                f"{folder}: its arrays claim {claimed:,} bytes, but its files have {held:,}"
            )
    return opened


def _zarr(store: Any, name: str, folder: Path) -> StoredArray:
    shape, dtype = tuple(store.shape), store.dtype.numpy_dtype
    if dtype.hasobject or math.prod(shape) * dtype.itemsize > 2**48:
        raise ElmError(f"{folder}: array {name} has dtype {dtype} and shape {shape}")
    chunk = store.chunk_layout.read_chunk.shape
    # A chunk is decoded whole; tensorstore ends the process where memory does not suffice for it.
    if math.prod(chunk) > max(2 * math.prod(shape), LARGEST_CHUNK // dtype.itemsize):
        raise ElmError(f"{folder}: array {name} of shape {shape} has chunks of shape {chunk}")

    def read(index: Index) -> np.ndarray:
        import tensorstore

        _check_chunks(store, shape, name, folder)
        out = empty([part.stop - part.start for part in index], dtype)
        origin = [0] * len(index)
        try:
            part = store[index].translate_to[origin] if index else store
            tensorstore.array(out, copy=False).write(part).result()
        except (ValueError, OSError, OverflowError) as error:
            raise _damaged(folder, name, error) from error
        return out

    return StoredArray(shape, dtype, f"{folder}: {name}", read)


def _check_chunks(store: Any, shape: tuple[int, ...], name: str, folder: Path) -> None:
    """Refuses an array of which a chunk is missing: zarr would take it for zeros."""
    chunks = store.chunk_layout.read_chunk.shape
    expected = math.prod(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))
    try:
        keys = store.kvstore.list().result()
        found = sum(not key.startswith((b".z", b"zarr.json")) for key in keys)
    except (ValueError, OSError) as error:
        raise _damaged(folder, name, error) from error
    if found < expected:
        raise ElmError(f"{folder}: array {name} has {found} of its {expected} chunks")


def _damaged(folder: Path, name: str, error: BaseException) -> ElmError:
    reason = str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
    return ElmError(f"{folder}: array {name} is missing or damaged ({' '.join(reason.split())})")


def same_values(one: Any, other: Any) -> bool:
    """Whether two arrays, stored or not, hold the same values."""
    if one is other:
        return True
    if one.shape != other.shape:
        return False
    first, second = (x.read() if isinstance(x, StoredArray) else x for x in (one, other))
    return bool(np.array_equal(first, second))


def folder_size(folder: Path) -> int:
    """Returns the bytes in all files of a folder."""
    return sum(
        os.path.getsize(os.path.join(top, name))
        for top, _, names in os.walk(folder)
        for name in names
    )
