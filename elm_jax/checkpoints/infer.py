"""The config of a checkpoint that has none: from names, shapes, a gin file, and what a user adds.

Shapes say nearly all: layers, widths, heads (from the position bias), gates, tied embeddings. They
do not say the activation. One input projection is taken for T5 1.0's ('relu',), two for T5 1.1's
('gelu_tanh', 'linear'), unless a gin file beside the checkpoint or the user says otherwise.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elm_jax.checkpoints.stored import StoredArray
from elm_jax.errors import ElmError, nearest
from elm_jax.models import T5Config
from elm_jax.models.sizes import get_config

GIN_FILES = ("config.gin", "operative_config.gin")
MAX_GIN_BYTES = 2**22
_PUBLISHED = {1: ("relu",), 2: ("gelu_tanh", "linear")}
# Flax's names; its gelu is the approximation.
_ACTIVATIONS = {"gelu": "gelu_tanh", "swish": "silu"}
_GIN_FIELDS = (
    "vocab_size",
    "emb_dim",
    "num_heads",
    "head_dim",
    "mlp_dim",
    "num_encoder_layers",
    "num_decoder_layers",
    "mlp_activations",
    "logits_via_embedding",
    "dropout_rate",
)
ConfigLike = T5Config | Mapping[str, Any] | str | Path | None
"""A whole config, some of its fields, the name of a published size, or a gin file."""


def infer_config(
    arrays: Mapping[str, StoredArray], where: Path, given: ConfigLike = None
) -> T5Config:
    """Returns the config of a T5 with these arrays.

    Args:
      arrays: path -> array per layer, under t5x's names.
      where: the checkpoint, for messages; a gin file is looked for in it and beside it.
      given: a whole config, or what takes precedence over what is found.

    Raises:
      FileNotFoundError: when `given` is a path without a file.
      ElmError: when arrays are missing from which a size is read, when the activation cannot be
        known, or for an unknown field in `given`.
    """
    if isinstance(given, T5Config):
        return given
    if isinstance(given, str) and not given.endswith(".gin"):
        return get_config(given)
    fields = _from_shapes(arrays, where)
    if given is None or isinstance(given, Mapping):
        beside = [folder / name for folder in (where, where.parent) for name in GIN_FILES]
        found = next((path for path in beside if path.is_file()), None)
        said = read_gin(found) if found else {}
    else:
        said = read_gin(Path(given))
    known = {name: value for name, value in said.items() if name in _GIN_FIELDS}
    extra = dict(given) if isinstance(given, Mapping) else {}
    fields = {**fields, **known, **extra}
    if "mlp_activations" not in fields:
        raise ElmError(
            f"{where}: a feed-forward block with this many input projections is not a published "
            "T5's; name its activations, such as config={'mlp_activations': ('silu', 'linear')}"
        )
    try:
        return T5Config.from_json(fields)
    except (ElmError, TypeError) as error:
        raise ElmError(f"{where}: {error}") from error


def _from_shapes(arrays: Mapping[str, StoredArray], where: Path) -> dict[str, Any]:
    def shape(path: str, ndim: int = 2) -> tuple[int, ...]:
        if path not in arrays:
            raise ElmError(f"{where}: parameter {path!r} is missing{nearest(path, arrays)}")
        if arrays[path].ndim != ndim:
            raise ElmError(
                f"{where}: {path!r} has shape {arrays[path].shape}, expected {ndim} axes"
            )
        return arrays[path].shape

    def layers(stack: str) -> int:
        pattern = re.compile(rf"{stack}/layers_(\d{{1,6}})/")
        return len({match[1] for path in arrays if (match := pattern.match(path))})

    vocab_size, emb_dim = shape("token_embedder/embedding")
    per_layer = "encoder/layers_0/relpos_bias/rel_embedding" in arrays
    heads, buckets = shape(f"encoder/{'layers_0/' if per_layer else ''}relpos_bias/rel_embedding")
    joined = shape("encoder/layers_0/attention/query/kernel")[1]
    if not heads or joined % heads:
        raise ElmError(
            f"{where}: attention is {joined} wide, which the {heads} heads of its position bias do "
            "not divide"
        )
    inputs = [p for p in arrays if re.fullmatch(r"encoder/layers_0/mlp/wi(_\d+)?/kernel", p)]
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "emb_dim": emb_dim,
        "num_heads": heads,
        "head_dim": joined // heads,
        "mlp_dim": shape("encoder/layers_0/mlp/wo/kernel")[0],
        "num_encoder_layers": layers("encoder"),
        "num_decoder_layers": layers("decoder"),
        "logits_via_embedding": "decoder/logits_dense/kernel" not in arrays,
        "relative_attention_num_buckets": buckets,
        "relative_attention_per_layer": per_layer,
    }
    if len(inputs) in _PUBLISHED:
        fields["mlp_activations"] = _PUBLISHED[len(inputs)]
    return fields


def read_gin(path: Path) -> dict[str, Any]:
    """Returns the fields of a T5Config that a gin file binds, as literals; runs nothing.

    Args:
      path: such as t5x writes: `network.T5Config.emb_dim = 512`, or a block `network.T5Config:`.

    Returns:
      field -> value, activations under our names; a macro that is a literal is put in.

    Raises:
      FileNotFoundError: when it is missing.
      ElmError: when it is no text, or binds no field.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > MAX_GIN_BYTES:
        raise ElmError(f"{path}: too large for a gin file ({path.stat().st_size:,} bytes)")
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ElmError(f"{path}: not a gin file ({error})") from error
    text = re.sub(r"\\\n\s*", "", text)
    bound: dict[str, Any] = {}
    macros: dict[str, Any] = {}
    block = False
    for line in text.splitlines():
        stripped = line.split("#")[0].rstrip()
        if not stripped:
            continue
        if re.fullmatch(r"(?:[\w./]*[./])?T5Config:", stripped):
            block = True
            continue
        inside = block and line[0] in " \t"
        block = inside
        name, equals, value = stripped.partition("=")
        if not equals:
            continue
        name = name.strip()
        full = re.fullmatch(r"(?:[\w./]*[./])?T5Config\.(\w+)", name)
        if inside or full:
            bound[name if inside else full[1]] = _literal(value.strip(), macros)  # type: ignore[index]
        elif name.isidentifier():
            macros[name] = _literal(value.strip(), macros)
    found = {name: value for name, value in bound.items() if value is not _literal}
    if not found:
        raise ElmError(f"{path}: binds no field of a T5Config")
    activations = found.get("mlp_activations")
    if isinstance(activations, (list, tuple)):
        found["mlp_activations"] = tuple(_ACTIVATIONS.get(str(a), str(a)) for a in activations)
    return found


def _literal(text: str, macros: Mapping[str, Any]) -> Any:
    """Returns the value of a literal or a macro; this function itself for anything else."""
    if text.startswith("%"):
        return macros.get(text[1:], _literal)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return _literal
