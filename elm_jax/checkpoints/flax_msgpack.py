"""Flax's msgpack files, from anywhere: plain values and NumPy arrays, nothing that is run.

The format is that of `flax.serialization.to_bytes`, which T5X's `checkpoint` files and older Orbax
ones have: maps with string keys; arrays as extension type 1, a msgpack of (shape, dtype, bytes);
NumPy scalars as type 3; arrays of more than 2**30 bytes in chunks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from elm_jax.errors import ElmError

MAX_BYTES = 2**36
"""A larger file is refused before it is read."""
MAX_DEPTH = 64
PLACEHOLDER = "PLACEHOLDER://"
"""What stands before the name of an array that lies beside the file (older Orbax)."""
_CHUNKED = "__msgpack_chunked_array__"
_ARRAY, _SCALAR = 1, 3
_DTYPE = re.compile(rb"(float|int|uint)(8|16|32|64)|bool|bfloat16")


def read_msgpack(path: Path) -> dict[str, Any]:
    """Reads a msgpack file of Flax whose top is a map.

    Returns:
      Nested dicts with strings, numbers, None, lists and NumPy arrays (read-only views).

    Raises:
      FileNotFoundError: when it is missing.
      ElmError: when it is damaged, too large, nested too deeply, or holds other types.
    """
    import msgpack

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ElmError(f"{path}: {size:,} bytes, expected at most {MAX_BYTES:,}")
    try:
        data = msgpack.unpackb(path.read_bytes(), ext_hook=_extension, strict_map_key=False)
    except (ValueError, TypeError, KeyError, MemoryError, RecursionError) as error:
        # msgpack's own exceptions are ValueErrors, but for one
        raise ElmError(f"{path}: truncated or damaged msgpack ({_reason(error)})") from error
    except msgpack.exceptions.UnpackException as error:
        raise ElmError(f"{path}: truncated or damaged msgpack ({_reason(error)})") from error
    if not isinstance(data, dict):
        raise ElmError(f"{path}: expected a msgpack map, got {type(data).__name__}")
    return data


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _extension(code: int, data: bytes) -> Any:
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"extension type {code} is neither an array nor a NumPy scalar")
    import msgpack

    shape, name, buffer = msgpack.unpackb(data, raw=True)
    if not isinstance(name, bytes) or not _DTYPE.fullmatch(name):
        raise ValueError(f"array of dtype {name!r:.50}")
    dtype = np.dtype(ml_dtypes.bfloat16 if name == b"bfloat16" else name.decode())
    return np.frombuffer(buffer, dtype).reshape(_shape(shape))


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, (list, tuple)) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"array of shape {shape!r:.50}")
    return tuple(shape)


def flatten_state(tree: Any, where: object = "msgpack") -> dict[str, Any]:
    """Returns the leaves of `read_msgpack` by 'a/b/c' path.

    A description of a tensorstore (T5X's, with keys driver, kvstore, metadata) is a leaf, and so
    is an array in chunks, which is put together.

    Raises:
      ElmError: for a map nested too deeply, a key that is no name, or chunks that do not fit.
    """
    flat: dict[str, Any] = {}
    todo: list[tuple[str, Any, int]] = [("", tree, 0)]
    while todo:
        path, node, depth = todo.pop()
        if not isinstance(node, dict) or {"driver", "kvstore"} <= node.keys():
            flat[path] = node
        elif _CHUNKED in node:
            flat[path] = _join(node, f"{where}: {path}")
        elif depth > MAX_DEPTH:
            raise ElmError(f"{where}: {path:.100} is nested more than {MAX_DEPTH} deep")
        else:
            for key, value in node.items():
                if not isinstance(key, str):
                    raise ElmError(f"{where}: key {key!r:.50} under {path!r:.100} is no string")
                todo.append((f"{path}/{key}" if path else key, value, depth + 1))
    return flat


def _join(node: Mapping[str, Any], where: str) -> np.ndarray:
    """Returns an array that was written in chunks."""
    try:
        shape = _shape([node["shape"][str(i)] for i in range(len(node["shape"]))])
        chunks = [node["chunks"][str(i)] for i in range(len(node["chunks"]))]
        if sum(chunk.size for chunk in chunks) != math.prod(shape):
            raise ValueError("their sizes do not add up")
        return np.concatenate(chunks).reshape(shape)
    except (TypeError, KeyError, ValueError, AttributeError, MemoryError) as error:
        raise ElmError(f"{where}: chunks of an array do not fit ({_reason(error)})") from error


def array_name(name: Any, where: object) -> str:
    """Returns the name of an array's folder, if it stays within the checkpoint's.

    Raises:
      ElmError: for a name that is no plain file name.
    """
    text = name.rstrip("/") if isinstance(name, str) else ""
    plain = text.isprintable() and len(text) < 250 and not set(text) & {"/", "\\"}
    if not plain or text in ("", ".", ".."):
        raise ElmError(f"{where}: array {name!r:.100} must be a folder of the checkpoint")
    return text
