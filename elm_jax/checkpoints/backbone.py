"""Backbones in and out: an embedded one, our own folders, Hugging Face folders, random ones.

<folder>/config.json          format, name, T5Config, fingerprint
<folder>/params.safetensors   t5x's parameter paths, 'encoder/layers_0/mlp/wo/kernel', ...
<folder>/spiece.model         the vocabulary, where the backbone has one
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.resources
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives numpy, and so safetensors, the dtype bfloat16)
import numpy as np

from elm_jax.checkpoints.fingerprint import fingerprint
from elm_jax.errors import ElmError, nearest
from elm_jax.experts.apply import backbone_shapes
from elm_jax.experts.tree import Tree, check_shapes, flatten, unflatten
from elm_jax.models import T5, T5Config
from elm_jax.version import __version__

FORMAT = "elm_jax backbone"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
PARAMS_FILE = "params.safetensors"
VOCABULARY_FILE = "spiece.model"
EMBEDDED = {"elm-tiny": "assets/elm_tiny"}
"""Backbones inside the package: name -> folder."""


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A pre-trained T5 and what identifies it.

    Attributes:
      name: what tables and expert stores call it.
      config: sizes and variants.
      params: nested dict of floating arrays under t5x's names.
      fingerprint: of the weights as stored, before any cast; see `fingerprint.fingerprint`.
      vocabulary_path: the SentencePiece model, if the backbone comes with one.
    """

    name: str
    config: T5Config
    params: Tree = dataclasses.field(repr=False)
    fingerprint: str
    vocabulary_path: Path | None = None


def initialize(config: T5Config, seed: int) -> Backbone:
    """Returns a backbone with random weights (t5x's initialisers), named 'random'.

    Args:
      config: sizes and variants.
      seed: of the weights.
    """
    params = _init_params(config, jax.random.key(seed))
    return Backbone("random", config, params, fingerprint(config, params))


@functools.partial(jax.jit, static_argnums=0)
def _init_params(config: T5Config, key: jax.Array) -> Tree:
    tokens = jnp.ones((1, 1), jnp.int32)
    return T5(config).init(key, tokens, tokens)["params"]


def save_backbone(backbone: Backbone, path: str | os.PathLike[str]) -> Path:
    """Writes a backbone folder, whole or not at all.

    Arrays keep their dtype. The fingerprint written is that of the arrays written, so a backbone
    that was cast to bfloat16 becomes a backbone of its own.

    Args:
      backbone: what to write.
      path: a folder that is not there yet.

    Returns:
      The folder.

    Raises:
      FileExistsError: when `path` exists.
      ElmError: when arrays do not fit the config.
    """
    from safetensors.numpy import save_file

    check_params(backbone.config, backbone.params, backbone.name)
    arrays = {k: np.ascontiguousarray(v) for k, v in flatten(backbone.params).items()}
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "elm_jax": __version__,
        "name": backbone.name,
        "config": backbone.config.to_json(),
        "fingerprint": fingerprint(backbone.config, unflatten(arrays)),
    }
    with new_folder(path) as folder:
        save_file(arrays, folder / PARAMS_FILE)
        if backbone.vocabulary_path is not None:
            shutil.copyfile(backbone.vocabulary_path, folder / VOCABULARY_FILE)
        write_json(folder / CONFIG_FILE, description)
    return Path(path)


def load_backbone(
    name_or_path: str | os.PathLike[str], *, dtype: str | None = None, on_host: bool = False
) -> Backbone:
    """Loads an embedded backbone, a folder of `save_backbone`, or a Hugging Face T5 or mT5.

    Args:
      name_or_path: 'elm-tiny', or a folder.
      dtype: 'float32' or 'bfloat16' for computation and weights, None to keep both as stored.
        With 'bfloat16', arrays which the model reads in float32 (layer norms, position biases)
        stay so, hence logits equal those of bfloat16 computation from float32 weights.
      on_host: keep numpy arrays, for a backbone that is sharded over devices afterwards; by
        default they are put on the default device.

    Returns:
      The backbone; its fingerprint is that of the stored weights.

    Raises:
      ElmError: for an unknown name, or a folder that is damaged or of another format.
      FileNotFoundError: when the path or one of its files is missing.
    """
    folder = _locate(name_or_path)
    description = read_json(folder / CONFIG_FILE)
    if description.get("format") == FORMAT:
        backbone = _load_own(folder, description)
    elif "model_type" in description:
        from elm_jax.checkpoints.huggingface import from_huggingface

        backbone = from_huggingface(folder)
    else:
        raise ElmError(
            f"{folder / CONFIG_FILE}: neither 'format': {FORMAT!r} nor a Hugging Face 'model_type'"
        )
    config, params = backbone.config, backbone.params
    if dtype is not None:
        config = config.replace(dtype=dtype)
        params = cast_params(params, dtype)
    if not on_host:
        params = jax.tree.map(jnp.asarray, params)
    return dataclasses.replace(backbone, config=config, params=params)


def _locate(name_or_path: str | os.PathLike[str]) -> Path:
    """Returns the folder of an embedded name or a path."""
    name = os.fspath(name_or_path)
    if name in EMBEDDED:
        folder = Path(str(importlib.resources.files("elm_jax") / EMBEDDED[name]))
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: the embedded backbone {name!r} is missing from this installation"
            )
        return folder
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ElmError(f"{path} is a file; a backbone is a folder with {CONFIG_FILE}")
    if path.name == name:
        raise ElmError(
            f"unknown backbone {name!r}{nearest(name, EMBEDDED)}: neither an embedded one "
            f"({', '.join(EMBEDDED)}) nor a folder"
        )
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise FileNotFoundError(f"{path}: no such backbone folder{nearest(path.name, siblings)}")


def _load_own(folder: Path, description: dict[str, Any]) -> Backbone:
    """Reads a folder of `save_backbone` and checks it."""
    where = folder / CONFIG_FILE
    for key in ("format_version", "name", "config", "fingerprint"):
        if key not in description:
            raise ElmError(f"{where}: key {key!r} is missing")
    if description["format_version"] != FORMAT_VERSION:
        raise ElmError(
            f"{where}: format_version {description['format_version']!r}, but this elm_jax reads "
            f"{FORMAT_VERSION}; upgrade elm_jax, or save the backbone again"
        )
    try:
        config = T5Config.from_json(description["config"])
    except (ElmError, TypeError) as error:
        raise ElmError(f"{where}: {error}") from error
    params = unflatten(read_safetensors(folder / PARAMS_FILE))
    check_params(config, params, folder / PARAMS_FILE)
    found = fingerprint(config, params)
    if found != description["fingerprint"]:
        raise ElmError(
            f"{folder}: fingerprint of the weights is {found[:23]}, but {CONFIG_FILE} says "
            f"{str(description['fingerprint'])[:23]}; the folder is damaged or was edited"
        )
    vocabulary = folder / VOCABULARY_FILE
    return Backbone(
        description["name"], config, params, found, vocabulary if vocabulary.is_file() else None
    )


def cast_params(params: Tree, dtype: str) -> Tree:
    """Casts weights to 'float32', or to 'bfloat16' except where the model computes in float32.

    Args:
      params: nested dict of floating arrays.
      dtype: 'float32' or 'bfloat16'.
    """

    def cast(path: str, array: Any) -> Any:
        read_in_full = path.endswith(("/scale", "/rel_embedding"))
        return array.astype(jnp.float32 if read_in_full else jnp.dtype(dtype))

    return unflatten({path: cast(path, array) for path, array in flatten(params).items()})


def check_params(config: T5Config, params: Tree, where: object) -> None:
    """Checks that arrays are those of a config.

    Args:
      config: what the arrays should fit.
      params: nested dict of arrays.
      where: file or name, for the message.

    Raises:
      ElmError: naming a parameter path that is missing, unknown or of another shape or kind.
    """
    check_shapes(str(where), params, backbone_shapes(config))
    for path, array in flatten(params).items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ElmError(f"{where}: {path!r} has dtype {array.dtype}, expected a floating one")


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a safetensors file.

    Raises:
      FileNotFoundError: when it is missing.
      ElmError: when it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ElmError(f"{path}: truncated or damaged safetensors file ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      FileNotFoundError: when the file is missing.
      ElmError: when it holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ElmError(f"{path}: invalid JSON ({error})") from error
    if not isinstance(data, dict):
        raise ElmError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that takes its name when the block succeeds.

    Raises:
      FileExistsError: when `path` exists, before or after the block.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; name a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError as error:
            raise FileExistsError(f"{path} appeared while it was being written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
