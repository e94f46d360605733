"""The published sizes of the T5 family.

    t5_1_0   Raffel et al. (2020): small, base, large, xl (3B), xxl (11B)
    t5_1_1   its gated successor, without tying; LM-adapt (Lester et al. 2021), T0 (Sanh et al.
             2022) and FLAN-T5 (Chung et al. 2022) are further trainings of it: small to xxl
    mt5      Xue et al. (2021): T5 1.1 with 250,112 tokens: small to xxl
    umt5     Chung et al. (2023): 256,384 tokens, a position bias in every layer: small to xxl
    byt5     Xue et al. (2022): bytes, and an encoder three times as deep: small to xxl

The gin files gin/models/<name>.gin say the same.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from elm_jax.errors import ElmError, nearest
from elm_jax.models.config import T5Config

# emb_dim, num_heads, head_dim, mlp_dim, encoder layers, decoder layers
_Shape = tuple[int, int, int, int, int, int]
_T5_1_1: dict[str, _Shape] = {
    "small": (512, 6, 64, 1024, 8, 8),
    "base": (768, 12, 64, 2048, 12, 12),
    "large": (1024, 16, 64, 2816, 24, 24),
    "xl": (2048, 32, 64, 5120, 24, 24),
    "xxl": (4096, 64, 64, 10240, 24, 24),
}
_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, _Shape]]] = {
    "t5_1_0": (
        {"vocab_size": 32128, "mlp_activations": ("relu",), "logits_via_embedding": True},
        {
            "small": (512, 8, 64, 2048, 6, 6),
            "base": (768, 12, 64, 3072, 12, 12),
            "large": (1024, 16, 64, 4096, 24, 24),
            "xl": (1024, 32, 128, 16384, 24, 24),
            "xxl": (1024, 128, 128, 65536, 24, 24),
        },
    ),
    "t5_1_1": ({"vocab_size": 32128}, _T5_1_1),
    "mt5": ({"vocab_size": 250112}, _T5_1_1),
    "umt5": (
        {"vocab_size": 256384, "relative_attention_per_layer": True},
        {size: shape for size, shape in _T5_1_1.items() if size != "large"},
    ),
    "byt5": (
        {"vocab_size": 384},
        {
            "small": (1472, 6, 64, 3584, 12, 4),
            "base": (1536, 12, 64, 3968, 18, 6),
            "large": (1536, 16, 64, 3840, 36, 12),
            "xl": (2560, 32, 64, 6720, 36, 12),
            "xxl": (4672, 64, 64, 12352, 36, 12),
        },
    ),
}
SIZES = tuple(f"{family}_{size}" for family, (_, sizes) in _FAMILIES.items() for size in sizes)
"""Names that `get_config` takes, besides those of `ALIASES`."""


def _aliases() -> dict[str, str]:
    names = {"t0_3b": "t5_1_1_xl"}
    names |= {name: "t5_1_1_xxl" for name in ("t0", "t0_11b", "t0p", "t0pp")}
    for size in _T5_1_1:
        short = {"xl": "3b", "xxl": "11b"}.get(size, size)
        names |= {f"t5_{short}": f"t5_1_0_{size}", f"t5_1_0_{short}": f"t5_1_0_{size}"}
        for family in ("lm_adapt", "t5_lm_adapt", "t5_1_1_lm_adapt", "t5_1_1_lm100k", "flan_t5"):
            names[f"{family}_{size}"] = f"t5_1_1_{size}"
        names[f"t5_v1_1_{size}"] = f"t5_1_1_{size}"
    return {alias: name for alias, name in names.items() if alias != name}


ALIASES = _aliases()
"""Other names of the same shapes: of the models that were trained in them."""


def get_config(name: str, **changes: Any) -> T5Config:
    """Returns the config of a published size, with some fields changed.

    Args:
      name: one of `SIZES` or `ALIASES`; capitals, '-' and a Hugging Face owner do not matter.
      **changes: fields of `T5Config`, such as `scan_layers=True`.

    Raises:
      ElmError: for an unknown name or field, with the nearest valid one.

    >>> get_config('t5_1_1_xl').emb_dim, get_config('google/flan-t5-small').num_heads
    (2048, 6)
    """
    key = re.sub(r"[-.]", "_", name.rpartition("/")[2].lower())
    key = ALIASES.get(key, key)
    if key not in SIZES:
        hint = nearest(key, (*SIZES, *ALIASES))
        raise ElmError(f"unknown size {name!r}{hint}; accepted: {', '.join(SIZES)}")
    known = [field.name for field in dataclasses.fields(T5Config)]
    for field in changes:
        if field not in known:
            raise ElmError(f"T5Config has no field {field!r}{nearest(field, known)}")
    family, _, size = key.rpartition("_")
    fields, sizes = _FAMILIES[family]
    dim, heads, head_dim, mlp, encoder, decoder = sizes[size]
    config = T5Config(
        emb_dim=dim,
        num_heads=heads,
        head_dim=head_dim,
        mlp_dim=mlp,
        num_encoder_layers=encoder,
        num_decoder_layers=decoder,
        **fields,
    )
    return config.replace(**changes)
