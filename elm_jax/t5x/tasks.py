"""Task folders for t5x: registered in seqio from a gin file, with metrics and the vocabulary."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import seqio

from elm_jax.checkpoints.backbone import load_backbone
from elm_jax.data.examples import TaskData, by_prompt, find_tasks
from elm_jax.data.tasks import register, seqio_name
from elm_jax.data.vocabulary import Vocabulary
from elm_jax.errors import ElmError, nearest
from elm_jax.models import T5Config
from elm_jax.t5x.experts import is_t5x_checkpoint


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of predictions equal to their target, ends stripped.

    >>> exact_match(['yes', 'no'], ['yes ', 'maybe'])
    {'exact_match': 50.0}
    """
    hits = [t.strip() == p.strip() for t, p in zip(targets, predictions, strict=True)]
    return {"exact_match": 100.0 * sum(hits) / max(len(hits), 1)}


def mean_log_likelihood(targets: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """Returns the mean log-probability of the targets."""
    del targets
    return {"mean_log_likelihood": float(sum(scores)) / max(len(scores), 1)}


def register_folders(
    tasks: Sequence[str] | str,
    vocabulary: str,
    prompt: str | None = None,
    extra_ids: int = 100,
) -> str:
    """Registers task folders in seqio and returns the name of the task, or of their mixture.

    Args:
      tasks: patterns as of `find_tasks`.
      vocabulary: a SentencePiece model file, or a folder with a spiece.model.
      prompt: keeps the examples of one prompt, for a prompt expert.
      extra_ids: sentinels to add to the vocabulary; 0 for mT5's.

    Returns:
      A name for `MIXTURE_OR_TASK_NAME`. Mixtures draw in proportion to the numbers of examples.

    Raises:
      ElmError: for a prompt that no task has.
      FileNotFoundError: if a pattern matches nothing, or there is no vocabulary.
    """
    path = Path(vocabulary)
    vocab = Vocabulary(path / "spiece.model" if path.is_dir() else path, extra_ids)
    found = find_tasks([tasks] if isinstance(tasks, str) else tasks)
    if prompt is not None:
        found = _of_prompt(found, prompt)
    members = [(_with_metrics(task, vocab), _size(task)) for task in found]
    if len(members) == 1:
        return members[0][0]
    name = "elm_jax_mixture:" + ".".join(sorted(name.split(":", 1)[1] for name, _ in members))
    if name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(name, members)
    return name


def task_vocabulary(
    mixture_or_task_name: str,
    feature: str,
    config: T5Config,
    backbone: str | None = None,
    module: str | None = None,
) -> seqio.Vocabulary:
    """Returns the vocabulary of a registered task, after checking that the backbone can use it.

    t5x wants the model's and the task's vocabulary to be of one path; what counts is that the ids
    mean the same.

    Args:
      mixture_or_task_name: registered.
      feature: 'inputs' or 'targets'.
      config: the backbone's.
      backbone: its folder; where it has a spiece.model, the task's must be the same.
      module: imported first, as it registers the task.

    Raises:
      ElmError: for an unknown task, a vocabulary larger than the embedding, or another one than
        the backbone's.
    """
    if module:
        importlib.import_module(module)
    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if mixture_or_task_name not in known:
        raise ElmError(
            f"no seqio task or mixture {mixture_or_task_name!r} is registered"
            f"{nearest(mixture_or_task_name, known)}; import its module in a gin file"
        )
    features = seqio.get_mixture_or_task(mixture_or_task_name).output_features
    if feature not in features:
        raise ElmError(f"{mixture_or_task_name!r} has no feature {feature!r}, only {set(features)}")
    vocabulary = features[feature].vocabulary
    if vocabulary.vocab_size > config.vocab_size:
        raise ElmError(
            f"{mixture_or_task_name!r} has {vocabulary.vocab_size} ids in {feature!r}, but the "
            f"backbone has {config.vocab_size} embeddings"
        )
    pieces = _pieces_of(backbone)
    if pieces is not None and isinstance(vocabulary, seqio.SentencePieceVocabulary):
        ours = Vocabulary(pieces, vocabulary.extra_ids).to_seqio()
        same = ours.sp_model == vocabulary.sp_model
        if not same:
            raise ElmError(
                f"{mixture_or_task_name!r} was made with another SentencePiece model "
                f"({vocabulary.sentencepiece_model_file}) than the backbone's ({pieces})"
            )
    return vocabulary


def _pieces_of(backbone: str | None) -> str | None:
    """The SentencePiece model that lies in a backbone's folder."""
    if backbone is None or is_t5x_checkpoint(backbone):
        return None
    if os.path.isdir(backbone):
        inside = os.path.join(backbone, "spiece.model")
        return inside if os.path.isfile(inside) else None
    path = load_backbone(backbone).vocabulary_path  # an embedded one is small
    return None if path is None else os.fspath(path)


def _of_prompt(tasks: Sequence[TaskData], prompt: str) -> list[TaskData]:
    units = {name: unit for task in tasks for name, unit in by_prompt(task).items()}
    chosen = [unit for name, unit in units.items() if name.partition("/")[2] == prompt]
    if not chosen:
        prompts = sorted({name.partition("/")[2] for name in units})
        raise ElmError(
            f"no task has a prompt {prompt!r}{nearest(prompt, prompts)}; "
            f"there are {', '.join(map(repr, prompts))}"
        )
    return chosen


def _with_metrics(task: TaskData, vocabulary: Vocabulary) -> str:
    """Registers a task a second time, with metrics, as `<name>:t5x`."""
    plain: Any = register(task, vocabulary)
    name = f"{seqio_name(task.name)}:t5x"
    if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            name,
            source=plain.source,
            preprocessors=plain.preprocessors,
            output_features=plain.output_features,
            metric_fns=[exact_match, mean_log_likelihood],
        )
    return name


def _size(task: TaskData) -> float:
    return float(len(task.split("train" if "train" in task.splits else task.splits[0])))
