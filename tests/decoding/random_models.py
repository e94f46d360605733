"""What tests of generation share: tiny random models whose outputs vary and often end early."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import pytest

from elm_jax.checkpoints import Backbone, to_huggingface
from elm_jax.experts.apply import backbone_shapes, expert_shapes
from elm_jax.models import ExpertSpec, T5Config

CONFIG = T5Config(
    vocab_size=6,
    emb_dim=16,
    num_heads=3,
    head_dim=6,
    mlp_dim=24,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
WIDER = CONFIG.replace(vocab_size=14)
"""A beam search of 4 beams needs 8 candidates."""


def inputs(config: T5Config = CONFIG, batch: int = 8, length: int = 9) -> np.ndarray:
    """Returns tokens int32 [B, T] of uneven lengths."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, config.vocab_size, (batch, length)).astype(np.int32)
    return np.where(np.arange(length) >= rng.integers(1, length + 1, (batch, 1)), 0, tokens)


def initial(
    spec: ExpertSpec | None = None, seed: int = 0, config: T5Config = CONFIG
) -> dict[str, Any]:
    """Returns random variables; with more than a few tokens the end is made likelier."""
    rng = np.random.default_rng(seed)
    shapes = {"params": backbone_shapes(config)}
    if spec is not None:
        shapes["expert"] = expert_shapes(config, spec)

    def draw(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, 0.3 if mean else 0.6, shape.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    if config.vocab_size > CONFIG.vocab_size:
        if config.logits_via_embedding:
            variables["params"]["token_embedder"]["embedding"][1] *= 4.0
        else:
            kernel = variables["params"]["decoder"]["logits_dense"]["kernel"]
            kernel *= 0.5
            kernel[:, 1] *= 3.0
    return variables


@functools.lru_cache
def torch_model(seed: int, config: T5Config) -> Any:
    """Returns the Hugging Face model with the weights of `initial`."""
    transformers = pytest.importorskip("transformers")
    with TemporaryDirectory() as folder:
        backbone = Backbone("random", config, initial(seed=seed, config=config)["params"], "")
        path = to_huggingface(backbone, Path(folder) / "model")
        return transformers.T5ForConditionalGeneration.from_pretrained(path).eval()


def torch_generate(seed: int, config: T5Config, tokens: np.ndarray, **options: Any) -> Any:
    """Returns what Hugging Face's `generate` says: sequences without the start, and scores."""
    torch = pytest.importorskip("torch")
    source = torch.tensor(tokens.astype(np.int64))
    with torch.inference_mode():
        out = torch_model(seed, config).generate(
            input_ids=source,
            attention_mask=(source > 0).long(),
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    return out


def padded(sequences: np.ndarray, length: int, eos_id: int = 1) -> np.ndarray:
    """Returns [n, 1 + <= length] without the start token, with 0 behind the end.

    Hugging Face fills the rest of a beam with the end-of-sequence token.
    """
    found = np.asarray(sequences)[:, 1:]
    found = np.pad(found, ((0, 0), (0, length - found.shape[1])))
    after = np.cumsum(found == eos_id, axis=1) - (found == eos_id) > 0
    return np.where(after, 0, found)


def ends(tokens: np.ndarray, eos_id: int = 1) -> np.ndarray:
    """Returns the length of each sequence [..., U], its end included."""
    tokens = np.asarray(tokens)
    ended = (tokens == eos_id).any(-1)
    return np.where(ended, (tokens == eos_id).argmax(-1) + 1, tokens.shape[-1])
