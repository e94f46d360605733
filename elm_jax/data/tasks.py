"""Tasks and mixtures for seqio, the public way to declare data and to feed t5x.

The native training loop reads tables at random instead (`elm_jax.data.batches`), so that a position
in its data is one integer. Both see the same ids: `seqio_table` equals `tokenize`.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elm_jax.data.examples import TaskData
from elm_jax.data.table import ExampleTable
from elm_jax.data.vocabulary import Vocabulary
from elm_jax.errors import ElmError, nearest

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf

RATES = ("proportional", "equal")

# What each registered name stands for, to tell a repetition from a clash.
_registered: dict[str, str] = {}


def seqio_name(name: str) -> str:
    """Returns the name of a task in seqio, which allows letters, digits and `_ . : #` in it.

    >>> seqio_name('glue-mrpc/want to know')
    'elm_jax:glue_mrpc:want_to_know'
    """
    return "elm_jax:" + re.sub(r"[^\w.:#]", "_", name.replace("/", ":"))


def register(task: TaskData, vocabulary: Vocabulary) -> seqio.Task:
    """Registers a task in seqio as `seqio_name(task.name)`; doing it again changes nothing.

    The files are read when a dataset is first asked for. The features `inputs` and `targets` (the
    first target) end with EOS; beside them go their texts `inputs_pretokenized` and
    `targets_pretokenized`, and `answer_choices` (empty for free text), `prompt` and `id`.

    Raises:
      ElmError: if the name stands for other data or another vocabulary already.
    """
    import seqio
    import tensorflow as tf

    name = seqio_name(task.name)
    path = os.path.realpath(task.path) if os.path.exists(task.path) else task.path
    source = (
        f"task {task.name!r} of {path} with vocabulary {vocabulary.fingerprint[:12]} and "
        f"{vocabulary.extra_ids} sentinels"
    )
    if claim(name, source, seqio.TaskRegistry):
        return seqio.TaskRegistry.get(name)
    feature = seqio.Feature(vocabulary.to_seqio(), add_eos=True, dtype=tf.int32)
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(functools.partial(_dataset, task), splits=task.splits),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={"inputs": feature, "targets": feature},
    )


def register_mixture(
    name: str,
    tasks: Sequence[TaskData],
    vocabulary: Vocabulary,
    *,
    rates: str = "proportional",
    maximum: int | None = None,
) -> seqio.Mixture:
    """Registers tasks and a mixture of them in seqio; doing it again changes nothing.

    Args:
      name: of the mixture; in seqio it is `seqio_name(name)`.
      tasks: at least one.
      vocabulary: encodes all of them.
      rates: 'proportional' to the number of training examples, or 'equal'.
      maximum: with 'proportional', examples of one task that count at most (the limit K of T5).

    Raises:
      ElmError: for no tasks, unknown rates, a maximum below 1, or a name in use for something else.

    Source: Raffel et al., 2020, section 3.5.2, "examples-proportional mixing".
    """
    import seqio

    if not tasks:
        raise ElmError(f"mixture {name!r} has no tasks")
    if rates not in RATES:
        raise ElmError(f"rates are {rates!r}, one of {RATES} expected{nearest(rates, RATES)}")
    if maximum is not None and (maximum < 1 or rates == "equal"):
        raise ElmError(f"maximum is {maximum}, should be 1 or more, and goes with 'proportional'")
    members = [(register(task, vocabulary).name, _rate(task, rates, maximum)) for task in tasks]
    mixture = seqio_name(name)
    source = "mixture of " + ", ".join(f"{rate:g} {member}" for member, rate in members)
    if claim(mixture, source, seqio.MixtureRegistry):
        return seqio.MixtureRegistry.get(mixture)
    return seqio.MixtureRegistry.add(mixture, members)


def seqio_table(
    task_or_mixture: str | seqio.Task | seqio.Mixture,
    split: str,
    feature_lengths: Mapping[str, int],
    *,
    seed: int = 0,
) -> ExampleTable:
    """Runs one epoch of seqio's own pipeline, unshuffled, into a table.

    For a mixture, seqio ends the epoch where the first of its tasks runs out.

    Args:
      task_or_mixture: registered, for example `register(...)` or its name.
      split: 'train' for one.
      feature_lengths: most ids of 'inputs' and of 'targets', EOS included.
      seed: of the drawing in a mixture.

    Raises:
      ElmError: for an unknown split, or if a length is missing.
    """
    import seqio

    provider = (
        seqio.get_mixture_or_task(task_or_mixture)
        if isinstance(task_or_mixture, str)
        else task_or_mixture
    )
    if split not in provider.splits:
        hint = nearest(split, provider.splits)
        raise ElmError(f"{provider.name} has no split {split!r}, only {set(provider.splits)}{hint}")
    if set(feature_lengths) != {"inputs", "targets"}:
        raise ElmError(f"feature_lengths need 'inputs' and 'targets', got {set(feature_lengths)}")
    dataset = provider.get_dataset(
        sequence_length=feature_lengths, split=split, shuffle=False, seed=seed, num_epochs=1
    )
    examples = [(row["inputs"], row["targets"]) for row in dataset.as_numpy_iterator()]
    return ExampleTable.from_ids(*zip(*examples, strict=True))


def _dataset(
    task: TaskData, split: str, shuffle_files: bool = False, seed: int | None = None
) -> tf.data.Dataset:
    """The examples of a split for seqio, which shuffles them itself."""
    import tensorflow as tf

    del shuffle_files, seed

    def rows() -> Iterator[dict[str, Any]]:
        for example in task.split(split):
            yield {
                "inputs": example.inputs,
                "targets": example.targets[0],
                "answer_choices": list(example.answer_choices or ()),
                "prompt": example.prompt,
                "id": example.id,
            }

    text = tf.TensorSpec((), tf.string)
    texts = tf.TensorSpec((None,), tf.string)
    signature = {key: text for key in ("inputs", "targets", "prompt", "id")}
    return tf.data.Dataset.from_generator(
        rows, output_signature=signature | {"answer_choices": texts}
    )


def claim(name: str, source: str, registry: Any) -> bool:
    """Returns whether seqio has a name with this source, and notes the source where it has not.

    Args:
      name: in seqio.
      source: all that decides what the name stands for, in words.
      registry: seqio's of tasks or of mixtures, to which the caller then adds it.

    Raises:
      ElmError: the name stands for something else.
    """
    import seqio

    if name not in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        _registered[name] = source
        return False
    if _registered.get(name) != source or name not in registry.names():
        raise ElmError(
            f"seqio's {name!r} is {_registered.get(name, 'another provider')} already, "
            f"not {source}; give it another name"
        )
    return True


def _rate(task: TaskData, rates: str, maximum: int | None) -> float:
    examples = len(task.split("train")) if rates == "proportional" else 1
    return float(min(examples, examples if maximum is None else maximum))
