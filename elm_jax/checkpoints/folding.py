"""An expert folded into its backbone's weights, for tools that know no experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from elm_jax.checkpoints.backbone import Backbone
from elm_jax.checkpoints.fingerprint import fingerprint
from elm_jax.errors import ElmError
from elm_jax.experts.apply import check_expert
from elm_jax.experts.tree import Tree, flatten, unflatten
from elm_jax.models import AdapterSpec, ExpertSpec, LoraSpec
from elm_jax.models.scan import from_storage, to_storage


def fold_expert(backbone: Backbone, spec: ExpertSpec, expert: Tree, name: str) -> Backbone:
    """Returns the backbone that computes what backbone and expert compute together.

    A `full` expert (a merged one, too) is added to the weights, theta_pre + tau; a LoRA expert's
    update (alpha / R) A B is added to each kernel that it is on. Sums are taken in float32 and
    rounded once to the dtype of the weights.

    Args:
      backbone: what the expert was trained on.
      spec: what the expert is made of.
      expert: its arrays, per layer as they are stored.
      name: the expert's id; the result is called '<backbone>+<name>'.

    Raises:
      ElmError: for an adapter, which no weights of the backbone can hold, or arrays that do not
        fit.
    """
    if isinstance(spec, AdapterSpec):
        raise ElmError(
            f"expert {name!r} is a bottleneck adapter: it adds layers with an activation of their "
            "own, which the weights of a T5 cannot hold; only 'full' and 'lora' experts can be "
            "folded in"
        )
    config = backbone.config.replace(scan_layers=False)
    if config.quantization is not None:
        raise ElmError(f"backbone {backbone.name!r} is quantised; fold into the original")
    check_expert(f"expert {name!r}", config, spec, expert)
    params = flatten(to_storage(backbone.params, backbone.config))
    arrays = {path: np.asarray(array, np.float32) for path, array in flatten(expert).items()}
    if isinstance(spec, LoraSpec):
        changes = {
            path.removesuffix("lora_a") + "kernel": a
            @ (arrays[path.removesuffix("a") + "b"] * np.float32(spec.scale))
            for path, a in arrays.items()
            if path.endswith("/lora_a")
        }
    else:
        changes = arrays
    folded: dict[str, Any] = dict(params)
    for path, change in changes.items():
        kernel = np.asarray(params[path])
        folded[path] = (kernel.astype(np.float32) + change).astype(kernel.dtype)
    tree = unflatten(folded)
    return dataclasses.replace(
        backbone,
        name=f"{backbone.name}+{name}",
        params=from_storage(tree, backbone.config),
        fingerprint=fingerprint(config, tree),
    )
