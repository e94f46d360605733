"""Backbones in and out, and the fingerprint that names one."""

from elm_jax.checkpoints.backbone import Backbone, initialize, load_backbone, save_backbone
from elm_jax.checkpoints.fingerprint import fingerprint
from elm_jax.checkpoints.huggingface import from_huggingface, to_huggingface

__all__ = [
    "Backbone",
    "fingerprint",
    "from_huggingface",
    "initialize",
    "load_backbone",
    "save_backbone",
    "to_huggingface",
]
