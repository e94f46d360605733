"""Backbones in and out: an embedded one, folders of ours and of others, random ones.

<folder>/config.json          format, name, T5Config, fingerprint
<folder>/params.safetensors   t5x's parameter paths, 'encoder/layers_0/mlp/wo/kernel', ...
        or params/            the same as an Orbax pytree
<folder>/spiece.model         the vocabulary, where the backbone has one; for bytes (ByT5) it is
                              tokenizer_config.json, as in Hugging Face's folders
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.resources
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.checkpoints.fingerprint import fingerprint
from elm_jax.checkpoints.infer import ConfigLike, infer_config
from elm_jax.checkpoints.loading import check_dtype, load_params, storage_dtype
from elm_jax.checkpoints.stored import StoredArray, open_safetensors
from elm_jax.errors import ElmError, nearest
from elm_jax.experts.apply import backbone_shapes
from elm_jax.experts.files import new_folder, read_json, write_json
from elm_jax.experts.tree import Tree, check_shapes, flatten, unflatten
from elm_jax.models import T5, T5Config
from elm_jax.models.config import RUN_FIELDS
from elm_jax.models.scan import from_storage, to_storage
from elm_jax.version import __version__

FORMAT = "elm_jax backbone"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
PARAMS_FILE = "params.safetensors"
PARAMS_FOLDER = "params"
ARRAY_FORMATS = ("safetensors", "orbax")
VOCABULARY_FILE = "spiece.model"
BYTES_FILE = "tokenizer_config.json"
BYTES_TOKENIZER = "ByT5Tokenizer"
EMBEDDED = {"elm-tiny": "assets/elm_tiny"}
"""Backbones inside the package: name -> folder."""


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A pre-trained T5 and what identifies it.

    Attributes:
      name: what tables and expert stores call it.
      config: sizes and variants.
      params: nested dict of floating arrays under t5x's names, laid out as `config.scan_layers`
        says.
      fingerprint: of the weights as stored, before any cast; see `fingerprint.fingerprint`.
      vocabulary_path: the SentencePiece model, if the backbone comes with one; a JSON file that
        names Hugging Face's ByT5Tokenizer where tokens are bytes. `data.load_vocabulary` reads it.
    """

    name: str
    config: T5Config
    params: Tree = dataclasses.field(repr=False)
    fingerprint: str
    vocabulary_path: Path | None = None

    def run_as(self, **changes: Any) -> Backbone:
        """Returns the same backbone, to be run in another way.

        Args:
          **changes: fields of `RUN_FIELDS`, such as `scan_layers=True`, which lays the arrays out
            anew, or `remat='minimal'`; `dtype` is that of the computation alone.

        Raises:
          ElmError: for a field that says what the backbone is, or how its arrays are quantised.
        """
        accepted = [name for name in RUN_FIELDS if name != "quantization"]
        for name in changes:
            if name not in accepted:
                raise ElmError(
                    f"{name!r} is no way to run a backbone{nearest(name, accepted)}; "
                    f"accepted: {', '.join(accepted)}"
                )
        config, params = self.config.replace(**changes), self.params
        if config.scan_layers != self.config.scan_layers:
            params = from_storage(to_storage(params, self.config), config)
        return dataclasses.replace(self, config=config, params=params)

    def cast(self, dtype: str) -> Backbone:
        """Returns the backbone with its weights and computation in 'float32' or 'bfloat16'."""
        check_dtype(dtype)
        if self.config.quantization is not None:
            raise ElmError(f"backbone {self.name!r} is quantised; cast it before, not after")
        return dataclasses.replace(
            self, config=self.config.replace(dtype=dtype), params=cast_params(self.params, dtype)
        )


def initialize(config: T5Config, seed: int) -> Backbone:
    """Returns a backbone with random weights (t5x's initialisers), named 'random'.

    Args:
      config: sizes and variants.
      seed: of the weights.
    """
    if config.quantization is not None:
        raise ElmError("random weights are float; draw them, then call quantize_backbone")
    params = _init_params(config, jax.random.key(seed))
    return Backbone("random", config, params, fingerprint(config, params))


@functools.partial(jax.jit, static_argnums=0)
def _init_params(config: T5Config, key: jax.Array) -> Tree:
    tokens = jnp.ones((1, 1), jnp.int32)
    return T5(config).init(key, tokens, tokens)["params"]


def save_backbone(
    backbone: Backbone, path: str | os.PathLike[str], *, arrays: str = "safetensors"
) -> Path:
    """Writes a backbone folder, whole or not at all.

    Arrays keep their dtype. The fingerprint written is that of the arrays written, so a backbone
    that was cast to bfloat16 becomes a backbone of its own.

    Args:
      backbone: what to write.
      path: a folder that is not there yet, or is empty.
      arrays: 'safetensors', or 'orbax' for an Orbax pytree.

    Returns:
      The folder.

    Raises:
      FileExistsError: when `path` exists.
      ElmError: when arrays do not fit the config.
    """
    from safetensors.numpy import save_file

    if arrays not in ARRAY_FORMATS:
        hint = nearest(arrays, ARRAY_FORMATS)
        raise ElmError(f"unknown arrays {arrays!r}{hint}; one of {', '.join(ARRAY_FORMATS)}")
    config, stored = stored_form(backbone)
    flat = {k: np.ascontiguousarray(v) for k, v in flatten(stored).items()}
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "elm_jax": __version__,
        "name": backbone.name,
        "config": config.to_json(),
        "fingerprint": fingerprint(config, unflatten(flat)),
    }
    with new_folder(path) as folder:
        if arrays == "orbax":
            from elm_jax.checkpoints.orbax import save_orbax

            save_orbax(unflatten(flat), folder / PARAMS_FOLDER)
        else:
            save_file(flat, folder / PARAMS_FILE)
        write_vocabulary(backbone, folder)
        write_json(folder / CONFIG_FILE, description)
    return Path(path)


def stored_form(backbone: Backbone) -> tuple[T5Config, Tree]:
    """Returns a backbone's config and arrays as every format stores them: NumPy, per layer.

    Raises:
      ElmError: when arrays do not fit the config, or are quantised.
    """
    config = backbone.config
    if config.quantization is not None:
        raise ElmError(
            f"backbone {backbone.name!r} is quantised ({config.quantization}), which is a way to "
            "run it; write the backbone that it was made from"
        )
    check_params(config, backbone.params, backbone.name)
    stored = to_storage(backbone.params, config)
    arrays = {path: np.asarray(array) for path, array in flatten(stored).items()}
    return config.replace(scan_layers=False), unflatten(arrays)


def write_vocabulary(backbone: Backbone, folder: Path) -> None:
    """Puts the vocabulary of a backbone, if it has one, into a folder."""
    path = backbone.vocabulary_path
    if path is None:
        return
    if path.suffix != ".json":
        shutil.copyfile(path, folder / VOCABULARY_FILE)
        return
    names = ("tokenizer_class", "extra_ids", "extra_special_tokens", "additional_special_tokens")
    kept = {key: value for key, value in read_json(path).items() if key in names}
    write_json(folder / BYTES_FILE, kept)


def find_vocabulary(folder: Path) -> Path | None:
    """Returns a folder's vocabulary: a SentencePiece model, or a JSON file that names bytes."""
    if (folder / VOCABULARY_FILE).is_file():
        return folder / VOCABULARY_FILE
    for name in (BYTES_FILE, CONFIG_FILE):
        path = folder / name
        if path.is_file() and read_json(path).get("tokenizer_class") == BYTES_TOKENIZER:
            return path
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A backbone on disk of which no array was read yet.

    Attributes:
      folder: where it is.
      format: 'own', 'orbax', 'huggingface' or 't5x'.
      name: what the backbone will be called.
      config: sizes and variants.
      arrays: path -> stored array, per layer; paths and shapes are those of the config.
      vocabulary_path: see `Backbone`.
      fingerprint: where the folder says it.
    """

    folder: Path
    format: str
    name: str
    config: T5Config
    arrays: Mapping[str, StoredArray] = dataclasses.field(repr=False)
    vocabulary_path: Path | None
    fingerprint: str | None = None


LONGEST_MESSAGE = 1000


@contextlib.contextmanager
def _short_errors() -> Iterator[None]:
    """Shortens what an error quotes from a file, if that would fill a screen."""
    try:
        yield
    except ElmError as error:
        text = str(error)
        if len(text) <= LONGEST_MESSAGE:
            raise
        half = LONGEST_MESSAGE // 2
        raise ElmError(f"{text[:half]} [...] {text[-half:]}") from error


@_short_errors()
def load_backbone(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    on_host: bool = False,
    shardings: Tree | Callable[[T5Config], Tree] | None = None,
    config: ConfigLike = None,
) -> Backbone:
    """Loads a backbone, array by array.

    Args:
      name_or_path: 'elm-tiny', or a folder: one of `save_backbone`; a Hugging Face T5, mT5
        or umT5 (T5 1.0, 1.1, LM-adapt, T0, FLAN-T5, ByT5, ...; safetensors, sharded or not); a T5X
        checkpoint (`checkpoint_<step>`, either layout, of its networks `t5` and `scalable_t5`); or
        an Orbax pytree of parameters.
      dtype: 'float32' or 'bfloat16' for computation and weights, None to keep both as stored.
        With 'bfloat16', arrays which the model reads in float32 (layer norms, position biases)
        stay so, hence logits equal those of bfloat16 computation from float32 weights.
      on_host: keep numpy arrays, for a backbone that is sharded over devices afterwards; by
        default they are put on the default device.
      shardings: a sharding for each parameter, or a function from the config to these, so that
        arrays go straight onto a mesh; see `training.backbones.load_backbone_on_mesh`.
      config: for a T5X checkpoint or Orbax pytree, which hold no config, what `infer_config` cannot
        find out: a T5Config, some of its fields, or a gin file.

    Returns:
      The backbone; its fingerprint is that of the stored weights.

    Raises:
      ElmError: for an unknown name, or a folder that is damaged or of another format.
      FileNotFoundError: when the path or one of its files is missing.
    """
    check_dtype(dtype)
    source = open_backbone(name_or_path, config=config)
    placed = shardings(source.config) if callable(shardings) else shardings
    if placed is not None:
        if on_host:
            raise ElmError("on_host and shardings exclude each other")
        check_shapes("the tree of shardings", _shapes(source, placed), unflatten(source.arrays))
    params, found = load_params(
        source.config, source.arrays, dtype=dtype, shardings=placed, on_host=on_host
    )
    if source.fingerprint not in (None, found):
        raise ElmError(
            f"{source.folder}: fingerprint of the weights is {found[:23]}, but {CONFIG_FILE} says "
            f"{source.fingerprint[:23]}; the folder is damaged or was edited"
        )
    run = source.config if dtype is None else source.config.replace(dtype=dtype)
    return Backbone(source.name, run, params, found, source.vocabulary_path)


def _shapes(source: Source, placed: Tree) -> Tree:
    """Returns the shapes under the paths of a tree of shardings, to compare the paths."""
    nothing = jax.ShapeDtypeStruct((), np.float32)
    return unflatten({path: source.arrays.get(path, nothing) for path in flatten(placed)})


@_short_errors()
def open_backbone(name_or_path: str | os.PathLike[str], *, config: ConfigLike = None) -> Source:
    """Opens a backbone and checks names and shapes; see `load_backbone`."""
    folder = _locate(name_or_path)
    if (folder / CONFIG_FILE).is_file():
        description = read_json(folder / CONFIG_FILE)
        if config is not None:
            raise ElmError(f"{folder / CONFIG_FILE} is the config; another one was given")
        if description.get("format") == FORMAT:
            return _open_own(folder, description)
        if "model_type" in description:
            from elm_jax.checkpoints.huggingface import open_huggingface

            return open_huggingface(folder)
        raise ElmError(
            f"{folder / CONFIG_FILE}: neither 'format': {FORMAT!r} nor a Hugging Face 'model_type'"
        )
    from elm_jax.checkpoints import t5x

    if t5x.is_t5x(folder):
        arrays = t5x.open_t5x(folder)
        found = infer_config(arrays, folder, config)
        found = found.replace(scan_layers=False, quantization=None)
        check_arrays(found, arrays, folder)
        vocabulary = find_vocabulary(folder)
        return Source(folder, "t5x", _t5x_name(folder), found, arrays, vocabulary)
    if steps := t5x.steps(folder):
        raise ElmError(
            f"{folder} holds checkpoints of T5X; name one of them, such as "
            f"{folder / f'checkpoint_{steps[-1]}'}"
        )
    raise FileNotFoundError(
        f"{folder}: no {CONFIG_FILE} (ours or Hugging Face's), and no checkpoint of T5X or Orbax"
    )


def _t5x_name(folder: Path) -> str:
    """Returns '<run>-<step>' for a checkpoint in a run's folder, else the folder's name."""
    path = folder.resolve()
    prefix, _, step = path.name.partition("checkpoint_")
    return f"{path.parent.name}-{step}" if not prefix and step and path.parent.name else path.name


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


def _open_own(folder: Path, description: dict[str, Any]) -> Source:
    """Opens a folder of `save_backbone`."""
    where = folder / CONFIG_FILE
    for key in ("format_version", "name", "config", "fingerprint"):
        if key not in description:
            raise ElmError(f"{where}: key {key!r} is missing")
    if description["format_version"] != FORMAT_VERSION:
        raise ElmError(
            f"{where}: format_version {description['format_version']!r}, but this elm_jax reads "
            f"{FORMAT_VERSION}; upgrade elm_jax, or save the backbone again"
        )
    name, digest = description["name"], description["fingerprint"]
    if not isinstance(name, str) or not isinstance(digest, str):
        raise ElmError(f"{where}: keys 'name' and 'fingerprint' should be strings")
    try:
        config = T5Config.from_json(description["config"])
        config = config.replace(scan_layers=False, quantization=None)
    except (ElmError, TypeError) as error:
        raise ElmError(f"{where}: {error}") from error
    form, file = "own", folder / PARAMS_FILE
    if not file.exists() and (folder / PARAMS_FOLDER).is_dir():
        from elm_jax.checkpoints.orbax import open_orbax

        form, file = "orbax", folder / PARAMS_FOLDER
        arrays = open_orbax(file)
    else:
        arrays = open_safetensors(file)
    check_arrays(config, arrays, file)
    return Source(folder, form, name, config, arrays, find_vocabulary(folder), digest)


def check_arrays(config: T5Config, arrays: Mapping[str, StoredArray], where: Path) -> None:
    """Checks that stored arrays are those of a config, before any memory is taken for them.

    Raises:
      ElmError: naming a size of the config that the files cannot hold, or a parameter path that
        is missing, unknown or of another shape or kind.
    """
    check_sizes(config, arrays, where)
    check_params(config, unflatten_names(arrays, where), where)


def check_sizes(config: T5Config, arrays: Mapping[str, StoredArray], where: object) -> None:
    """Refuses a config far larger than what is stored, so that it is never built.

    Raises:
      ElmError: naming the field.
    """
    held = sum(math.prod(array.shape) for array in arrays.values())
    layers = ("num_encoder_layers", "num_decoder_layers")
    for field in dataclasses.fields(config):
        value, limit = getattr(config, field.name), len(arrays) if field.name in layers else held
        if field.name in ("relative_attention_max_distance", "attention_chunk"):
            limit = 2**31 - 1
        if field.type == "int" and value > limit:
            raise ElmError(
                f"{where}: {field.name} is {value:,} in the config, but there are "
                f"{len(arrays):,} arrays of {held:,} elements in all"
            )
        if field.type == "float" and (
            type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= 1
        ):
            raise ElmError(f"{where}: {field.name} must be a number from 0 to 1, got {value!r:.50}")
    buckets, distance = (
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
    )
    if buckets < 4 or distance <= buckets // 2:
        raise ElmError(
            f"{where}: relative_attention_num_buckets must be 4 or more and less than twice "
            f"relative_attention_max_distance, got {buckets} and {distance}"
        )


def unflatten_names(arrays: Mapping[str, Any], where: object) -> Tree:
    """Returns the nested dict of arrays whose names come from a file.

    Raises:
      ElmError: for names that are no tree, such as 'a' beside 'a/b'.
    """
    for path in arrays:
        parts = path.split("/")
        if any("/".join(parts[:i]) in arrays for i in range(1, len(parts))) or len(parts) > 32:
            raise ElmError(f"{where}: array {path!r:.100} lies inside another array")
    return unflatten(arrays)


def cast_params(params: Tree, dtype: str) -> Tree:
    """Casts weights to 'float32', or to 'bfloat16' except where the model computes in float32.

    Args:
      params: nested dict of floating arrays.
      dtype: 'float32' or 'bfloat16'.
    """

    return unflatten(
        {
            path: array.astype(storage_dtype(path, array.dtype, dtype))
            for path, array in flatten(params).items()
        }
    )


def param_shapes(config: T5Config) -> Tree:
    """Returns `backbone_shapes(config)`, in the time that it takes for one layer of each stack."""
    if config.scan_layers:  # traces one layer as it is
        return backbone_shapes(config)
    tree = dict(backbone_shapes(config.replace(num_encoder_layers=1, num_decoder_layers=1)))
    counts = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    for stack, count in counts.items():
        parts = dict(tree[stack])
        layer = parts.pop("layers_0")
        tree[stack] = {**parts, **{f"layers_{i}": layer for i in range(count)}}
    return tree


def check_params(config: T5Config, params: Tree, where: object) -> None:
    """Checks that arrays are those of a config.

    Args:
      config: what the arrays should fit.
      params: nested dict of arrays.
      where: file or name, for the message.

    Raises:
      ElmError: naming a parameter path that is missing, unknown or of another shape or kind.
    """
    check_shapes(str(where), params, param_shapes(config))
    for path, array in flatten(params).items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ElmError(f"{where}: {path!r} has dtype {array.dtype}, expected a floating one")
