"""Tasks and mixtures in seqio: the same ids as ours, and the standard route through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elm_jax.data import mini, tasks
from elm_jax.data.batches import BatchStream
from elm_jax.data.examples import Example, TaskData, find_tasks
from elm_jax.data.table import ExampleTable, tokenize
from elm_jax.data.vocabulary import Vocabulary, train_vocabulary
from elm_jax.errors import ElmError

seqio = pytest.importorskip("seqio")

LENGTHS = {"inputs": 64, "targets": 8}


@pytest.fixture(autouse=True)
def clean_registries() -> Iterator[None]:
    yield
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        for name in [name for name in registry.names() if name.startswith("elm_jax:")]:
            registry.remove(name)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    texts = [row["inputs"] for task in mini.TASKS for row in mini.examples(task.name, "test")]
    prefix = tmp_path_factory.mktemp("vocabulary") / "small"
    return Vocabulary(train_vocabulary(texts, prefix, 400))


@pytest.fixture(scope="module")
def sentiment() -> TaskData:
    return find_tasks(["mini:sentiment_novel"])[0]


def assert_same(one: ExampleTable, other: ExampleTable) -> None:
    for name in ("inputs", "inputs_offsets", "targets", "targets_offsets"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_seqios_pipeline_gives_our_ids(sentiment: TaskData, vocabulary: Vocabulary) -> None:
    task = tasks.register(sentiment, vocabulary)
    assert task.name == "elm_jax:sentiment_novel" and set(task.splits) == {"train", "test"}
    for split, lengths in (("train", LENGTHS), ("test", {"inputs": 12, "targets": 2})):
        ours = tokenize(
            sentiment.split(split),
            vocabulary,
            inputs_length=lengths["inputs"],
            targets_length=lengths["targets"],
        )
        provider = task if split == "train" else task.name
        assert_same(tasks.seqio_table(provider, split, lengths), ours)


def test_shared_p3_gives_the_same_ids(shared_data: Path) -> None:
    t5 = Vocabulary(shared_data / "vocab/t5_32k/spiece.model")
    found = find_tasks(
        [
            f"{shared_data}/p3/prompted/{name}"
            for name in ("wiqa", "paws_x-en", "common_gen", "xsum")
        ]
    )
    for data in found:
        ours = tokenize(data.split("test"), t5, inputs_length=256, targets_length=32)
        task = tasks.register(data, t5)
        assert_same(tasks.seqio_table(task, "test", {"inputs": 256, "targets": 32}), ours)


def test_texts_and_choices_pass_through(vocabulary: Vocabulary) -> None:
    rows = [
        Example("Warm or cold?", ("warm", "hot"), ("cold", "warm"), "ask", "a/0"),
        Example("Say something.", ("Ünter!",), None, "free", "a/1"),
    ]
    task = tasks.register(TaskData("through", "memory", {"test": lambda: rows}), vocabulary)
    dataset = task.get_dataset(sequence_length=LENGTHS, split="test", shuffle=False)
    for row, example in zip(dataset.as_numpy_iterator(), rows, strict=True):
        assert row["inputs_pretokenized"].decode() == example.inputs
        assert row["targets_pretokenized"].decode() == example.targets[0]
        assert row["prompt"].decode() == example.prompt and row["id"].decode() == example.id
        choices = tuple(choice.decode() for choice in row["answer_choices"])
        assert choices == (example.answer_choices or ())
        assert row["inputs"].dtype == np.int32 and row["inputs"][-1] == row["targets"][-1] == 1


def test_standard_route_shuffles_by_seed(sentiment: TaskData, vocabulary: Vocabulary) -> None:
    name = tasks.register(sentiment, vocabulary).name

    def ids(seed: int) -> list[str]:
        dataset = seqio.get_mixture_or_task(name).get_dataset(
            sequence_length=LENGTHS, split="train", shuffle=True, seed=seed
        )
        return [row["id"].decode() for row in dataset.as_numpy_iterator()]

    plain = [example.id for example in sentiment.split("train")]
    assert ids(1) == ids(1) != ids(2)
    assert ids(1) != plain and sorted(ids(1)) == sorted(plain)


@pytest.mark.parametrize("pack", [False, True])
def test_feature_converter_and_stream_make_the_same_rows(
    sentiment: TaskData, vocabulary: Vocabulary, pack: bool
) -> None:
    task = tasks.register(sentiment, vocabulary)
    lengths = {"inputs": 200, "targets": 24}
    dataset = task.get_dataset(sequence_length=lengths, split="train", shuffle=False)
    converted = seqio.EncDecFeatureConverter(pack=pack)(dataset, task_feature_lengths=lengths)
    theirs = list(converted.as_numpy_iterator())
    stream = BatchStream(
        tasks.seqio_table(task, "train", lengths),
        batch_size=1,
        inputs_length=lengths["inputs"],
        targets_length=lengths["targets"],
        pack=pack,
        shuffle=False,
    )
    ours = [stream.batch_at(step) for step in range(len(theirs))]
    assert set(theirs[0]) == set(ours[0])
    for key in theirs[0]:
        assert theirs[0][key].dtype == ours[0][key].dtype == np.int32
        assert theirs[0][key].shape == ours[0][key][0].shape
    if pack:
        # seqio packs in its own order: the segments are compared, those of a whole epoch.
        assert max(row["encoder_segment_ids"].max() for row in theirs) > 2
        rows = [{key: array[0] for key, array in batch.items()} for batch in ours]
        sizes = np.cumsum([row["encoder_segment_ids"].max() for row in rows])
        epoch = int(np.searchsorted(sizes, len(sentiment.split("train")))) + 1
        assert _segments(rows[:epoch]) == _segments(theirs)
    else:
        for row, batch in zip(theirs, ours, strict=True):
            for key, array in row.items():
                np.testing.assert_array_equal(array, batch[key][0])


def _segments(rows: list[dict[str, np.ndarray]]) -> Counter[Any]:
    """How often each segment comes, as all of its encoder and decoder arrays."""
    segments: Counter[Any] = Counter()
    for row in rows:
        for number in range(1, row["encoder_segment_ids"].max() + 1):
            segments[
                tuple(
                    (key, tuple(array[row[f"{key[:7]}_segment_ids"] == number].tolist()))
                    for key, array in sorted(row.items())
                    if not key.endswith("segment_ids")
                )
            ] += 1
    return segments


def test_mixtures_have_the_rates_asked_for(vocabulary: Vocabulary, sentiment: TaskData) -> None:
    few = TaskData("few", "memory", {"train": lambda: [Example("a?", ("b",))] * 100})
    both = [sentiment, few]

    def rates(name: str, **options: Any) -> dict[str, float]:
        mixture = tasks.register_mixture(name, both, vocabulary, **options)
        return {task.name: mixture.get_rate(task) for task in mixture.tasks}

    total = len(sentiment.split("train"))
    names = ("elm_jax:sentiment_novel", "elm_jax:few")
    assert rates("by size") == dict(zip(names, (total, 100.0), strict=True))
    assert rates("capped", maximum=150) == dict(zip(names, (150.0, 100.0), strict=True))
    assert rates("equal", rates="equal") == dict(zip(names, (1.0, 1.0), strict=True))

    drawn = tasks.seqio_table("elm_jax:equal", "train", LENGTHS)
    assert 100 < len(drawn) <= 100 + total
    assert_same(drawn, tasks.seqio_table("elm_jax:equal", "train", LENGTHS))


def test_registering_again_is_safe_and_clashes_are_refused(
    sentiment: TaskData, vocabulary: Vocabulary
) -> None:
    task = tasks.register(sentiment, vocabulary)
    [same] = find_tasks(["mini:sentiment_novel"])
    assert tasks.register(same, vocabulary) is task
    mixture = tasks.register_mixture("all", [sentiment], vocabulary)
    assert tasks.register_mixture("all", [same], vocabulary) is mixture

    with pytest.raises(ElmError, match="'elm_jax:sentiment_novel' is .* already, not"):
        tasks.register(sentiment, Vocabulary(vocabulary.path, extra_ids=0))
    with pytest.raises(ElmError, match="'elm_jax:sentiment_novel' is .* already"):
        tasks.register(TaskData("sentiment novel", "elsewhere", sentiment.readers), vocabulary)
    with pytest.raises(ElmError, match="'elm_jax:all' is .* already"):
        tasks.register_mixture("all", [sentiment], vocabulary, rates="equal")
    with pytest.raises(ElmError, match="'elm_jax:sentiment_novel' is .* already"):
        tasks.register_mixture("sentiment_novel", [sentiment], vocabulary)
    seqio.TaskRegistry.remove(task.name)
    assert tasks.register(sentiment, vocabulary) is not task


def test_bad_requests_are_refused(sentiment: TaskData, vocabulary: Vocabulary) -> None:
    for options, message in (
        ({"tasks": []}, "mixture 'm' has no tasks"),
        ({"rates": "equall"}, r"did you mean 'equal'"),
        ({"maximum": 0}, "maximum is 0"),
        ({"rates": "equal", "maximum": 5}, "maximum is 5"),
    ):
        arguments: dict[str, Any] = {"tasks": [sentiment]} | options
        with pytest.raises(ElmError, match=message):
            tasks.register_mixture("m", vocabulary=vocabulary, **arguments)
    task = tasks.register(sentiment, vocabulary)
    with pytest.raises(ElmError, match=r"no split 'tran', .*did you mean 'train'"):
        tasks.seqio_table(task, "tran", LENGTHS)
    with pytest.raises(ElmError, match="feature_lengths need 'inputs' and 'targets'"):
        tasks.seqio_table(task, "train", {"inputs": 8})


def test_p3_names_become_valid_for_seqio(vocabulary: Vocabulary) -> None:
    name = "super_glue-wsc.fixed/p is/are r"
    data = TaskData(name, "memory", {"train": lambda: [Example("a?", ("b",))]})
    assert tasks.register(data, vocabulary).name == "elm_jax:super_glue_wsc.fixed:p_is:are_r"
