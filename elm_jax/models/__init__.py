"""T5 backbones and the places where an expert enters them."""

from elm_jax.models.config import T5Config
from elm_jax.models.specs import (
    PRESETS,
    AdapterSpec,
    ExpertSpec,
    FullSpec,
    LoraSpec,
    get_spec,
    spec_from_json,
    spec_to_json,
)
from elm_jax.models.t5 import T5

__all__ = [
    "PRESETS",
    "AdapterSpec",
    "ExpertSpec",
    "FullSpec",
    "LoraSpec",
    "T5",
    "T5Config",
    "get_spec",
    "spec_from_json",
    "spec_to_json",
]
