"""A backbone whose frozen matrices are int8; see `models.quantize` for the arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Any

from elm_jax.checkpoints.backbone import Backbone
from elm_jax.errors import ElmError
from elm_jax.experts.tree import flatten, unflatten
from elm_jax.models.quantize import check_quantization, is_quantized, quantize_kernel
from elm_jax.models.scan import from_storage, to_storage


def quantize_backbone(backbone: Backbone, quantization: str = "int8") -> Backbone:
    """Rounds the kernels of attention and feed-forward blocks to int8, to train and run experts on.

    The result is the same backbone, run in another way: it keeps name and fingerprint, so that
    experts of the float backbone run on it and its experts run on the float one, and
    `config.quantization` says what it is. What was trained or scored on it records that in its
    settings. Products turn one kernel at a time to the dtype of the computation. On a CPU, XLA
    makes and keeps these copies ahead of time where layers are unrolled, which is faster but saves
    no memory; with `scan_layers` it keeps one layer's. It is made anew after each load and is never
    saved; `full` experts, which change the kernels themselves, need the float backbone.

        quantized = quantize_backbone(load_backbone(path, on_host=True))

    Args:
      backbone: numpy or jax arrays, on one device or sharded; they stay what and where they are.
      quantization: 'int8'.

    Returns:
      The backbone with an int8 kernel and a float32 kernel_scale in place of each such kernel.

    Raises:
      ElmError: for an unknown quantisation, a backbone that is quantised already, or weights that
        are not finite.

    >>> from elm_jax.checkpoints import load_backbone
    >>> quantized = quantize_backbone(load_backbone('elm-tiny', on_host=True))
    >>> kernel = quantized.params['encoder']['layers_0']['mlp']['wo']
    >>> kernel['kernel'].dtype, kernel['kernel_scale'].dtype
    (dtype('int8'), dtype('float32'))
    """
    check_quantization(quantization)
    if backbone.config.quantization is not None:
        raise ElmError(
            f"backbone {backbone.name!r} is quantised to {backbone.config.quantization} already"
        )
    arrays: dict[str, Any] = {}
    for path, array in flatten(to_storage(backbone.params, backbone.config)).items():
        if not is_quantized(path):
            arrays[path] = array
            continue
        try:
            arrays[path], arrays[f"{path}_scale"] = quantize_kernel(array)
        except ElmError as error:
            raise ElmError(f"backbone {backbone.name!r}, {path!r}: {error}") from None
    config = backbone.config.replace(quantization=quantization)
    params = from_storage(unflatten(arrays), config)
    return dataclasses.replace(backbone, config=config, params=params)
