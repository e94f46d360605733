"""Bottleneck adapters to and from folders of AdapterHub's library `adapters`.

    <folder>/adapter_config.json    where the adapters sit and what they compute
    <folder>/adapter.safetensors    <place>.adapters.<name>.adapter_down.0.weight [E, D], .bias [E]
                                    <place>.adapters.<name>.adapter_up.weight [D, E], .bias [D]

    encoder.block.0.layer.0 (mh_adapter)        encoder/layers_0/self_attention_adapter
    encoder.block.0.layer.1 (output_adapter)    encoder/layers_0/mlp_adapter
    decoder.block.0.layer.2 (output_adapter)    decoder/layers_0/mlp_adapter

With x the residual stream, y a sublayer's output and A the bottleneck, their forms in a T5 are

    original_ln_before=False, original_ln_after=True    x + y + A(y)            Houlsby, DoubleSeqBn
    original_ln_before=True,  original_ln_after=True    x + y + A(x + y)        Pfeiffer, SeqBn
    is_parallel=True                                    x + y + A(x)            He, ParBn

and ours x + y + A(y), x + A(y) (both sequential) and x + y + A(norm(x)) (parallel). So the two
agree in one form, the first: ours with `placement='sequential'` and `inner_residual=True`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.errors import ElmError, nearest
from elm_jax.experts.apply import expert_shapes
from elm_jax.experts.files import (
    TensorFile,
    new_folder,
    open_tensors,
    read_json,
    refuse_pickle,
    shown,
    write_json,
)
from elm_jax.experts.tree import Tree, flatten, unflatten
from elm_jax.models import AdapterSpec, ExpertSpec, T5Config

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter.safetensors"
PICKLE_FILE = "pytorch_adapter.bin"
HEAD_FILES = ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
MODEL_TYPES = ("t5", "mt5")
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "silu": "silu",
    "linear": "linear",
}
_THEIR_ACTIVATIONS = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# What the names meant before the library wrote its version.
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
# Option -> (value when it is absent, accepted value, what another one would do).
_REQUIRED: dict[str, tuple[bool, bool, str]] = {
    "is_parallel": (
        False,
        False,
        "their parallel adapter reads the residual stream before the layer norm, ours after it",
    ),
    "original_ln_before": (
        False,
        False,
        "the adapter reads the sublayer's output with the residual stream added to it (as in SeqBn "
        "and Pfeiffer), ours the output alone (as in DoubleSeqBn and Houlsby)",
    ),
    "original_ln_after": (True, True, "the residual stream would be lost"),
    "ln_before": (False, False, "it trains a layer norm with a mean and a bias"),
    "ln_after": (False, False, "it trains a layer norm with a mean and a bias"),
    "use_gating": (False, False, "it trains a gate"),
    "phm_layer": (False, False, "Compacter's matrices are Kronecker products"),
    "cross_adapter": (False, False, "ours have no adapter after the cross-attention"),
    "inv_adapter": (False, False, "it trains an invertible adapter after the embedding"),
    "leave_out": (False, False, "ours sit in every layer"),
}
# Options that say how training started or went, or that need one of those above.
_IGNORED = {
    "mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "scaling",
    "residual_before_ln", "adapter_residual_before_ln", "init_weights", "init_weights_seed",
    "inv_adapter_reduction_factor", "dropout", "stochastic_depth", "phm_dim", "factorized_phm_W",
    "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init", "phm_init_range",
    "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias",
}  # fmt: skip
_PARTS = {
    "down_kernel": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up_kernel": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}


def save_adapters_expert(
    spec: ExpertSpec,
    params: Tree,
    path: str | os.PathLike[str],
    *,
    name: str = "expert",
    base_model: str | None = None,
) -> Path:
    """Writes an adapter expert as a folder for `model.load_adapter(folder, use_safetensors=True)`.

    Args:
      spec: the expert's; see the module's docstring for the one form that both sides have.
      params: its arrays; they keep their dtype and bits.
      path: folder to make; it must not exist, or be empty.
      name: what the adapter is called there; a '.' in it becomes '_'.
      base_model: what the library should call the backbone.

    Returns:
      The folder.

    Raises:
      ElmError: for another kind of expert or another form of adapter, with the reason.
      FileExistsError: if the folder holds something.
    """
    config, tensors = adapters_from_expert(spec, params, name=name, base_model=base_model)
    with new_folder(path) as folder:
        write_adapters(folder, config, tensors)
    return Path(path)


def write_adapters(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes both files of an adapter into a folder."""
    from safetensors.numpy import save_file

    save_file(dict(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, config)


def adapters_from_expert(
    spec: ExpertSpec, params: Tree, *, name: str = "expert", base_model: str | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Translates an adapter expert to the configuration and tensors of `adapters`.

    Returns:
      The dict of adapter_config.json, and name -> contiguous array; an expert without biases gets
      biases of zero, as the library knows no other.

    Raises:
      ElmError: for another kind of expert or another form of adapter, with the reason.
    """
    if not isinstance(spec, AdapterSpec):
        raise ElmError(f"'adapters' has no counterpart of an expert of kind {spec.kind!r} here")
    if spec.placement == "parallel":
        raise ElmError(
            "placement='parallel' has no counterpart in 'adapters': "
            f"{_REQUIRED['is_parallel'][2]}; only placement='sequential' has one"
        )
    if not spec.inner_residual:
        raise ElmError(
            "inner_residual=False has no counterpart in 'adapters', which always adds an adapter's "
            "input back"
        )
    if spec.train_layer_norms:
        raise ElmError(
            "train_layer_norms=True has no counterpart in 'adapters', which leaves the backbone's "
            "layer norms frozen"
        )
    name = name.replace(".", "_")  # PyTorch forbids it in a module's name
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in flatten(params).items():
        parent, _, part = path.rpartition("/")
        array = np.asarray(leaf)
        place = f"{_place(parent)}.adapters.{name}"
        if part not in _PARTS:
            raise ElmError(f"{path!r} is no array of an adapter; expected {', '.join(_PARTS)}")
        tensors[f"{place}.{_PARTS[part]}"] = np.ascontiguousarray(array.T)
        if not spec.use_bias:
            bias = _PARTS[part.replace("kernel", "bias")]
            tensors[f"{place}.{bias}"] = np.zeros(array.shape[1], array.dtype)
    down = next(array for tensor, array in tensors.items() if tensor.endswith("_down.0.weight"))
    bottleneck, dim = down.shape
    options: dict[str, Any] = {
        option: accepted for option, (_, accepted, _) in _REQUIRED.items()
    } | {
        "inv_adapter": None,
        "leave_out": [],
        "mh_adapter": "self_attention" in spec.sublayers,
        "output_adapter": "mlp" in spec.sublayers,
        "non_linearity": _ACTIVATIONS[spec.activation],
        "reduction_factor": _reduction_factor(dim, bottleneck),
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "scaling": 1.0,
        "dropout": 0.0,
        "init_weights": "bert",
    }
    config = {
        "model_type": "t5",
        "model_class": "T5ForConditionalGeneration",
        "model_name": base_model,
        "hidden_size": dim,
        "name": name,
        "config": options,
        "version": "adapters.1.0.0",
    }
    return config, tensors


def _reduction_factor(dim: int, bottleneck: int) -> float:
    """Returns a factor from which the library finds this bottleneck: int(dim // factor)."""
    factor = dim / bottleneck
    if int(dim // factor) != bottleneck:
        factor = dim / (bottleneck + 0.5)
    return factor


def load_adapters_expert(
    path: str | os.PathLike[str], config: T5Config
) -> tuple[AdapterSpec, Tree]:
    """Reads a bottleneck adapter of a T5 that the library `adapters` saved as safetensors.

    Args:
      path: folder with adapter_config.json and adapter.safetensors.
      config: of the backbone that it is for.

    Returns:
      The spec, and the arrays in float32. A constant scaling is multiplied into the up projection;
      biases that are zero everywhere are left out (`use_bias=False`).

    Raises:
      FileNotFoundError: when a file is missing.
      ElmError: for a form of adapter that ours do not have, with the reason; for tensors that do
        not fit, and damaged files; nothing is loaded in part.
    """
    folder = Path(path)
    where = folder / CONFIG_FILE
    data = read_json(where)
    try:
        name, spec, scaling = _read_config(data, config)
    except ElmError as error:
        raise ElmError(f"{where}: {error}") from error
    for head in HEAD_FILES:
        if (folder / head).exists():
            raise ElmError(
                f"{folder / head}: the folder also holds a prediction head, which may have been "
                "trained and would be lost; save it with save_adapter(..., with_head=False) if the "
                "head is the backbone's own"
            )
    refuse_pickle(
        folder,
        WEIGHTS_FILE,
        PICKLE_FILE,
        "save it again: model.save_adapter('NEW_FOLDER', NAME, use_safetensors=True)",
    )
    with open_tensors(folder / WEIGHTS_FILE) as tensors:
        return _read(name, spec, scaling, tensors, config)


def _read_config(data: Mapping[str, Any], config: T5Config) -> tuple[str, AdapterSpec, float]:
    """Returns the adapter's name, its spec (with biases) and the factor on its output."""
    name, options = data.get("name"), data.get("config")
    if not isinstance(name, str) or not name or "." in name:
        raise ElmError(f"'name' is {shown(name)}, expected the adapter's name")
    if data.get("model_type") not in MODEL_TYPES:
        raise ElmError(
            f"'model_type' is {shown(data.get('model_type'))}; accepted: {', '.join(MODEL_TYPES)}"
        )
    if not isinstance(options, Mapping):
        raise ElmError(f"'config' is {shown(options)}, expected the adapter's options")
    if data.get("hidden_size") not in (None, config.emb_dim):
        raise ElmError(
            f"'hidden_size' is {shown(data['hidden_size'])}, but the backbone's width is "
            f"{config.emb_dim}"
        )
    if options.get("architecture") is not None:
        kind = options["architecture"]
        raise ElmError(f"'architecture' is {shown(kind)}, which is no bottleneck adapter")
    for option, value in options.items():
        if value and option not in _IGNORED and option not in _REQUIRED:
            raise ElmError(
                f"{shown(option)} is {shown(value)}, an option that this elm_jax does not know"
            )
    for option, (default, accepted, reason) in _REQUIRED.items():
        value = options.get(option, default)
        if bool(value) is not accepted:
            raise ElmError(f"{option!r} is {shown(value)}, which cannot be imported: {reason}")
    if options.get("residual_before_ln", True) not in (True, False):
        raise ElmError(
            f"'residual_before_ln' is {shown(options['residual_before_ln'])}, which cannot be "
            "imported: it needs original_ln_before"
        )
    sublayers = {"self_attention": "mh_adapter", "mlp": "output_adapter"}
    chosen = tuple(ours for ours, theirs in sublayers.items() if options.get(theirs))
    if not chosen:
        raise ElmError("neither 'mh_adapter' nor 'output_adapter' is on: there is no adapter")
    scaling = options.get("scaling", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise ElmError(
            f"'scaling' is {shown(scaling)}, which cannot be imported: ours have no learned scale"
        )
    if not 1e-30 < abs(scaling) < 1e30:
        raise ElmError(f"'scaling' is {shown(scaling)}, which is out of range")
    spec = AdapterSpec(
        bottleneck=_bottleneck(options.get("reduction_factor"), config),
        placement="sequential",
        sublayers=chosen,
        activation=_activation(options.get("non_linearity"), "version" not in data),
        use_bias=True,
        inner_residual=True,
    )
    return name, spec, float(scaling)


def _activation(name: Any, old: bool) -> str:
    """Returns our name of an activation; `old` files gave other names to the two gelus."""
    found = name.lower() if isinstance(name, str) else name
    if old and isinstance(found, str):
        found = _OLD_ACTIVATIONS.get(found, found)
    if not isinstance(found, str) or found not in _THEIR_ACTIVATIONS:
        raise ElmError(
            f"'non_linearity' is {shown(name)}, which cannot be imported"
            f"{nearest(str(found)[:100], _THEIR_ACTIVATIONS)}; accepted: "
            f"{', '.join(_THEIR_ACTIVATIONS)}"
        )
    return _THEIR_ACTIVATIONS[found]


def _bottleneck(factor: Any, config: T5Config) -> int:
    """Returns E of a reduction factor, which may be one for each layer."""
    layers = config.num_encoder_layers + config.num_decoder_layers
    factors = [factor]
    if isinstance(factor, Mapping):
        factors = [factor.get(str(i), factor.get("default")) for i in range(layers)]
    for one in factors:
        number = isinstance(one, (int, float)) and not isinstance(one, bool)
        if not number or not 1e-3 < one < 1e9:
            raise ElmError(f"'reduction_factor' is {shown(factor)}, expected a positive number")
    widths = {max(1, int(config.emb_dim // one)) for one in factors}
    if len(widths) > 1:
        raise ElmError(
            f"'reduction_factor' is {shown(factor)}, which cannot be imported: ours have one "
            "bottleneck in all layers"
        )
    return widths.pop()


def _place(path: str) -> str:
    """Returns the Hugging Face sublayer after which an adapter of ours sits.

    >>> _place('decoder/layers_3/mlp_adapter')
    'decoder.block.3.layer.2'
    """
    match = re.fullmatch(r"(encoder|decoder)/layers_(\d+)/(self_attention|mlp)_adapter", path)
    if match is None:
        raise ElmError(f"no sublayer of a Hugging Face T5 is the counterpart of {path!r}")
    stack, layer, sublayer = match.groups()
    number = 0 if sublayer == "self_attention" else 1 if stack == "encoder" else 2
    return f"{stack}.block.{layer}.layer.{number}"


def _read(
    name: str, spec: AdapterSpec, scaling: float, tensors: TensorFile, config: T5Config
) -> tuple[AdapterSpec, Tree]:
    """Reads all arrays of a spec, and nothing else, from a file."""
    shapes = flatten(expert_shapes(config.replace(scan_layers=False), spec))
    # T5AdapterModel keeps the T5 in an attribute; T5ForConditionalGeneration is one.
    inner = any(tensor.startswith("transformer.") for tensor in tensors.shapes)
    names = {}
    for path in shapes:
        parent, _, part = path.rpartition("/")
        place = f"{'transformer.' * inner}{_place(parent)}"
        names[path] = f"{place}.adapters.{name}.{_PARTS[part]}"
    _check_names(tensors, list(names.values()))
    arrays = {
        path: np.ascontiguousarray(tensors.read(tensor, shapes[path].shape[::-1]).T)
        for path, tensor in names.items()
    }
    for path, array in arrays.items():
        if "/up_" in path and scaling != 1:
            arrays[path] = array * np.float32(scaling)
            if not np.isfinite(arrays[path]).all():
                raise ElmError(f"{tensors.path}: {names[path]} times {scaling} is out of range")
    biases = [path for path in arrays if path.endswith("_bias")]
    if not any(arrays[path].any() for path in biases):
        spec = dataclasses.replace(spec, use_bias=False)
        arrays = {path: array for path, array in arrays.items() if path not in biases}
    return spec, unflatten(arrays)


def _check_names(tensors: TensorFile, wanted: Sequence[str]) -> None:
    """Checks that a file has the wanted tensors and no other."""
    for name in tensors.shapes:
        if name not in wanted:
            raise ElmError(
                f"{tensors.path}: tensor {shown(name)} has no place in the adapter that "
                f"{CONFIG_FILE} describes{nearest(name[:200], wanted)}"
            )
    for name in wanted:
        if name not in tensors.shapes:
            raise ElmError(f"{tensors.path}: tensor {name!r} is missing")
