"""T5X checkpoints in and out, without t5x.

    checkpoint_<step>/state/       Orbax pytree {target, state: {step, param_states}}

    checkpoint_<step>/checkpoint   before Orbax: msgpack {version, optimizer: {target, state}},
                      target.a.b/  with arrays beside the file, described by their tensorstore

Two networks of t5x are known. `t5` has our names and shapes. `scalable_t5` has the layers of a
stack in one array, and a position bias for every layer:

    encoder/encoder/attention/query/kernel [D, L, N, K]   encoder/layers_0/attention/query/kernel
    encoder/encoder/attention/out/kernel   [N, L, K, D]                              [D, N * K]
    encoder/encoder/relpos_bias/rel_embedding [N, L, ..]  encoder/layers_0/relpos_bias/...

Shapes: D model, L layers, N heads, K head dim.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.checkpoints.backbone import Backbone, stored_form, write_vocabulary
from elm_jax.checkpoints.flax_msgpack import PLACEHOLDER, array_name, flatten_state, read_msgpack
from elm_jax.checkpoints.infer import GIN_FILES
from elm_jax.checkpoints.orbax import is_orbax, open_orbax, save_orbax
from elm_jax.checkpoints.stored import StoredArray, in_memory, open_zarr
from elm_jax.errors import ElmError, nearest
from elm_jax.experts.files import new_folder
from elm_jax.experts.tree import Tree, flatten, unflatten
from elm_jax.models import T5Config
from elm_jax.models.scan import STACKS, stack_layers

STATE_FOLDER = "state"
LEGACY_FILE = "checkpoint"
LAYOUTS = ("orbax", "legacy")
TARGET = "target/"
LEGACY_VERSION = 3
MAX_LAYERS = 10_000
LAYER_AXIS = 1
"""Where `scalable_t5` has the layers of a stacked array by default (t5x's `param_scan_axis`)."""
_STEP = re.compile(r"checkpoint_(\d+)")
_IN_HEADS = re.compile(r".*/(query|key|value)/kernel")
_FROM_HEADS = re.compile(r".*attention/out/kernel")


def is_t5x(folder: Path) -> bool:
    """Whether a folder looks like a T5X checkpoint or an Orbax pytree."""
    return (folder / STATE_FOLDER).is_dir() or (folder / LEGACY_FILE).is_file() or is_orbax(folder)


def steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a run's folder (T5X's MODEL_DIR), in order."""
    matches = (_STEP.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def open_t5x(folder: Path) -> dict[str, StoredArray]:
    """Opens the parameters of a T5X checkpoint, or of an Orbax pytree that holds parameters.

    Args:
      folder: `checkpoint_<step>` of T5X in either layout; or an Orbax pytree of the parameters
        themselves, alone or under 'target' or 'params'.

    Returns:
      path -> array, per layer, under t5x's names and of our shapes.

    Raises:
      FileNotFoundError: when a file is missing.
      ElmError: when the checkpoint is TensorFlow's, damaged, or holds no parameters.
    """
    if (folder / STATE_FOLDER).is_dir():
        arrays = open_orbax(folder / STATE_FOLDER, lambda path: path.startswith(TARGET))
    elif is_orbax(folder):
        arrays = open_orbax(folder, lambda path: not path.startswith("state/"))
    else:
        arrays = _open_legacy(folder)
    for prefix in (TARGET, "params/"):
        inside = {p.removeprefix(prefix): a for p, a in arrays.items() if p.startswith(prefix)}
        arrays = inside or arrays
    if not arrays:
        raise ElmError(f"{folder}: holds no parameters under 'target'")
    for path, array in arrays.items():
        if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            raise ElmError(f"{folder}: {path!r} has dtype {array.dtype}, expected a floating one")
    return _per_layer(arrays, folder)


def _open_legacy(folder: Path) -> dict[str, StoredArray]:
    file = folder / LEGACY_FILE
    if file.is_file():
        with file.open("rb") as opened:
            if opened.read(21) == b"model_checkpoint_path":
                raise ElmError(
                    f"{file}: a checkpoint of TensorFlow (Mesh); convert it with t5x's "
                    "scripts/convert_tf_checkpoint.py"
                )
    data: Any = read_msgpack(file)
    if "version" in data:
        data = data.get("optimizer")
    if not isinstance(data, dict) or not isinstance(data.get("target"), dict):
        raise ElmError(f"{file}: holds no parameters under 'target'")
    arrays: dict[str, StoredArray] = {}
    stores = {}
    for path, leaf in flatten_state(data["target"], file).items():
        if isinstance(leaf, np.ndarray):
            arrays[path] = in_memory(leaf, f"{file}: {path}")
            continue
        if isinstance(leaf, Mapping):  # only the folder's name is believed
            kvstore = leaf.get("kvstore")
            inner = kvstore.get("path") if isinstance(kvstore, Mapping) else None
            name = array_name(inner or leaf.get("path"), f"{file}: {path}")
        elif isinstance(leaf, str) and leaf.startswith(PLACEHOLDER):
            name = array_name(leaf.removeprefix(PLACEHOLDER), f"{file}: {path}")
        elif leaf is None:
            continue
        else:
            raise ElmError(f"{file}: {path!r} is {leaf!r:.50}, not an array")
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder / name}: missing, though {LEGACY_FILE} names it")
        stores[path] = {"driver": "file", "path": f"{folder.resolve() / name}/"}
    return arrays | open_zarr(stores, folder)


def _per_layer(arrays: Mapping[str, StoredArray], folder: Path) -> dict[str, StoredArray]:
    """Takes stacks of layers apart, and makes matrices of kernels with an axis for heads."""
    axis = _layer_axis(arrays)
    flat: dict[str, StoredArray] = {}
    for path, array in arrays.items():
        stack, _, rest = path.partition("/")
        if stack in STACKS and rest.startswith(f"{stack}/"):
            if array.ndim <= axis or not 0 < array.shape[axis] <= MAX_LAYERS:
                raise ElmError(f"{folder}: {path!r} has shape {array.shape}: no axis of layers")
            suffix = rest.removeprefix(f"{stack}/")
            for number in range(array.shape[axis]):
                flat[f"{stack}/layers_{number}/{suffix}"] = array.layer(number, axis)
        else:
            flat[path] = array
    return {path: _as_matrix(path, array) for path, array in flat.items()}


def _layer_axis(arrays: Mapping[str, StoredArray]) -> int:
    """Returns the axis of the layers: t5x's default, unless the norms show it to be the first."""
    embedding, norm = "token_embedder/embedding", "encoder/encoder/pre_mlp_layer_norm/scale"
    if embedding in arrays and norm in arrays and arrays[embedding].ndim == 2:
        dim, shape = arrays[embedding].shape[1], arrays[norm].shape
        if len(shape) == 2 and shape[1] == dim != shape[0]:
            return 0
    return LAYER_AXIS


def _as_matrix(path: str, array: StoredArray) -> StoredArray:
    if array.ndim == 3 and _IN_HEADS.fullmatch(path):
        return array.joined(1)
    if array.ndim == 3 and _FROM_HEADS.fullmatch(path):
        return array.joined(0)
    return array


def to_t5x(params: Tree, config: T5Config) -> Tree:
    """Returns the tree that t5x's network has for parameters: `t5`, or `scalable_t5` where every
    layer has a position bias of its own.

    Args:
      params: nested dict of NumPy arrays, per layer.
      config: their config.

    Raises:
      ElmError: for what t5x's T5Config cannot say.
    """
    gin_fields(config)
    if not config.relative_attention_per_layer:
        return params
    heads, dim = config.num_heads, config.head_dim
    flat = flatten(stack_layers(params, config, axis=LAYER_AXIS))
    for path, array in flat.items():
        if path.split("/")[1] not in STACKS:
            continue
        if _IN_HEADS.fullmatch(path):
            flat[path] = array.reshape(*array.shape[:2], heads, dim)
        elif _FROM_HEADS.fullmatch(path):  # [N * K, L, D]
            split = array.reshape(heads, dim, *array.shape[1:])
            flat[path] = np.ascontiguousarray(split.swapaxes(1, 2))
    return unflatten(flat)


def gin_fields(config: T5Config) -> dict[str, Any]:
    """Returns the fields of t5x's T5Config.

    Raises:
      ElmError: naming a field of ours that t5x cannot express.
    """
    fixed = T5Config(1, 1, 1, 1, 1, 1, 1)
    for name in (
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "layer_norm_epsilon",
    ):
        if getattr(config, name) != getattr(fixed, name):
            raise ElmError(
                f"T5X has no {name} = {getattr(config, name)!r}, only {getattr(fixed, name)!r}"
            )
    names = {"gelu_tanh": "gelu", "relu": "relu", "silu": "silu", "linear": "linear"}
    for activation in config.mlp_activations:
        if activation not in names:
            raise ElmError(
                f"T5X has no activation {activation!r}; it has {', '.join(names)} (its 'gelu' is "
                "'gelu_tanh')"
            )
    kept = (
        "vocab_size",
        "emb_dim",
        "num_heads",
        "head_dim",
        "mlp_dim",
        "num_encoder_layers",
        "num_decoder_layers",
        "logits_via_embedding",
        "dtype",
    )
    fields = {name: getattr(config, name) for name in kept}
    return fields | {"mlp_activations": tuple(names[a] for a in config.mlp_activations)}


def save_t5x(
    backbone: Backbone,
    folder: str | os.PathLike[str],
    *,
    step: int = 0,
    layout: str = "orbax",
) -> Path:
    """Writes `<folder>/checkpoint_<step>`, whole or not at all, which t5x restores.

    t5x's network for it is `t5`, or `scalable_t5` where every layer has a position bias of its own;
    a `config.gin` in the checkpoint says which, and its sizes. There is no optimizer state: t5x
    starts a run from it with `fallback_to_scratch=True`.

    Args:
      backbone: what to write; arrays keep their dtype.
      folder: a run's folder (T5X's MODEL_DIR), made where it is missing.
      step: the number in the checkpoint's name, from which t5x goes on counting.
      layout: 'orbax', which t5x writes now, or 'legacy', which it wrote before.

    Returns:
      The checkpoint's folder.

    Raises:
      FileExistsError: when the checkpoint exists.
      ElmError: for another layout, arrays that do not fit the config, or a config that t5x cannot
        express.
    """
    if layout not in LAYOUTS:
        raise ElmError(f"unknown layout {layout!r}{nearest(layout, LAYOUTS)}; one of {LAYOUTS}")
    if step < 0:
        raise ElmError(f"step must be 0 or more, got {step}")
    config, arrays = stored_form(backbone)
    target = to_t5x(arrays, config)
    network = "scalable_t5" if config.relative_attention_per_layer else "t5"
    lines = [
        "from __gin__ import dynamic_registration",
        f"from t5x.examples.{network} import network",
        "",
        *(f"network.T5Config.{name} = {value!r}" for name, value in gin_fields(config).items()),
    ]
    path = Path(folder) / f"checkpoint_{step}"
    with new_folder(path) as temporary:
        state = {"step": np.int32(step), "param_states": {}}
        if layout == "orbax":
            save_orbax({"target": target, "state": state}, temporary / STATE_FOLDER)
        else:
            _write_legacy(target, state, temporary)
        (temporary / GIN_FILES[0]).write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_vocabulary(backbone, temporary)
    return path


def _write_legacy(target: Tree, state: Tree, folder: Path) -> None:
    import tensorstore
    from flax.serialization import msgpack_serialize

    specs: dict[str, Any] = {}
    for path, array in flatten(target).items():
        name = TARGET.replace("/", ".") + path.replace("/", ".")
        # t5x insists on this description; the compressor and chunks are its own, too.
        spec = {
            "driver": "zarr",
            "dtype": array.dtype.name,
            "kvstore": {"driver": "file", "path": f"{name}/"},
            "metadata": {
                "chunks": list(array.shape),
                "compressor": {"id": "gzip", "level": 1},
                "shape": list(array.shape),
            },
        }
        place = {"driver": "file", "path": f"{folder.resolve() / name}/"}
        # Without this a block of zeros would be left out, as if it were missing.
        whole = {**spec, "kvstore": place, "store_data_equal_to_fill_value": True}
        store = tensorstore.open(whole, create=True).result()
        store.write(array).result()
        specs[path] = spec
    data = {"version": LEGACY_VERSION, "optimizer": {"target": unflatten(specs), "state": state}}
    (folder / LEGACY_FILE).write_bytes(msgpack_serialize(data))
