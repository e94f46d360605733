"""LoRA experts to and from folders of Hugging Face PEFT.

    <folder>/adapter_config.json         rank, alpha, which modules carry an update
    <folder>/adapter_model.safetensors   base_model.model.<module>.lora_A.weight [R, in]
                                         base_model.model.<module>.lora_B.weight [out, R]

    encoder.block.0.layer.0.SelfAttention.q      encoder/layers_0/attention/query
    decoder.block.0.layer.1.EncDecAttention.o    decoder/layers_0/encoder_decoder_attention/out
    decoder.block.0.layer.2.DenseReluDense.wi_0  decoder/layers_0/mlp/wi_0

PEFT may give every module a rank and an alpha of its own, and leave out any of them; a `LoraSpec`
has one rank, one alpha, and a grid of targets and blocks. The grid that covers a PEFT adapter holds
it without loss: a module or a rank that the adapter lacks is zero in both factors, which adds
nothing to the output and has a gradient of zero, so that training leaves it zero; another scale is
multiplied into lora_b.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
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
from elm_jax.models import ExpertSpec, LoraSpec, T5Config
from elm_jax.models.specs import BLOCKS, PROJECTIONS

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
# (stack, our sublayer) -> (number of their sublayer, its name, our block)
_SUBLAYERS = {
    ("encoder", "attention"): (0, "SelfAttention", "encoder"),
    ("encoder", "mlp"): (1, "DenseReluDense", "encoder"),
    ("decoder", "self_attention"): (0, "SelfAttention", "decoder"),
    ("decoder", "encoder_decoder_attention"): (1, "EncDecAttention", "cross"),
    ("decoder", "mlp"): (2, "DenseReluDense", "decoder"),
}
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
_MLP = ("wi", "wi_0", "wi_1", "wo")
# What PEFT could attach a LoRA to besides the projections of a T5.
_OTHER_MODULES = (
    "shared",
    "encoder.embed_tokens",
    "decoder.embed_tokens",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "lm_head",
)
# Options with a meaning of their own, which a `LoraSpec` does not have, by what they would do.
_REFUSED = {
    "use_dora": "DoRA rescales every column of the frozen matrix",
    "modules_to_save": "it trains whole modules besides the LoRA",
    "lora_bias": "the update has a bias",
    "fan_in_fan_out": "a T5 has no transposed matrices",
    "trainable_token_indices": "it trains rows of the embedding",
    "target_parameters": "it adapts parameters that are no projection",
    "layer_replication": "it repeats layers of the backbone",
    "use_qalora": "QALoRA pools the input of the update",
    "use_bdlora": "block-diagonal factors are stored in another form",
    "alora_invocation_tokens": "the update acts on a part of the sequence only",
    "arrow_config": "it routes between adapters",
    "velora_config": "the option is not known here",
    "kasa_config": "KaSA adds singular values between the factors",
    "monteclora_config": "the update is random",
    "megatron_config": "it is for Megatron's layers",
}
# Options that say how training started, went or is run, not what the adapter computes.
_IGNORED = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
    "init_lora_weights", "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "bias",
}  # fmt: skip
# Initial values that leave the frozen matrices as they are.
_INITS = ("gaussian", "eva", "orthogonal")
_MAX_RANK, _MAX_NAMES = 2**16, 10_000
# Bounds on patterns of strangers, so that none can take for ever.
_MAX_PATTERN, _MAX_QUANTIFIERS, _MAX_PATTERNS = 1000, 4, 8


def save_peft_expert(
    spec: ExpertSpec,
    params: Tree,
    path: str | os.PathLike[str],
    *,
    base_model: str | None = None,
) -> Path:
    """Writes a LoRA expert as a folder which `PeftModel.from_pretrained(model, folder)` loads.

    Args:
      spec: the expert's; only LoRA has a form there.
      params: its arrays; they keep their dtype and bits.
      path: folder to make; it must not exist, or be empty.
      base_model: what PEFT should call the backbone.

    Returns:
      The folder.

    Raises:
      ElmError: for another kind of expert, or one of a backbone that Hugging Face has no T5 for.
      FileExistsError: if the folder holds something.
    """
    config, tensors = peft_from_lora(spec, params, base_model=base_model)
    with new_folder(path) as folder:
        write_peft(folder, config, tensors)
    return Path(path)


def write_peft(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes both files of a PEFT adapter into a folder."""
    from safetensors.numpy import save_file

    save_file(dict(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, config)


def peft_from_lora(
    spec: ExpertSpec, params: Tree, *, base_model: str | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Translates a LoRA expert to PEFT's configuration and tensors.

    Args:
      spec: the expert's.
      params: nested dict with lora_a [in, R] and lora_b [R, out] per projection.
      base_model: what PEFT should call the backbone.

    Returns:
      The dict of adapter_config.json, and name -> contiguous array, lora_A [R, in] and
      lora_B [out, R].

    Raises:
      ElmError: naming what has no counterpart.

    >>> params = {'encoder': {'layers_0': {'mlp': {'wo': {
    ...     'lora_a': np.ones((8, 2)), 'lora_b': np.ones((2, 4))}}}}}
    >>> spec = LoraSpec(rank=2, targets=('wo',), blocks=('encoder',))
    >>> peft_from_lora(spec, params)[0]['target_modules']
    ['encoder.block.0.layer.1.DenseReluDense.wo']
    """
    if not isinstance(spec, LoraSpec):
        raise ElmError(f"PEFT's LoRA has no counterpart of an expert of kind {spec.kind!r}")
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, None] = {}
    for path, leaf in flatten(params).items():
        parent, _, name = path.rpartition("/")
        module = peft_module(parent).name
        if name not in ("lora_a", "lora_b"):
            raise ElmError(f"{path!r} is no array of a LoRA; expected lora_a or lora_b")
        modules[module] = None
        side = "lora_A" if name == "lora_a" else "lora_B"
        tensors[f"{_PREFIX}{module}.{side}.weight"] = np.ascontiguousarray(np.asarray(leaf).T)
    # All blocks: PEFT's short names say it, and fit another depth, too.
    short = dict.fromkeys(module.rpartition(".")[2] for module in modules)
    everywhere = set(spec.blocks) == set(BLOCKS)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": spec.dropout_rate,
        "target_modules": list(short if everywhere else modules),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return config, tensors


def load_peft_expert(path: str | os.PathLike[str], config: T5Config) -> tuple[LoraSpec, Tree]:
    """Reads a LoRA for T5 that PEFT saved.

    Args:
      path: folder with adapter_config.json and adapter_model.safetensors.
      config: of the backbone that it is for.

    Returns:
      The spec, and the arrays in float32; the grid of a spec is filled with zeros where the
      adapter has no update (see the module's docstring).

    Raises:
      FileNotFoundError: when a file is missing.
      ElmError: for an option, a module or a tensor that a `LoraSpec` cannot represent, for target
        modules that match nothing, and for damaged files; nothing is loaded in part.
    """
    folder = Path(path)
    where = folder / CONFIG_FILE
    data = read_json(where)
    modules = _modules(config)
    try:
        lora = _Lora.from_json(data)
        wanted = lora.resolve(modules)
    except ElmError as error:
        raise ElmError(f"{where}: {error}") from error
    refuse_pickle(
        folder,
        WEIGHTS_FILE,
        PICKLE_FILE,
        "load it in PEFT and save it again: save_pretrained('NEW_FOLDER')",
    )
    with open_tensors(folder / WEIGHTS_FILE) as tensors:
        _check_names(tensors, wanted, modules)
        return _read(lora, wanted, tensors, config)


@dataclasses.dataclass(frozen=True)
class PeftModule:
    """A projection of a T5 under both names.

    Attributes:
      path: ours, 'encoder/layers_0/attention/query'.
      name: theirs, 'encoder.block.0.layer.0.SelfAttention.q'.
      block: the block of a `LoraSpec` that it belongs to.
      target: the target of a `LoraSpec` that it belongs to.
    """

    path: str
    name: str
    block: str
    target: str


def peft_module(path: str) -> PeftModule:
    """Returns the Hugging Face module of a projection's path.

    Raises:
      ElmError: for a path that is no projection of a T5 there.

    >>> peft_module('decoder/layers_2/mlp/wi_0').name
    'decoder.block.2.layer.2.DenseReluDense.wi_0'
    """
    match = re.fullmatch(r"(encoder|decoder)/layers_(\d+)/(\w+)/(\w+)", path)
    if match is not None and (match[1], match[3]) in _SUBLAYERS:
        stack, layer, sublayer, projection = match.groups()
        number, name, block = _SUBLAYERS[stack, sublayer]
        theirs = _ATTENTION.get(projection) if sublayer != "mlp" else projection
        if theirs is not None and (sublayer != "mlp" or theirs in _MLP):
            module = f"{stack}.block.{layer}.layer.{number}.{name}.{theirs}"
            return PeftModule(path, module, block, theirs.split("_")[0])
    raise ElmError(f"no projection of a Hugging Face T5 is the counterpart of {path!r}")


def _modules(config: T5Config) -> list[PeftModule]:
    """Returns every projection of a backbone."""
    everything = expert_shapes(_per_layer(config), LoraSpec(rank=1, targets=PROJECTIONS))
    return [
        peft_module(path.removesuffix("/lora_a"))
        for path in flatten(everything)
        if path.endswith("/lora_a")
    ]


def _per_layer(config: T5Config) -> T5Config:
    return config.replace(scan_layers=False)  # the layout in which experts are stored


@dataclasses.dataclass(frozen=True)
class _Lora:
    """The options of adapter_config.json that a LoRA here can have."""

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    targets: str | tuple[str, ...]
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> _Lora:
        """Checks every option of adapter_config.json.

        Raises:
          ElmError: naming the one that cannot be represented, with the reason.
        """
        if data.get("peft_type") != "LORA":
            raise ElmError(
                f"peft_type is {shown(data.get('peft_type'))}; only 'LORA' can be imported"
            )
        for key, value in data.items():
            if value and key not in _IGNORED:
                reason = _REFUSED.get(key, "this elm_jax does not know the option")
                raise ElmError(
                    f"{shown(key)} is {shown(value)}, which cannot be imported: {reason}"
                )
        if data.get("bias", "none") != "none":
            raise ElmError(
                f"'bias' is {shown(data['bias'])}, which cannot be imported: it trains biases"
            )
        init = data.get("init_lora_weights", True)
        if not (init is None or isinstance(init, bool) or init in _INITS):
            raise ElmError(
                f"'init_lora_weights' is {shown(init)}, which may change the frozen matrices; save "
                "the adapter with path_initial_model_for_weight_conversion, which makes it a plain "
                "LoRA"
            )
        ranks, alphas = _mapping(data, "rank_pattern"), _mapping(data, "alpha_pattern")
        lora = cls(
            rank=_whole("'r'", data.get("r", 8)),
            alpha=_number("'lora_alpha'", data.get("lora_alpha", 8)),
            rslora=_flag("'use_rslora'", data.get("use_rslora", False)),
            dropout=_number("'lora_dropout'", data.get("lora_dropout", 0.0), zero=True),
            targets=_names("'target_modules'", data.get("target_modules")),
            exclude=_names("'exclude_modules'", data.get("exclude_modules")),
            layers=_layers(data.get("layers_to_transform")),
            layers_pattern=_several("'layers_pattern'", data.get("layers_pattern")),
            rank_pattern={k: _whole(f"rank_pattern {shown(k)}", v) for k, v in ranks.items()},
            alpha_pattern={k: _number(f"alpha_pattern {shown(k)}", v) for k, v in alphas.items()},
        )
        if isinstance(lora.targets, str) and (lora.layers or lora.layers_pattern):
            raise ElmError(
                "'layers_to_transform' and 'layers_pattern' need 'target_modules' as a list"
            )
        if lora.dropout >= 1:
            raise ElmError(f"'lora_dropout' is {shown(lora.dropout)}, expected a number below 1")
        lora._check_patterns()
        return lora

    def _check_patterns(self) -> None:
        """Refuses patterns that are no regular expression, or could take for ever."""
        patterns = [text for text in (self.targets, self.exclude) if isinstance(text, str)]
        patterns += [*self.layers_pattern, *self.rank_pattern, *self.alpha_pattern]
        for text in patterns:
            _check_pattern(text)
        if len(patterns) > _MAX_NAMES or sum(map(_quantifiers, patterns)) > _MAX_PATTERNS:
            raise ElmError("too many patterns; write module names instead")

    def resolve(self, modules: Sequence[PeftModule]) -> list[PeftModule]:
        """Returns the modules that PEFT would give a LoRA.

        Raises:
          ElmError: when there is none, or one that is no projection.
        """
        targets = self.targets
        said = shown(targets if isinstance(targets, str) else list(targets))
        if isinstance(targets, str) and targets.lower() == "all-linear":
            targets = tuple(module.name for module in modules)  # PEFT leaves out the output layer
        for name in _OTHER_MODULES:
            if self._carries(targets, name):
                raise ElmError(
                    f"'target_modules' {said} take in {name}, which cannot carry a "
                    f"LoRA here; the projections {', '.join(PROJECTIONS)} can"
                )
        wanted = [module for module in modules if self._carries(targets, module.name)]
        if not wanted:
            short = sorted({module.name.rpartition(".")[2] for module in modules})
            first = targets if isinstance(targets, str) else "".join(targets[:1])
            raise ElmError(
                f"'target_modules' {said} match no projection of the backbone"
                f"{nearest(first[:100], short)}; it has {', '.join(short)}"
            )
        return wanted

    def _carries(self, targets: str | tuple[str, ...], name: str) -> bool:
        """Whether PEFT gives this module a LoRA (peft/tuners/tuners_utils.py,
        check_target_module_exists)."""
        if isinstance(self.exclude, str):
            if re.fullmatch(self.exclude, name):
                return False
        elif _ends_with(name, self.exclude):
            return False
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        if name in targets:
            return True
        if not _ends_with(name, targets):
            return False
        if not self.layers:
            return True
        for pattern in self.layers_pattern or (r"[^.]*",):
            start = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
            match = re.match(rf"{start}{pattern}\.(?P<idx>\d+)\.", name)
            if match is not None:
                return int(match["idx"]) in self.layers
        return False

    def rank_of(self, module: str) -> int:
        """Returns a module's rank."""
        return _lookup(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Returns the factor on a module's update."""
        alpha, rank = _lookup(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _check_names(
    tensors: TensorFile, wanted: Sequence[PeftModule], modules: Sequence[PeftModule]
) -> None:
    """Checks that a file holds the tensors of the wanted modules and no other."""
    expected = {name: None for module in wanted for name in _tensor_names(module)}
    known = {name for module in modules for name in _tensor_names(module)}
    for name in tensors.shapes:
        if name in expected:
            continue
        if name in known:
            reason = "is of a module that 'target_modules' leave out"
        elif "lora_embedding" in name:
            reason = "is a LoRA on an embedding, which cannot be imported"
        elif "lora_magnitude" in name:
            reason = "belongs to DoRA, which cannot be imported"
        else:
            reason = f"is of no projection of the backbone{nearest(name[:200], known)}"
        raise ElmError(f"{tensors.path}: tensor {shown(name)} {reason}")
    for name in expected:
        if name not in tensors.shapes:
            raise ElmError(f"{tensors.path}: tensor {name!r} is missing, which target_modules name")


def _tensor_names(module: PeftModule) -> tuple[str, str]:
    return f"{_PREFIX}{module.name}.lora_A.weight", f"{_PREFIX}{module.name}.lora_B.weight"


def _read(
    lora: _Lora, wanted: Sequence[PeftModule], tensors: TensorFile, config: T5Config
) -> tuple[LoraSpec, Tree]:
    """Reads the wanted modules into the smallest grid of targets and blocks that covers them."""
    rank = max(lora.rank_of(module.name) for module in wanted)
    largest = max(config.emb_dim, config.mlp_dim, config.num_heads * config.head_dim)
    if rank > largest:  # zeros fill the grid: an absurd rank would ask for absurd memory
        raise ElmError(f"{tensors.path.parent}: rank {rank} is above the largest width, {largest}")
    scales = {module.name: lora.scale_of(module.name) for module in wanted}
    scale = collections.Counter(scales.values()).most_common(1)[0][0]
    plain = scale == lora.alpha / lora.rank and rank == lora.rank  # keeps alpha as it was written
    spec = LoraSpec(
        rank=rank,
        alpha=lora.alpha if plain else scale * rank,
        targets=tuple(t for t in PROJECTIONS if any(module.target == t for module in wanted)),
        blocks=tuple(b for b in BLOCKS if any(module.block == b for module in wanted)),
        dropout_rate=lora.dropout,
    )
    shapes = flatten(expert_shapes(_per_layer(config), spec))
    arrays = {path: np.zeros(shape.shape, np.float32) for path, shape in shapes.items()}
    for module in wanted:
        a, b = arrays[f"{module.path}/lora_a"], arrays[f"{module.path}/lora_b"]
        name_a, name_b = _tensor_names(module)
        own = lora.rank_of(module.name)
        a[:, :own] = tensors.read(name_a, (own, a.shape[0])).T
        b[:own] = tensors.read(name_b, (b.shape[1], own)).T
        factor = np.float32(scales[module.name] / spec.scale)
        if factor != 1:
            b *= factor
        in_range = 0 < factor < np.inf and 0 < np.float32(spec.scale) < np.inf
        if not (in_range and np.isfinite(b).all()):
            raise ElmError(f"{tensors.path.parent}: alpha of {module.name} is out of range")
    return spec, unflatten(arrays)


def _ends_with(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _lookup(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns what the first matching key says (peft/utils/other.py, get_pattern_key)."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _quantifiers(pattern: str) -> int:
    """Counts the repetitions of a pattern; -1 if one repeats a group."""
    count, i, after_group = 0, 0, False
    while i < len(pattern):
        char = pattern[i]
        if char in "*+?{":
            if after_group and char != "?":
                return -1
            count += 1
            if pattern[i + 1 : i + 2] in ("?", "+"):  # lazy or possessive
                i += 1
        elif char == "\\":
            i += 1
        elif char == "[":
            end = pattern.find("]", i + 2 + (pattern[i + 1 : i + 2] == "^"))
            i = len(pattern) if end < 0 else end
        elif char == "(" and pattern[i + 1 : i + 2] == "?":
            i += 1
        after_group = char == ")"
        i += 1
    return count


def _check_pattern(pattern: str) -> None:
    """Refuses what is no regular expression, and what could take exponential time."""
    count = _quantifiers(pattern)
    flags = re.search(r"\(\?[^:=!<P]", pattern)
    if len(pattern) > _MAX_PATTERN or flags or not 0 <= count <= _MAX_QUANTIFIERS:
        raise ElmError(
            f"pattern {shown(pattern)} is refused, as matching it could take for ever; name the "
            "modules in a list instead"
        )
    try:
        re.compile(rf"(?:^|.*?\.)({pattern})\.(?P<idx>\d+)\.")
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ElmError(f"pattern {shown(pattern)} is no regular expression ({error})") from error


def _whole(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_RANK:
        raise ElmError(f"{where} is {shown(value)}, expected an integer from 1 to {_MAX_RANK}")
    return value


def _number(where: str, value: Any, *, zero: bool = False) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
            if math.isfinite(number) and (number > 0 or (zero and number == 0)):
                return number
    raise ElmError(f"{where} is {shown(value)}, expected a positive number")


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ElmError(f"{where} is {shown(value)}, expected true or false")
    return value


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, Mapping):
        raise ElmError(f"{key!r} is {shown(value)}, expected a JSON object")
    return value


def _names(where: str, value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _several(where, value)


def _several(where: str, value: Any) -> tuple[str, ...]:
    """Reads a string, a list of strings or null."""
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ElmError(f"{where} is {shown(value)}, expected a list of strings")
    if len(value) > _MAX_NAMES:
        raise ElmError(f"{where} has {len(value):,} entries, expected at most {_MAX_NAMES:,}")
    return tuple(value)


def _layers(value: Any) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        raise ElmError(f"'layers_to_transform' is {shown(value)}, expected integers")
    return tuple(values)
