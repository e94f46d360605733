"""Tables, training batches (order, mixtures, packing) and evaluation batches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_jax.data import mini
from elm_jax.data.batches import (
    BatchStream,
    first_fit,
    fit_lengths,
    gather,
    pad_batches,
)
from elm_jax.data.examples import Example
from elm_jax.data.table import ExampleTable, tokenize
from elm_jax.data.vocabulary import Vocabulary, train_vocabulary
from elm_jax.errors import ElmError


def table(size: int, *, first: int = 10, seed: int = 0, longest: int = 12) -> ExampleTable:
    """Examples that can be told apart: input and target of example i begin with `first + i`."""
    rng = np.random.default_rng(seed)

    def ids(number: int) -> list[int]:
        return [first + number, *rng.integers(2, 9, rng.integers(longest - 1)), 1]

    return ExampleTable.from_ids([ids(n) for n in range(size)], [ids(n) for n in range(size)])


def stream(tables: Any, **changes: Any) -> BatchStream:
    return BatchStream(
        tables, **({"batch_size": 4, "inputs_length": 12, "targets_length": 12} | changes)
    )


def examples_of(batches: Sequence[dict[str, np.ndarray]]) -> list[int]:
    """The examples in batches, in order, by the ids they begin with."""
    starts = []
    for batch in batches:
        tokens = batch["encoder_input_tokens"]
        first = (
            batch["encoder_positions"] == 0
            if "encoder_positions" in batch
            else np.zeros_like(tokens, bool)
        )
        first[:, 0] = True
        starts += tokens[first & (tokens > 0)].tolist()
    return starts


def unpack(batch: dict[str, np.ndarray]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The (inputs, targets) in packed rows, by their segment ids."""
    pairs = []
    for row in range(len(batch["encoder_input_tokens"])):
        for segment in range(1, batch["encoder_segment_ids"][row].max() + 1):
            parts = []
            for side, tokens in (("encoder", "encoder_input"), ("decoder", "decoder_target")):
                of_segment = batch[f"{side}_segment_ids"][row] == segment
                ids = batch[f"{tokens}_tokens"][row][of_segment]
                assert (batch[f"{side}_positions"][row][of_segment] == np.arange(len(ids))).all()
                parts.append(tuple(ids.tolist()))
            pairs.append((parts[0], parts[1]))
    return pairs


def pairs_of(data: ExampleTable) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    both = (data.example(row) for row in range(len(data)))
    return [(tuple(inputs.tolist()), tuple(targets.tolist())) for inputs, targets in both]


# --- Tables ----------------------------------------------------------------------------------


def test_table_lays_ids_out_flat() -> None:
    data = ExampleTable.from_ids([[5, 6, 1], [7, 1]], [[8, 1], [9, 9, 1]], index=[4, 2])
    assert data.inputs.dtype == np.int32 and data.inputs_offsets.dtype == np.int64
    assert data.inputs_lengths.tolist() == [3, 2] and data.index.tolist() == [4, 2]
    assert [array.tolist() for array in data.example(-1)] == [[7, 1], [9, 9, 1]]
    with pytest.raises(IndexError):
        data.example(2)


def test_joined_tables_hold_the_examples_of_both() -> None:
    first, second = table(3), table(4, first=50)
    assert pairs_of(ExampleTable.concatenate([first, second])) == pairs_of(first) + pairs_of(second)


def test_fingerprint_follows_the_content() -> None:
    assert table(5).fingerprint == table(5).fingerprint
    assert table(5).fingerprint != table(6).fingerprint
    moved = ExampleTable.from_ids([[5], [6, 1]], [[1], [1]])
    assert moved.fingerprint != ExampleTable.from_ids([[5, 6], [1]], [[1], [1]]).fingerprint


def test_saved_table_comes_back_memory_mapped(tmp_path: Path) -> None:
    data = table(20)
    data.save(tmp_path / "deep/table")
    loaded = ExampleTable.load(tmp_path / "deep/table")
    assert isinstance(loaded.inputs, np.memmap)
    assert pairs_of(loaded) == pairs_of(data) and loaded.fingerprint == data.fingerprint
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["table"]
    for key, array in stream(data).batch_at(3).items():
        np.testing.assert_array_equal(stream(loaded).batch_at(3)[key], array)
    with pytest.raises(FileExistsError, match="never overwritten"):
        data.save(tmp_path / "deep/table")


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no table in"):
        ExampleTable.load(tmp_path)
    data = table(20)
    for name, damage, message in (
        ("inputs.npy", lambda path: path.unlink(), "damaged table"),
        ("inputs.npy", lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged table"),
        ("targets.npy", lambda path: np.save(path, data.targets + 1), "fingerprint"),
        ("table.json", lambda path: path.write_text("{"), "damaged table"),
    ):
        folder = tmp_path / f"{name}{message}{len(list(tmp_path.iterdir()))}"
        data.save(folder)
        damage(folder / name)
        with pytest.raises(ElmError, match=message):
            ExampleTable.load(folder)


def test_bad_tables_are_refused() -> None:
    with pytest.raises(ElmError, match="at least one example"):
        ExampleTable.from_ids([], [])
    with pytest.raises(ElmError, match="example 1 has no targets"):
        ExampleTable.from_ids([[1], [1]], [[1], []])
    with pytest.raises(ElmError, match="targets_offsets should be 3 numbers"):
        ExampleTable.from_ids([[1], [1]], [[1]])


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    texts = [row["inputs"] for task in mini.TASKS for row in mini.examples(task.name, "test")]
    prefix = tmp_path_factory.mktemp("vocabulary") / "small"
    return Vocabulary(train_vocabulary(texts, prefix, 400))


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    rows = mini.examples("extraction_name", "train", size=60)
    return [Example.from_row(row, "mini") for row in rows]


def test_tokenize_closes_every_text_with_eos(
    vocabulary: Vocabulary, examples: list[Example]
) -> None:
    data = tokenize(examples, vocabulary, inputs_length=20, targets_length=3)
    for row, example in enumerate(examples):
        for ids, text, length in zip(
            data.example(row), (example.inputs, example.targets[0]), (20, 3), strict=True
        ):
            assert ids.tolist() == [*vocabulary.encode(text)[: length - 1], 1]
    assert data.inputs_lengths.max() == 20 and data.targets_lengths.min() >= 2
    with pytest.raises(ElmError, match="targets_length 0"):
        tokenize(examples, vocabulary, inputs_length=20, targets_length=0)
    with pytest.raises(ElmError, match="at least one example"):
        tokenize([], vocabulary, inputs_length=20, targets_length=4)


# --- One table -------------------------------------------------------------------------------


def test_batch_by_hand() -> None:
    data = ExampleTable.from_ids([[5, 6, 1], [7, 1]], [[8, 1], [9, 2, 3, 4, 1]])
    batch = BatchStream(
        data, batch_size=3, inputs_length=4, targets_length=3, shuffle=False
    ).batch_at(0)
    assert {key: array.tolist() for key, array in batch.items()} == {
        "encoder_input_tokens": [[5, 6, 1, 0], [7, 1, 0, 0], [5, 6, 1, 0]],
        "decoder_input_tokens": [[0, 8, 1], [0, 9, 2], [0, 8, 1]],
        "decoder_target_tokens": [[8, 1, 0], [9, 2, 1], [8, 1, 0]],
        "decoder_loss_weights": [[1, 1, 0], [1, 1, 1], [1, 1, 0]],
    }
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}


def test_shorter_rows_cut_as_tokenize_does(vocabulary: Vocabulary, examples: list[Example]) -> None:
    whole = tokenize(examples, vocabulary, inputs_length=200, targets_length=50)
    cut = tokenize(examples, vocabulary, inputs_length=9, targets_length=2)
    for pack in (False, True):
        lengths = {"inputs_length": 9, "targets_length": 2, "pack": pack}
        for step in range(5):
            expected = stream(cut, **lengths).batch_at(step)
            for key, array in stream(whole, **lengths).batch_at(step).items():
                np.testing.assert_array_equal(array, expected[key])


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (7, 7), (3, 8), (1, 3), (25, 6)])
def test_every_epoch_has_every_example_once(size: int, batch_size: int) -> None:
    batches = stream(table(size), batch_size=batch_size, seed=5)
    seen = examples_of([batches.batch_at(step) for step in range(-(-4 * size // batch_size))])
    epochs = [seen[n * size : (n + 1) * size] for n in range(4)]
    assert all(sorted(epoch) == list(range(10, 10 + size)) for epoch in epochs)
    if size >= 10:
        assert len(set(map(tuple, epochs))) == 4, "each epoch has its own order"
        assert sorted(epochs[0]) != epochs[0]


def test_unshuffled_order_is_the_tables() -> None:
    seen = examples_of([stream(table(6), shuffle=False).batch_at(step) for step in range(3)])
    assert seen == [10, 11, 12, 13, 14, 15] * 2


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("tables", [table(30), [table(30), table(9, first=90)]])
def test_batches_depend_on_seed_and_step_alone(tables: Any, pack: bool) -> None:
    settings_ = {"pack": pack, "inputs_length": 30, "targets_length": 30}
    forth, back = stream(tables, **settings_), stream(tables, **settings_)
    steps = [0, 1, 2, 50, 51]
    expected = {step: forth.batch_at(step) for step in steps}
    for step in reversed(steps):
        for key, array in back.batch_at(step).items():
            np.testing.assert_array_equal(array, expected[step][key])
    other = stream(tables, seed=1, **settings_).batch_at(0)["encoder_input_tokens"]
    assert (other != expected[0]["encoder_input_tokens"]).any()


def test_state_names_what_batches_depend_on() -> None:
    base = stream(table(5))
    assert json.loads(json.dumps(base.state())) == base.state()
    assert base.state()["tables"] == [table(5).fingerprint]
    assert base.fingerprint == stream(table(5)).fingerprint
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"batch_size": 5},
        {"inputs_length": 13},
        {"pack": True},
        {"shuffle": False},
        {"rates": [2]},
    ]
    prints = {stream(table(5), **change).fingerprint for change in changes}
    prints |= {base.fingerprint, stream(table(6)).fingerprint}
    assert len(prints) == len(changes) + 2


# --- Mixtures --------------------------------------------------------------------------------


def test_rates_say_how_often_each_table_is_drawn() -> None:
    tables = [table(50), table(20, first=100), table(5, first=200)]
    batches = stream(tables, rates=[1, 2, 5], batch_size=64)
    seen = np.array(examples_of([batches.batch_at(step) for step in range(256)]))
    shares = np.histogram(seen, [10, 100, 200, 300])[0] / len(seen)
    np.testing.assert_allclose(shares, [1 / 8, 2 / 8, 5 / 8], atol=1e-4)
    # Already a fifth of that is mixed well.
    shares = np.histogram(seen[:3000], [10, 100, 200, 300])[0] / 3000
    np.testing.assert_allclose(shares, [1 / 8, 2 / 8, 5 / 8], atol=0.03)
    # Each table is gone through in epochs of its own.
    for first, size in ((10, 50), (100, 20), (200, 5)):
        own = seen[(seen >= first) & (seen < first + size)]
        for epoch in range(len(own) // size):
            assert len(set(own[epoch * size : (epoch + 1) * size].tolist())) == size


def test_default_rates_are_the_sizes_and_rare_tables_come_too() -> None:
    batches = stream([table(300), table(100, first=500)], batch_size=128)
    seen = np.array(examples_of([batches.batch_at(step) for step in range(128)]))
    assert abs((seen < 500).mean() - 0.75) < 1e-3
    rare = stream([table(9), table(2, first=500)], rates=[1e9, 1], batch_size=2**14 + 1)
    assert sum(start >= 500 for start in examples_of([rare.batch_at(0)])) == 1


def test_equal_tables_run_in_orders_of_their_own() -> None:
    batches = stream([table(40), table(40, first=100)], batch_size=80, rates=[1, 1])
    seen = examples_of([batches.batch_at(step) for step in range(2)])
    first = [start for start in seen if start < 100][:40]
    second = [start - 90 for start in seen if start >= 100][:40]
    assert sorted(first) == sorted(second) and first != second


# --- Packing ---------------------------------------------------------------------------------


def test_packed_batch_by_hand() -> None:
    # The example in the documentation of seqio's EncDecFeatureConverter.
    data = ExampleTable.from_ids([[7, 8, 5, 1], [8, 4, 9, 3, 1]], [[3, 9, 1], [4, 1]])
    batch = BatchStream(
        data, batch_size=1, inputs_length=10, targets_length=7, pack=True, shuffle=False
    ).batch_at(0)
    assert {key: array.tolist() for key, array in batch.items()} == {
        "encoder_input_tokens": [[7, 8, 5, 1, 8, 4, 9, 3, 1, 0]],
        "encoder_segment_ids": [[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]],
        "encoder_positions": [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]],
        "decoder_target_tokens": [[3, 9, 1, 4, 1, 0, 0]],
        "decoder_input_tokens": [[0, 3, 9, 0, 4, 0, 0]],
        "decoder_loss_weights": [[1, 1, 1, 1, 1, 0, 0]],
        "decoder_segment_ids": [[1, 1, 1, 2, 2, 0, 0]],
        "decoder_positions": [[0, 1, 2, 0, 1, 0, 0]],
    }
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 120),
    batch_size=st.integers(1, 9),
    inputs_length=st.integers(12, 60),
    targets_length=st.integers(12, 60),
    seed=st.integers(0, 1000),
)
def test_every_epoch_is_packed_whole(
    size: int, batch_size: int, inputs_length: int, targets_length: int, seed: int
) -> None:
    data = table(size, seed=seed)
    packed = stream(
        data,
        batch_size=batch_size,
        inputs_length=inputs_length,
        targets_length=targets_length,
        seed=seed,
        pack=True,
    )
    seen: list[Any] = []
    for step in range(3 * size):
        seen += unpack(packed.batch_at(step))
        if len(seen) >= 2 * size:
            break
    expected = Counter(pairs_of(data))
    assert Counter(seen[:size]) == expected and Counter(seen[size : 2 * size]) == expected


def test_packing_fills_rows() -> None:
    data = table(2000)
    packed = stream(data, inputs_length=64, targets_length=64, batch_size=64, pack=True)
    batches = [packed.batch_at(step) for step in range(3)]
    filled = np.mean([(batch["decoder_segment_ids"] > 0).mean() for batch in batches])
    assert filled > 0.9
    assert max(batch["encoder_segment_ids"].max() for batch in batches) > 5


def test_packed_mixture_keeps_its_rates() -> None:
    tables = [table(50, longest=3), table(50, first=100)]
    packed = stream(tables, rates=[3, 1], batch_size=64, inputs_length=32, pack=True)
    seen = np.array(examples_of([packed.batch_at(step) for step in range(60)]))
    assert abs((seen < 100).mean() - 0.75) < 0.02


def test_first_fit_by_hand() -> None:
    lengths = np.array([6, 5, 4, 3, 2, 9])
    assert first_fit(lengths, np.ones(6, int), 10, 9).tolist() == [0, 1, 0, 1, 1, 2]
    assert first_fit(lengths, np.ones(6, int), 10, 2).tolist() == [0, 1, 0, 1, 2, 3]
    # No more than 32 rows stand open, so the first is closed when the last 2 come.
    rows = first_fit(np.array([9] * 33 + [1, 1]), np.ones(35, int), 10, 9)
    assert rows.tolist() == [*range(33), 1, 2]


# --- Lengths and evaluation ------------------------------------------------------------------


def test_fit_lengths_holds_all_or_the_maximum() -> None:
    data = ExampleTable.from_ids([[5] * 17, [5]], [[6], [6] * 8])
    assert fit_lengths(data) == (24, 8)
    assert fit_lengths(data, multiple=1) == (17, 8)
    assert fit_lengths(data, maximum=(20, 64)) == (20, 8)
    with pytest.raises(ElmError, match="multiple 0"):
        fit_lengths(data, multiple=0)


def test_pad_batches_show_every_example_once_in_few_shapes() -> None:
    data = table(103, longest=90)
    shapes, rows = set(), []
    for indices, batch in pad_batches(data, 8):
        tokens, targets = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
        assert indices.shape == (8,) and len(tokens) == len(targets) == 8
        shapes.add((tokens.shape[1], targets.shape[1]))
        for place, row in enumerate(indices):
            if row < 0:
                assert not batch["decoder_loss_weights"][place].any() and tokens[place].any()
                continue
            inputs, answer = data.example(row)
            assert tokens[place][tokens[place] > 0].tolist() == inputs.tolist()
            assert targets[place][targets[place] > 0].tolist() == answer.tolist()
            assert batch["decoder_loss_weights"][place].sum() == len(answer)
            rows.append(row)
    assert sorted(rows) == list(range(103))
    assert {size for shape in shapes for size in shape} <= {16, 32, 64, 96} and len(shapes) <= 10


def test_pad_batches_refuse_what_does_not_fit() -> None:
    with pytest.raises(ElmError, match=r"of 9 ids does not fit the buckets \(4, 8\)"):
        list(pad_batches(ExampleTable.from_ids([[5] * 9], [[1]]), 2, buckets=(4, 8)))
    with pytest.raises(ElmError, match="batch_size is 0"):
        list(pad_batches(table(2), 0))


def test_gather_keeps_the_last_id() -> None:
    data = ExampleTable.from_ids([[5, 6, 7, 1], [8, 1]], [[1], [1]])
    assert gather(data, "inputs", np.array([0, 1, 0]), 3).tolist() == [
        [5, 6, 1],
        [8, 1, 0],
        [5, 6, 1],
    ]
    assert gather(data, "inputs", np.array([0, 1]), 1).tolist() == [[1], [1]]


@pytest.mark.parametrize(
    ("tables", "changes", "message"),
    [
        ([], {}, "at least one table"),
        (table(2), {"batch_size": 0}, "batch_size 0"),
        (table(2), {"inputs_length": 0}, "inputs_length 0"),
        (table(2), {"seed": -1}, "seed -1"),
        (table(2), {"rates": [1, 1]}, "1 positive numbers expected"),
        ([table(2), table(2)], {"rates": [1, 0]}, r"rates are \[1, 0\], 2 positive numbers"),
        ([table(2), table(2)], {"rates": [1, float("nan")]}, "2 positive numbers"),
    ],
)
def test_bad_streams_are_refused(tables: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ElmError, match=message):
        stream(tables, **changes)
    with pytest.raises(ElmError, match="step is -1"):
        stream(table(2)).batch_at(-1)
