"""Files of experts in and out: folders that appear whole, and readers that trust no file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy, and so safetensors, the dtype bfloat16)
import numpy as np

from elm_jax.errors import ElmError

MAX_JSON_BYTES = 2**24
"""A larger JSON file is refused before it is read."""
FLOATS = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype("bfloat16")}
"""The safetensors dtypes which float32 holds without loss."""


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that takes its name when the block succeeds.

    Args:
      path: a folder that is not there yet, or is empty.

    Raises:
      FileExistsError: if `path` holds something, before or after the block.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        try:
            os.replace(temporary, path)  # an empty folder is replaced, a full one is not
        except OSError as error:
            raise FileExistsError(f"{path} was filled while it was being written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file that may come from anywhere.

    Raises:
      FileNotFoundError: when the file is missing.
      ElmError: when it is too large or holds anything else, NaN and Infinity included.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ElmError(f"{path}: {size:,} bytes, expected at most {MAX_JSON_BYTES:,}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ElmError(f"{path}: invalid JSON ({error})") from error
    if not isinstance(data, dict):
        raise ElmError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def shown(value: object, length: int = 120) -> str:
    """Returns the repr of what a file said, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


class TensorFile:
    """The tensors of a safetensors file: shapes at once, values one by one.

    Attributes:
      path: the file.
      shapes: name -> shape, as the header says; the header agrees with the size of the file.
      dtypes: name -> safetensors' name of the dtype.
    """

    def __init__(self, path: Path, opened: Any) -> None:
        self.path = path
        self._opened = opened
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name in opened.keys():  # noqa: SIM118  (not a mapping)
            part = opened.get_slice(name)
            self.shapes[name] = tuple(part.get_shape())
            self.dtypes[name] = part.get_dtype()

    def read(self, name: str, shape: Sequence[int], *, exact: bool = False) -> np.ndarray:
        """Reads one tensor of finite floats.

        Args:
          name: a name of the file.
          shape: what it must have; checked before anything is read.
          exact: keep the stored dtype instead of float32.

        Raises:
          ElmError: naming the tensor that has another shape, another dtype than float32, float16
            or bfloat16, or a value that is not finite.
        """
        if self.shapes[name] != tuple(shape):
            raise ElmError(
                f"{self.path}: tensor {shown(name)} has shape {self.shapes[name]}, "
                f"expected {tuple(shape)}"
            )
        if self.dtypes[name] not in FLOATS:
            raise ElmError(
                f"{self.path}: tensor {shown(name)} has dtype {self.dtypes[name]}; "
                f"accepted: {', '.join(FLOATS)}"
            )
        array = np.asarray(self._opened.get_tensor(name))
        if not np.isfinite(array.astype(np.float32)).all():
            raise ElmError(f"{self.path}: tensor {shown(name)} has a value that is not finite")
        return array if exact else array.astype(np.float32)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Opens a safetensors file, whose header is checked against its size.

    Raises:
      FileNotFoundError: when it is missing.
      ElmError: when it is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "numpy") as opened:
            yield TensorFile(path, opened)
    except (SafetensorError, OSError) as error:
        raise ElmError(f"{path}: truncated or damaged safetensors file ({error})") from error


def refuse_pickle(folder: Path, weights: str, pickle: str, remedy: str) -> None:
    """Explains a folder that has its weights as a pickle alone.

    Args:
      folder: where the weights should be.
      weights: name of the safetensors file.
      pickle: name of the pickle that stands in for it.
      remedy: how to write the former.

    Raises:
      ElmError: when only the pickle is there.
    """
    if not (folder / weights).is_file() and (folder / pickle).exists():
        raise ElmError(
            f"{folder / pickle} is a pickle, which can run code when read, and there is no "
            f"{weights}; {remedy}"
        )
