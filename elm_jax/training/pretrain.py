"""Pre-training a small backbone from text: span corruption, then prefix language modelling.

A backbone in training is a `full` expert over random weights, so the loop is the experts' own.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from elm_jax.checkpoints.backbone import (
    Backbone,
    check_params,
    initialize,
    load_backbone,
    save_backbone,
)
from elm_jax.checkpoints.fingerprint import fingerprint
from elm_jax.data.corpus import DenoisingStream, load_corpus, read_paragraphs, text_files
from elm_jax.data.vocabulary import Vocabulary, train_vocabulary
from elm_jax.errors import ElmError
from elm_jax.experts.tree import Tree, count_parameters
from elm_jax.models import T5, FullSpec, T5Config
from elm_jax.models.scan import from_storage
from elm_jax.training.loop import Member, Progress, RunConfig, train_stack
from elm_jax.training.optimizers import OptimizerSpec
from elm_jax.training.step import LossSpec, token_loss

OBJECTIVES = ("span_corruption", "prefix_lm")
"""The two phases in order: T5's own objective, then LM-adapted T5's (Lester et al. 2021)."""


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """How a backbone is pre-trained.

    Attributes:
      steps: optimizer steps of each objective in `OBJECTIVES`.
      batch_size: rows B.
      inputs_length: encoder tokens T.
      targets_length: decoder tokens U of each objective.
      optimizer: of each objective (its schedule starts anew).
      loss: the training loss.
      heldout_fraction: share of each text that is kept for the loss reported at the end.
      seed: of weights, data and dropout.
      checkpoint_every: steps between checkpoints.
    """

    steps: tuple[int, int] = (16_000, 4_000)
    batch_size: int = 256
    inputs_length: int = 128
    targets_length: tuple[int, int] = (40, 64)
    optimizer: OptimizerSpec = dataclasses.field(
        default_factory=lambda: OptimizerSpec(
            learning_rate=3e-3, schedule="linear", warmup_steps=1000
        )
    )
    loss: LossSpec = dataclasses.field(default_factory=lambda: LossSpec(z_loss=1e-4))
    heldout_fraction: float = 0.01
    seed: int = 0
    checkpoint_every: int = 2000

    def __post_init__(self) -> None:
        if len(self.steps) != 2 or min(self.steps) < 0 or not sum(self.steps):
            raise ElmError(f"steps must be two numbers, one per objective, got {self.steps}")
        if len(self.targets_length) != 2:
            raise ElmError(f"targets_length must be two numbers, got {self.targets_length}")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The outcome: the backbone, where it was saved, and the numbers for its model card."""

    backbone: Backbone
    path: Path
    facts: Mapping[str, Any]


def pretrain(
    corpus: str | Path,
    config: T5Config,
    output: str | Path,
    *,
    name: str,
    vocabulary: str | Path | None = None,
    run: PretrainConfig | None = None,
    model_dir: str | Path,
    initial: str | Path | None = None,
    storage_dtype: str = "float32",
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Pretrained:
    """Pre-trains a backbone on a folder of texts and saves it; a killed run resumes.

    Args:
      corpus: folder of *.txt or *.txt.gz.
      config: sizes; a vocabulary that is trained here has `vocab_size` ids, sentinels included.
      output: folder for the backbone; it must not exist.
      name: name of the backbone.
      vocabulary: SentencePiece model; trained on the corpus where None.
      run: steps, batch, lengths, optimizer.
      model_dir: folder for checkpoints and metrics.
      initial: a backbone of the same sizes to go on from, with its vocabulary; random weights
        where None.
      storage_dtype: dtype of the stored arrays, 'float32' or 'bfloat16'.
      mesh: where to run.
      progress: called after each record, as in `train_stack`.

    Raises:
      FileExistsError: if `output` exists.
      ElmError: if vocabulary, config or initial backbone disagree, or the texts are too short.
    """
    run = run or PretrainConfig()
    output, model_dir = Path(output), Path(model_dir)
    if output.exists():
        raise FileExistsError(f"{output} exists; a backbone is never overwritten")
    model_dir.mkdir(parents=True, exist_ok=True)
    begin = initialize(config, run.seed) if initial is None else _initial(initial, config)
    given = vocabulary if vocabulary is not None else begin.vocabulary_path
    vocab = _vocabulary(Path(corpus), given, config.vocab_size, model_dir)
    text = load_corpus(corpus, vocab, heldout_fraction=run.heldout_fraction, cache=model_dir)
    started = time.monotonic()
    params = begin.params
    losses: dict[str, Any] = {}

    def stream(objective: str, ids: np.ndarray, seed: int) -> DenoisingStream:
        return DenoisingStream(
            ids,
            objective,
            run.batch_size,
            run.inputs_length,
            run.targets_length[OBJECTIVES.index(objective)],
            vocab.vocab_size,
            vocab.sentinels,
            seed,
        )

    for objective, steps in zip(OBJECTIVES, run.steps, strict=True):
        if not steps:
            continue
        warmup = min(run.optimizer.warmup_steps, steps // 4)
        trained = train_stack(
            config,
            params,
            FullSpec(),
            [Member(objective, stream(objective, text.train, run.seed))],
            RunConfig(
                train_steps=steps,
                optimizer=dataclasses.replace(run.optimizer, warmup_steps=warmup),
                loss=run.loss,
                seed=run.seed,
                log_every=min(100, run.checkpoint_every),
                checkpoint_every=run.checkpoint_every,
            ),
            folder=model_dir / objective,
            mesh=mesh,
            progress=progress,
        )[0]
        tau = from_storage(trained.params, config)
        params = jax.tree.map(lambda p, change: np.asarray(p) + change, params, tau)
        losses[objective] = {
            "train": trained.history[-1]["loss"],
            "heldout": {
                o: _heldout_loss(config, params, stream(o, text.heldout, 0)) for o in OBJECTIVES
            },
        }
    params = jax.tree.map(lambda p: np.asarray(jnp.asarray(p, storage_dtype)), params)
    config = config.replace(dtype="float32")
    backbone = Backbone(name, config, params, fingerprint(config, params), Path(vocab.path))
    save_backbone(backbone, output)
    facts: dict[str, Any] = {
        "name": name,
        "initial": begin.fingerprint if initial is not None else None,
        "parameters": count_parameters(params),
        "steps": dict(zip(OBJECTIVES, run.steps, strict=True)),
        "batch_size": run.batch_size,
        "inputs_length": run.inputs_length,
        "targets_length": dict(zip(OBJECTIVES, run.targets_length, strict=True)),
        "optimizer": dataclasses.asdict(run.optimizer),
        "corpus_tokens": len(text.train),
        "corpus_fingerprint": text.fingerprint,
        "loss_nats_per_token": losses,
        "hours": round((time.monotonic() - started) / 3600, 3),
        "device": jax.devices()[0].device_kind,
        "fingerprint": backbone.fingerprint,
    }
    return Pretrained(backbone, output, facts)


def _initial(path: str | Path, config: T5Config) -> Backbone:
    """Loads the backbone to go on from; its arrays must be those of `config`."""
    loaded = load_backbone(path)
    check_params(config, loaded.params, path)
    return loaded


def _vocabulary(corpus: Path, given: str | Path | None, size: int, model_dir: Path) -> Vocabulary:
    if given is not None:
        vocab = Vocabulary(Path(given))
    else:
        path = model_dir / "spiece.model"
        if not path.exists():
            extra_ids = 100
            texts = [p for f in text_files(corpus) for p in read_paragraphs(f)]
            trained = train_vocabulary(texts, model_dir / "training_spiece", size - extra_ids)
            shutil.move(trained, path)
        vocab = Vocabulary(path)
    if vocab.vocab_size != size:
        raise ElmError(
            f"{vocab.path} has {vocab.vocab_size} ids with its sentinels, "
            f"the config's vocab_size is {size}"
        )
    return vocab


def _heldout_loss(config: T5Config, params: Tree, stream: DenoisingStream, steps: int = 4) -> float:
    """Returns the mean loss per target token over some batches, without dropout."""
    model = T5(config)

    @jax.jit
    def sums(params: Tree, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits: Any = model.apply(
            {"params": params}, batch["encoder_input_tokens"], batch["decoder_input_tokens"]
        )
        weights = batch["decoder_loss_weights"].astype(jnp.float32)
        loss = token_loss(logits, batch["decoder_target_tokens"], LossSpec())
        return jnp.sum(loss * weights), jnp.sum(weights)

    parts = [sums(params, stream.batch_at(step)) for step in range(steps)]
    return float(sum(loss for loss, _ in parts) / sum(count for _, count in parts))
