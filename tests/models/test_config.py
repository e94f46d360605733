"""The config: what it accepts, its JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from elm_jax.errors import ElmError
from elm_jax.models import T5Config

SIZES: dict[str, Any] = dict(
    vocab_size=9, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16, num_encoder_layers=1,
    num_decoder_layers=2,
)  # fmt: skip


def test_json_round_trip() -> None:
    config = T5Config(**SIZES, mlp_activations=("relu",), scan_layers=True, remat="full")
    assert T5Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_numbers_of_numpy_become_pythons() -> None:
    sizes = {name: np.int64(size) for name, size in SIZES.items()}
    config = T5Config(**sizes, dropout_rate=np.float32(0.25), logits_via_embedding=np.bool_(True))
    assert config == T5Config(**SIZES, dropout_rate=0.25, logits_via_embedding=True)
    data = config.to_json()
    assert json.loads(json.dumps(data)) == data
    assert {type(data[name]) for name in SIZES} == {int}


def test_a_config_of_before_has_the_defaults() -> None:
    config = T5Config.from_json(SIZES)
    assert (config.scan_layers, config.remat, config.attention) == (False, "none", "auto")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"emb_dim": 0}, "emb_dim must be a positive integer, got 0"),
        ({"emb_dim": True}, "emb_dim must be a positive integer, got True"),
        ({"emb_dim": 8.0}, "emb_dim must be a positive integer, got 8.0"),
        ({"attention_chunk": -1}, "attention_chunk must be a positive integer, got -1"),
        ({"scan_layers": 1}, "scan_layers must be True or False, got 1"),
        ({"remat": "minimum"}, "remat must be one of none, minimal, full.*did you mean 'minimal'"),
        ({"attention": "flash"}, "attention must be one of auto, plain, fused, memory_efficient"),
        ({"dtype": "bfloat"}, "dtype must be one of float32, bfloat16.*did you mean 'bfloat16'"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ElmError, match=message):
        T5Config(**SIZES | change)
