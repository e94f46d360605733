"""What an expert is made of: frozen specs that the modules build their `expert` arrays from."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from elm_jax.errors import ElmError, nearest
from elm_jax.models.config import ACTIVATIONS

SUBLAYERS = ("self_attention", "mlp")
PROJECTIONS = ("q", "k", "v", "o", "wi", "wo")
BLOCKS = ("encoder", "decoder", "cross")


def _check_names(where: str, names: tuple[str, ...], accepted: tuple[str, ...]) -> None:
    if not names:
        raise ElmError(f"{where} must name at least one of {', '.join(accepted)}")
    for name in names:
        if name not in accepted:
            raise ElmError(
                f"{where}: unknown name {name!r}{nearest(name, accepted)}; "
                f"accepted: {', '.join(accepted)}"
            )


def _check_positive(where: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ElmError(f"{where} must be a positive integer, got {value!r}")


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """A bottleneck adapter, FFN_e.

    `placement='parallel'` is equation 3 of Jang et al. (2023): FFN(x) + FFN_e(x), both on the
    (normalised) input of the feed-forward block. `placement='sequential'` puts the adapter on a
    sublayer's output, before its residual addition, as the published code does.

    Attributes:
      bottleneck: inner width, E.
      placement: 'parallel' or 'sequential'.
      sublayers: which sublayers carry one, among 'self_attention' and 'mlp'.
      activation: between the two projections.
      use_bias: whether both projections have a bias.
      inner_residual: whether the adapter adds its own input back (sequential only).
      init_stddev: standard deviation of the down projection; None is LeCun normal.
      up_init_stddev: standard deviation of the up projection; 0 makes the start the identity.
      train_layer_norms: whether the expert also carries a change of every layer norm's scale.
    """

    kind: ClassVar[str] = "adapter"
    bottleneck: int = 64
    placement: str = "parallel"
    sublayers: tuple[str, ...] = ("mlp",)
    activation: str = "relu"
    use_bias: bool = False
    inner_residual: bool = False
    init_stddev: float | None = None
    up_init_stddev: float = 0.0
    train_layer_norms: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sublayers", tuple(self.sublayers))
        _check_positive("adapter.bottleneck", self.bottleneck)
        _check_names("adapter.placement", (self.placement,), ("parallel", "sequential"))
        _check_names("adapter.sublayers", self.sublayers, SUBLAYERS)
        _check_names("adapter.activation", (self.activation,), ACTIVATIONS)
        if self.placement == "parallel" and self.inner_residual:
            raise ElmError("adapter.inner_residual needs placement='sequential'")
        if self.up_init_stddev < 0 or (self.init_stddev is not None and self.init_stddev <= 0):
            raise ElmError("adapter.init_stddev must be positive and up_init_stddev not negative")


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Low-rank updates of frozen projections (Hu et al. 2021): W x + (alpha / R) B A x.

    Attributes:
      rank: R.
      alpha: numerator of the update's scale.
      targets: projections that carry one, among q, k, v, o, wi, wo; `wi` is every input
        projection of the feed-forward block (both of a gated one).
      blocks: 'encoder' and 'decoder' (self-attention and feed-forward), 'cross' (attention from
        decoder to encoder).
      dropout_rate: dropout on the input of the update in training.
    """

    kind: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")
    blocks: tuple[str, ...] = BLOCKS
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        _check_positive("lora.rank", self.rank)
        _check_names("lora.targets", self.targets, PROJECTIONS)
        _check_names("lora.blocks", self.blocks, BLOCKS)
        if not self.alpha > 0:
            raise ElmError(f"lora.alpha must be positive, got {self.alpha!r}")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ElmError(f"lora.dropout_rate must be in [0, 1), got {self.dropout_rate!r}")
        if self.blocks == ("cross",) and not set(self.targets) & {"q", "k", "v", "o"}:
            raise ElmError("lora.targets name no projection that the block 'cross' has")

    @property
    def scale(self) -> float:
        """The factor on the update, alpha / R."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class FullSpec:
    """All weights, kept as the task vector tau = theta_d - theta_pre (Ilharco et al. 2022)."""

    kind: ClassVar[str] = "full"


ExpertSpec = AdapterSpec | LoraSpec | FullSpec

PRESETS: dict[str, ExpertSpec] = {
    "adapter": AdapterSpec(),
    # The published code of Jang et al. (2023); facts in original_code_notes A1.
    "elm_code": AdapterSpec(
        bottleneck=64,
        placement="sequential",
        sublayers=("self_attention", "mlp"),
        activation="gelu_tanh",
        use_bias=True,
        inner_residual=True,
        init_stddev=0.01,
        up_init_stddev=0.01,
        train_layer_norms=True,
    ),
    "lora": LoraSpec(),
    "full": FullSpec(),
}
_KINDS: dict[str, type] = {cls.kind: cls for cls in (AdapterSpec, LoraSpec, FullSpec)}


def get_spec(name: str, **overrides: Any) -> ExpertSpec:
    """Returns a preset, with some fields changed.

    Args:
      name: 'adapter', 'elm_code', 'lora' or 'full'.
      **overrides: fields of the preset's spec.

    Raises:
      ElmError: for an unknown preset or field, naming the nearest.

    >>> get_spec('lora', rank=4).scale
    4.0
    """
    if name not in PRESETS:
        raise ElmError(
            f"unknown expert kind {name!r}{nearest(name, PRESETS)}; accepted: {', '.join(PRESETS)}"
        )
    preset = PRESETS[name]
    fields = [field.name for field in dataclasses.fields(preset)]
    for key in overrides:
        if key not in fields:
            raise ElmError(
                f"expert {name!r} has no option {key!r}{nearest(key, fields)}; "
                f"accepted: {', '.join(fields) or 'none'}"
            )
    return dataclasses.replace(preset, **overrides)


def spec_to_json(spec: ExpertSpec) -> dict[str, Any]:
    """Returns a JSON dict with `kind` and the spec's fields."""
    fields = dataclasses.asdict(spec)
    return {"kind": spec.kind} | {
        k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()
    }


def spec_from_json(data: dict[str, Any]) -> ExpertSpec:
    """Reads `spec_to_json`'s dict back.

    Raises:
      ElmError: for an unknown kind or field.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ElmError(f"unknown expert kind {kind!r}{nearest(str(kind), _KINDS)}")
    accepted = [field.name for field in dataclasses.fields(_KINDS[kind])]
    for key in fields:
        if key not in accepted:
            raise ElmError(f"expert kind {kind!r} has no field {key!r}{nearest(key, accepted)}")
    return _KINDS[kind](**fields)
