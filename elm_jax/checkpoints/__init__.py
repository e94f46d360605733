"""Backbones in and out, and the fingerprint that names one."""

from elm_jax.checkpoints.backbone import (
    Backbone,
    Source,
    initialize,
    load_backbone,
    open_backbone,
    save_backbone,
)
from elm_jax.checkpoints.fingerprint import fingerprint
from elm_jax.checkpoints.folding import fold_expert
from elm_jax.checkpoints.huggingface import from_huggingface, save_huggingface, to_huggingface
from elm_jax.checkpoints.quantize import quantize_backbone
from elm_jax.checkpoints.t5x import save_t5x

__all__ = [
    "Backbone",
    "Source",
    "fingerprint",
    "fold_expert",
    "from_huggingface",
    "initialize",
    "load_backbone",
    "open_backbone",
    "quantize_backbone",
    "save_backbone",
    "save_huggingface",
    "save_t5x",
    "to_huggingface",
]
