"""What tests of training, evaluation and the command line share: a tiny backbone, small tasks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from elm_jax.checkpoints import save_backbone
from elm_jax.checkpoints.backbone import initialize
from elm_jax.data import mini
from elm_jax.data.vocabulary import train_vocabulary
from elm_jax.models import T5Config

CONFIG = T5Config(
    vocab_size=400, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24,
    num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.1,
)  # fmt: skip


def backbone(folder: Path, seed: int = 0, name: str = "tiny", **changes: Any) -> Path:
    """Saves a random backbone with a vocabulary of 300 pieces and 100 sentinels."""
    texts = [row["inputs"] for task in mini.TASKS for row in mini.examples(task.name, "test")[:40]]
    vocabulary = train_vocabulary(texts, folder.parent / "pieces", 300)
    made = initialize(CONFIG.replace(**changes), seed)
    return save_backbone(dataclasses.replace(made, name=name, vocabulary_path=vocabulary), folder)


def task(folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Writes a task folder."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def tasks(folder: Path, names: Sequence[str], train: int = 24, test: int = 12) -> list[str]:
    """Writes the first examples of some embedded tasks; returns their folders."""
    return [
        str(
            task(
                folder / name,
                {
                    "train": mini.examples(name, "train")[:train],
                    "test": mini.examples(name, "test")[:test],
                },
            )
        )
        for name in names
    ]


def batch(rng: np.random.Generator, config: T5Config, rows: int = 4, length: int = 6) -> dict:
    """Random tokens, inputs and targets of uneven lengths."""

    def tokens(width: int) -> np.ndarray:
        ids = rng.integers(2, config.vocab_size, (rows, width))
        lengths = rng.integers(2, width + 1, (rows, 1))
        return np.where(np.arange(width) < lengths, ids, 0).astype(np.int32)

    inputs, targets = tokens(length), tokens(length - 1)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }


class Stream:
    """Random batches, each a pure function of (seed, step)."""

    def __init__(self, seed: int, config: T5Config, rows: int = 4, length: int = 6) -> None:
        self.seed, self.config, self.rows, self.length = seed, config, rows, length

    def batch_at(self, step: int) -> dict:
        return batch(np.random.default_rng([self.seed, step]), self.config, self.rows, self.length)

    def state(self) -> dict:
        return {"seed": self.seed, "rows": self.rows, "length": self.length}


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps compiled programs for the runs that repeat them, child processes included."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    reset_cache()  # JAX decides once whether there is a cache, at its first compilation
    with pytest.MonkeyPatch.context() as patch:
        before = {name: getattr(jax.config, name) for name in options}
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield
        for name, value in before.items():
            jax.config.update(name, value)
    reset_cache()
