"""T5, mT5, umT5 and ByT5 between Hugging Face folders and ours, without PyTorch.

    shared.weight                                      token_embedder/embedding
    encoder.block.0.layer.0.SelfAttention
      .q.weight                                        encoder/layers_0/attention/query/kernel *
      .relative_attention_bias.weight                  encoder/relpos_bias/rel_embedding *
    encoder.block.0.layer.1.DenseReluDense.wi_0.weight encoder/layers_0/mlp/wi_0/kernel *
    decoder.block.0.layer.1
      .layer_norm.weight              decoder/layers_0/pre_cross_attention_layer_norm/scale
      .EncDecAttention.o.weight       decoder/layers_0/encoder_decoder_attention/out/kernel *
    decoder.final_layer_norm.weight                    decoder/decoder_norm/scale
    lm_head.weight                                     decoder/logits_dense/kernel *

Those with * are transposed. In a umT5 every layer has a position bias of its own, ours under
encoder/layers_0/relpos_bias.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.checkpoints.backbone import (
    CONFIG_FILE,
    Backbone,
    Source,
    check_params,
    check_sizes,
    find_vocabulary,
    param_shapes,
    stored_form,
    unflatten_names,
    write_vocabulary,
)
from elm_jax.checkpoints.loading import load_params
from elm_jax.checkpoints.stored import StoredArray, open_safetensors, same_values
from elm_jax.errors import ElmError, nearest
from elm_jax.experts.files import new_folder, read_json, write_json
from elm_jax.experts.tree import Tree, flatten, unflatten
from elm_jax.models import T5Config

MODEL_TYPES = ("t5", "mt5", "umt5")
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_EMBEDDING, _LM_HEAD = "shared.weight", "lm_head.weight"
# Older checkpoints repeat the embedding, and hold a bias that no model has read since 2020.
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "emb_dim",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
    "num_layers": "num_encoder_layers",
}
_OPTIONS = (
    "dropout_rate",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
)
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "linear": "linear",
}


def from_huggingface(folder: str | os.PathLike[str]) -> Backbone:
    """Reads a T5 (1.0, 1.1, LM-adapt, T0, FLAN, ByT5), mT5 or umT5 from a Hugging Face folder.

    Args:
      folder: with config.json and model.safetensors, or the shards of
        model.safetensors.index.json; spiece.model where there is one.

    Returns:
      The backbone, named after the folder; numpy arrays in their stored dtype.

    Raises:
      FileNotFoundError: when a file is missing.
      ElmError: for another model type, weights as a pickle only, or tensors that do not fit.
    """
    source = open_huggingface(Path(folder))
    params, found = load_params(source.config, source.arrays, on_host=True)
    return Backbone(source.name, source.config, params, found, source.vocabulary_path)


def open_huggingface(folder: Path) -> Source:
    """Opens a Hugging Face folder, and checks names and shapes; see `from_huggingface`."""
    where = folder / CONFIG_FILE
    data = read_json(where)
    config = config_from_hf(data, where)
    tensors = _open_tensors(folder)
    check_sizes(config, tensors, where)
    if not config.logits_via_embedding and data.get("tie_word_embeddings", True):
        # Tied without T5 1.0's scaling (transformers 5 writes such files, mT5's among them): the
        # output layer is a copy of the embedding.
        for name in (_EMBEDDING, *_EMBEDDING_COPIES):
            if _LM_HEAD not in tensors and name in tensors:
                tensors[_LM_HEAD] = tensors[name]
    try:
        params = params_from_hf(tensors, config)
        arrays: dict[str, StoredArray] = flatten(params)
        check_params(config, unflatten_names(arrays, folder), folder)
    except ElmError as error:
        message = str(error)
        raise ElmError(message if str(folder) in message else f"{folder}: {message}") from error
    name = folder.resolve().name
    return Source(folder, "huggingface", name, config, arrays, find_vocabulary(folder))


def save_huggingface(backbone: Backbone, folder: str | os.PathLike[str]) -> Path:
    """Writes a folder that `T5ForConditionalGeneration.from_pretrained` loads.

    Where every layer has a position bias it is `UMT5ForConditionalGeneration`. Of an untied one
    transformers 5 scales the logits by D ** -0.5, as it does with those of Google's; transformers 4
    and ours do not.

    Args:
      backbone: what to write, arrays in their dtype; mT5 is written as the T5 1.1 that it is.
      folder: a folder that is not there yet, or is empty.

    Returns:
      The folder.

    Raises:
      FileExistsError: when `folder` exists.
      ElmError: when the config has no Hugging Face counterpart.
    """
    from safetensors.numpy import save_file

    description = config_to_hf(backbone.config)
    config, stored = stored_form(backbone)
    tensors = params_to_hf(stored, config)
    with new_folder(folder) as temporary:
        # transformers insists on this mark, which says how the tensors are laid out.
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        write_vocabulary(backbone, temporary)
        write_json(temporary / CONFIG_FILE, description)
    return Path(folder)


to_huggingface = save_huggingface
"""The former name."""


def config_from_hf(data: Mapping[str, Any], where: object = CONFIG_FILE) -> T5Config:
    """Translates a Hugging Face config.

    Args:
      data: config.json of a T5, mT5 or umT5.
      where: its path, for messages.

    Raises:
      ElmError: for another model type, a missing size, an unknown activation, or ids of padding and
        start that are not 0.

    >>> sizes = dict(vocab_size=9, d_model=4, num_heads=2, d_kv=2, d_ff=8, num_layers=1)
    >>> config_from_hf({'model_type': 't5', **sizes}).mlp_activations
    ('relu',)
    """
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ElmError(
            f"{where}: model_type {kind!r} is not supported{nearest(str(kind), MODEL_TYPES)}; "
            f"accepted: {', '.join(MODEL_TYPES)}"
        )
    for key in _SIZES:
        if key not in data:
            raise ElmError(f"{where}: key {key!r} is missing")
    for key in ("pad_token_id", "decoder_start_token_id"):
        if data.get(key) not in (None, 0):
            raise ElmError(f"{where}: {key} is {data[key]!r:.50}; only 0, T5's, is supported")
    for key in ("tie_word_embeddings", "scale_decoder_outputs", "is_gated_act"):
        if data.get(key) not in (None, True, False):
            raise ElmError(f"{where}: {key} is {data[key]!r:.50}, expected true or false")
    projection = data.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    *gate, name = str(projection).split("-")
    name = "gelu_new" if projection == "gated-gelu" else name
    name = str(data.get("dense_act_fn") or name)
    gated = data.get("is_gated_act")
    gated = bool(gate) if gated is None else bool(gated)
    if gate not in ([], ["gated"]) or name not in _ACTIVATIONS:
        raise ElmError(
            f"{where}: feed_forward_proj {projection!r} with activation {name!r} is not supported"
            f"{nearest(str(name), _ACTIVATIONS)}; accepted: {', '.join(_ACTIVATIONS)}, alone or "
            "after 'gated-'"
        )
    activation = _ACTIVATIONS[name]
    # T5 1.0 scales the decoder's output where it ties; transformers 5 calls every model tied and
    # says in a key of its own whether to scale. mT5 never scales; umT5 does where it ties.
    scaled = data.get("scale_decoder_outputs", data.get("tie_word_embeddings") is not False)
    decoder_layers = data.get("num_decoder_layers")
    try:
        return T5Config(
            **{ours: data[theirs] for theirs, ours in _SIZES.items()},
            **{key: data[key] for key in _OPTIONS if key in data},
            num_decoder_layers=data["num_layers"] if decoder_layers is None else decoder_layers,
            mlp_activations=(activation, "linear") if gated else (activation,),
            logits_via_embedding=kind != "mt5" and bool(scaled),
            relative_attention_per_layer=kind == "umt5",
        )
    except (ElmError, TypeError) as error:
        raise ElmError(f"{where}: {error}") from error


def config_to_hf(config: T5Config) -> dict[str, Any]:
    """Translates a config to the config.json of a T5, or umT5, of Hugging Face.

    Raises:
      ElmError: for activations that transformers cannot express.
    """
    names = {"gelu_tanh": "gelu_new", "relu": "relu", "gelu": "gelu", "silu": "silu"}
    activation, *gate = config.mlp_activations
    if activation not in names or gate not in ([], ["linear"]):
        raise ElmError(
            f"mlp_activations {config.mlp_activations} have no Hugging Face counterpart; "
            f"accepted: one of {', '.join(names)}, alone or followed by 'linear'"
        )
    if not gate:
        projection = names[activation]
    elif activation == "gelu_tanh":
        projection = "gated-gelu"
    else:  # transformers reads 'gated-gelu' as the approximation
        projection = "gated-" + ("gelu_python" if activation == "gelu" else names[activation])
    kind = "umt5" if config.relative_attention_per_layer else "t5"
    return {
        "model_type": kind,
        "architectures": [f"{kind.upper()}ForConditionalGeneration"],
        "is_encoder_decoder": True,
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        **{key: getattr(config, key) for key in _OPTIONS},
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": projection,
        "tie_word_embeddings": config.logits_via_embedding,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def params_from_hf(
    tensors: Mapping[str, np.ndarray] | Mapping[str, StoredArray], config: T5Config
) -> Tree:
    """Renames and transposes Hugging Face tensors to t5x's tree.

    Args:
      tensors: name -> array (in memory or in a file), of a `T5ForConditionalGeneration`.
      config: the model's config.

    Returns:
      Nested dict of arrays in their dtype; transposed ones are views.

    Raises:
      ElmError: naming a tensor that is missing, unknown, of another shape, or in conflict with
        the tying of embeddings.
    """
    left: dict[str, Any] = dict(tensors)
    left.pop(_UNUSED, None)
    copies = _EMBEDDING_COPIES + ((_LM_HEAD,) if config.logits_via_embedding else ())
    for copy in copies:
        if copy in left:
            tensor = left.pop(copy)
            if not same_values(left.setdefault(_EMBEDDING, tensor), tensor):
                raise ElmError(
                    f"tensor {copy} differs from {_EMBEDDING}, but the config ties them "
                    "(tie_word_embeddings)"
                )
    expected = flatten(param_shapes(config))
    arrays = {}
    for path, name in _names(config):
        if name not in left:
            raise ElmError(f"tensor {name} (parameter {path}) is missing{nearest(name, left)}")
        array = left.pop(name)
        shape = expected[path].shape[:: -1 if _transposed(path) else 1]
        if array.shape != shape:
            raise ElmError(f"tensor {name} has shape {array.shape}, expected {shape}")
        arrays[path] = array.T if _transposed(path) else array
    if left:
        names = sorted(left)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ElmError(f"no parameter of the config takes tensor {', '.join(names[:3])}{more}")
    return unflatten(arrays)


def params_to_hf(params: Tree, config: T5Config) -> dict[str, np.ndarray]:
    """Renames and transposes t5x's tree to Hugging Face tensors.

    Args:
      params: nested dict of arrays.
      config: the model's config.

    Returns:
      name -> contiguous array in its dtype; `lm_head.weight` only where it is not tied.

    Raises:
      ElmError: when arrays do not fit the config.
    """
    check_params(config, params, "params")
    flat = flatten(params)
    tensors = {}
    for path, name in _names(config):
        array = np.asarray(flat[path])
        tensors[name] = np.ascontiguousarray(array.T if _transposed(path) else array)
    return tensors


def _transposed(path: str) -> bool:
    return path.endswith(("/kernel", "/rel_embedding"))


def _names(config: T5Config) -> Iterator[tuple[str, str]]:
    """Yields each parameter path with its Hugging Face name."""
    yield "token_embedder/embedding", _EMBEDDING
    inputs = len(config.mlp_activations)
    dense = ["wi"] if inputs == 1 else [f"wi_{i}" for i in range(inputs)]
    stacks = {
        "encoder": (config.num_encoder_layers, {"attention": "SelfAttention"}),
        "decoder": (
            config.num_decoder_layers,
            {"self_attention": "SelfAttention", "encoder_decoder_attention": "EncDecAttention"},
        ),
    }
    for stack, (layers, attentions) in stacks.items():
        yield f"{stack}/{stack}_norm/scale", f"{stack}.final_layer_norm.weight"
        for i in range(layers):
            ours, theirs = f"{stack}/layers_{i}", f"{stack}.block.{i}.layer"
            if config.relative_attention_per_layer or not i:
                owner = ours if config.relative_attention_per_layer else stack
                bias = f"{theirs}.0.SelfAttention.relative_attention_bias.weight"
                yield f"{owner}/relpos_bias/rel_embedding", bias
            for j, (attention, their_attention) in enumerate(attentions.items()):
                norm = "cross_attention" if j else attention
                yield f"{ours}/pre_{norm}_layer_norm/scale", f"{theirs}.{j}.layer_norm.weight"
                for projection in ("query", "key", "value", "out"):
                    short = "o" if projection == "out" else projection[0]
                    yield (
                        f"{ours}/{attention}/{projection}/kernel",
                        f"{theirs}.{j}.{their_attention}.{short}.weight",
                    )
            j = len(attentions)
            yield f"{ours}/pre_mlp_layer_norm/scale", f"{theirs}.{j}.layer_norm.weight"
            for name in (*dense, "wo"):
                yield f"{ours}/mlp/{name}/kernel", f"{theirs}.{j}.DenseReluDense.{name}.weight"
    if not config.logits_via_embedding:
        yield "decoder/logits_dense/kernel", _LM_HEAD


def _open_tensors(folder: Path) -> dict[str, StoredArray]:
    """Opens model.safetensors or its shards."""
    if (folder / WEIGHTS_FILE).is_file():
        return open_safetensors(folder / WEIGHTS_FILE)
    index = folder / INDEX_FILE
    if not index.is_file():
        pickles = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
        if pickles:
            raise ElmError(
                f"{folder}: {pickles[0]} is a pickle, which can run code when read, and there is "
                f"no {WEIGHTS_FILE}; convert it with transformers: T5ForConditionalGeneration"
                f".from_pretrained({str(folder)!r}).save_pretrained('NEW_FOLDER')"
            )
        raise FileNotFoundError(f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict):
        raise ElmError(f"{index}: key 'weight_map' is missing")
    tensors: dict[str, StoredArray] = {}
    for shard in dict.fromkeys(map(str, shard_of.values())):
        plain = shard == os.path.basename(shard) and shard.isprintable() and len(shard) < 200
        if not plain or not shard.endswith(".safetensors"):
            raise ElmError(
                f"{index}: shard {shard!r:.100} must be a file of the same folder, .safetensors"
            )
        opened = open_safetensors(folder / shard)
        for name in opened:
            if shard_of.get(name) != shard:
                raise ElmError(
                    f"{folder / shard}: holds tensor {name!r:.100}, which {INDEX_FILE} does not "
                    "place there"
                )
        tensors |= opened
    for name, shard in shard_of.items():
        if name not in tensors:
            raise ElmError(f"{folder / shard}: tensor {name} is missing, which {INDEX_FILE} names")
    return tensors
