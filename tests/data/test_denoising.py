"""Span corruption and prefix LM against T5's algorithm; corpora and their streams."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_jax.data import denoising, mini
from elm_jax.data.corpus import DenoisingStream, load_corpus, read_paragraphs
from elm_jax.data.denoising import (
    noise_mask,
    prefix_lm,
    span_corruption,
    span_corruption_lengths,
    span_counts,
)
from elm_jax.data.vocabulary import Vocabulary, train_vocabulary
from elm_jax.errors import ElmError


def t5_random_spans_helper(
    inputs_length: int, noise_density: float, mean_noise_span_length: float
) -> tuple[int, int]:
    """T5's own arithmetic, for lengths at which it needs no clamping."""

    def lengths(tokens: int) -> tuple[int, int]:
        noise = round(tokens * noise_density)
        spans = round(noise / mean_noise_span_length)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length - 1
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    targets = lengths(tokens)[1]
    if noise_density == 0.5 and targets > inputs_length:
        tokens, targets = tokens - 1, targets - 1
    return tokens, targets


def uncorrupt(inputs: np.ndarray, targets: np.ndarray, first_sentinel: int) -> list[int]:
    """Puts the spans of the targets back where the inputs have their sentinels."""
    spans: dict[int, list[int]] = {}
    for token in targets[:-1].tolist():
        if token > first_sentinel - 200:
            spans[token] = current = []
        else:
            current.append(token)
    return [token for item in inputs[:-1].tolist() for token in spans.pop(item, [item])]


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.15, 10.0), (0.3, 1.0)])
def test_lengths_are_t5s(density: float, mean: float) -> None:
    for inputs_length in range(40, 1100):
        expected = t5_random_spans_helper(inputs_length, density, mean)
        assert span_corruption_lengths(inputs_length, density, mean) == expected


def test_known_lengths() -> None:
    assert span_corruption_lengths(512) == (568, 114)  # as in T5's configuration
    assert span_corruption_lengths(512, 0.5, 3.0)[1] <= 512
    assert span_counts(10) == (2, 1)


def test_small_mask_by_hand() -> None:
    # 10 tokens: 2 are noise in 1 span, which comes after all kept tokens.
    mask = noise_mask(np.random.default_rng(0), 5, 10)
    assert mask.tolist() == [[False] * 8 + [True] * 2] * 5


def test_corruption_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.array([[0, 1, 1, 0, 0, 1, 0, 0, 1, 1], [0, 0, 1, 0, 1, 0, 1, 1, 1, 1]], bool)
    tokens = np.arange(10, 20) + np.array([[0], [10]])
    # Each row has 5 and 6 masked tokens, so rows are corrupted one by one.
    for row, inputs, targets in (
        (0, [10, 99, 13, 14, 98, 16, 17, 97, 1], [99, 11, 12, 98, 15, 97, 18, 19, 1]),
        (1, [20, 21, 99, 23, 98, 25, 97, 1], [99, 22, 98, 24, 97, 26, 27, 28, 29, 1]),
    ):
        monkeypatch.setattr(denoising, "noise_mask", lambda *_, row=row: mask[row : row + 1])
        result = span_corruption(
            tokens[row : row + 1], np.random.default_rng(0), vocab_size=100, eos_id=1
        )
        assert [array.tolist() for array in result] == [[inputs], [targets]]


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 5),
    length=st.integers(2, 400),
    density=st.floats(0.01, 0.99),
    mean=st.floats(1.0, 12.0),
    seed=st.integers(0, 2**32),
)
def test_corruption_loses_nothing(
    rows: int, length: int, density: float, mean: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 5000, (rows, length))
    noise, spans = span_counts(length, density, mean)
    inputs, targets = span_corruption(
        tokens,
        rng,
        vocab_size=6000,
        noise_density=density,
        mean_noise_span_length=mean,
    )
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs.shape == (rows, length - noise + spans + 1)
    assert targets.shape == (rows, noise + spans + 1)
    for row in range(rows):
        assert uncorrupt(inputs[row], targets[row], 5999) == tokens[row].tolist()
        sentinels = [token for token in inputs[row] if token >= 5000]
        assert sentinels == list(range(5999, 5999 - spans, -1))
        assert inputs[row, 0] < 5000 and targets[row, 0] == 5999
        assert inputs[row, -1] == targets[row, -1] == 1


def test_masks_follow_t5s_distribution() -> None:
    # 20 tokens: 3 noise tokens in 1 span of T5's default; with shorter spans 6 in 3.
    rng = np.random.default_rng(0)
    assert span_counts(20, 0.3, 2.0) == (6, 3)
    mask = noise_mask(rng, 60_000, 20, 0.3, 2.0)
    assert (mask.sum(1) == 6).all() and not mask[:, 0].any() and mask[:, -1].all()
    assert (np.diff(mask.astype(int), axis=1) == 1).sum(1).tolist() == [3] * len(mask)
    # T5 cuts 6 in 3 parts by shuffling 2 cuts among 5 places: P(first part has k) = (5 - k) / 10.
    starts = np.argmax(mask, axis=1)
    first = np.array([np.argmin(row[start:]) for row, start in zip(mask, starts, strict=True)])
    shares = np.bincount(first, minlength=5)[1:5] / len(mask)
    np.testing.assert_allclose(shares, [0.4, 0.3, 0.2, 0.1], atol=0.008)
    # And 14 kept tokens in 3 parts: P(first part has k) = (13 - k) / 78.
    shares = np.bincount(starts, minlength=13)[1:13] / len(mask)
    np.testing.assert_allclose(shares, (13 - np.arange(1, 13)) / 78, atol=0.006)


def test_chunks_of_the_right_length_fill_the_inputs() -> None:
    rng = np.random.default_rng(0)
    for inputs_length in (16, 64, 100, 128, 256, 512):
        length, targets_length = span_corruption_lengths(inputs_length)
        inputs, targets = span_corruption(np.full((2, length), 7), rng, vocab_size=1000)
        assert targets.shape[1] == targets_length
        assert inputs_length - 1 <= inputs.shape[1] <= inputs_length


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 5), length=st.integers(2, 90), seed=st.integers(0, 2**32))
def test_prefix_and_continuation_make_the_chunk(rows: int, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 5000, (rows, length))
    inputs, targets = prefix_lm(tokens, rng)
    assert inputs.shape == (rows, length - 1) and targets.shape == (rows, length)
    for row in range(rows):
        prefix, rest = inputs[row][inputs[row] > 0], targets[row][targets[row] > 0]
        assert rest[-1] == 1 and len(prefix) >= 1 and len(rest) >= 2
        assert [*prefix, *rest[:-1]] == tokens[row].tolist()
        assert not inputs[row, len(prefix) :].any() and not targets[row, len(rest) :].any()


def test_prefix_lengths_are_uniform() -> None:
    inputs, _ = prefix_lm(np.full((30_000, 6), 9), np.random.default_rng(0))
    shares = np.bincount((inputs > 0).sum(1))[1:] / 30_000
    np.testing.assert_allclose(shares, [0.2] * 5, atol=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: span_counts(10, 0.0), "noise_density is 0.0"),
        (lambda: span_counts(10, 1.0), "noise_density is 1.0"),
        (lambda: span_counts(10, 0.15, 0.5), "mean_noise_span_length is 0.5"),
        (lambda: span_corruption_lengths(2), "inputs_length is 2"),
        (lambda: noise_mask(np.random.default_rng(0), 1, 1), "chunks of 1 tokens"),
        (lambda: prefix_lm(np.ones((1, 1), int), np.random.default_rng(0)), "chunks of 1 tokens"),
    ],
)
def test_bad_numbers_are_refused(call: object, message: str) -> None:
    with pytest.raises(ElmError, match=message):
        call()  # type: ignore[operator]


# --- Corpora ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    texts = [row["inputs"] for task in mini.TASKS for row in mini.examples(task.name, "test")]
    prefix = tmp_path_factory.mktemp("vocabulary") / "small"
    return Vocabulary(train_vocabulary(texts, prefix, 400))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "b.txt").write_text("The room was\r\n  warm.\r\n\r\n \r\nThe inn\nwas cold.\n")
    (texts / "a.txt.gz").write_bytes(gzip.compress(b"A happy day. " * 40))
    (texts / "notes.md").write_text("not a text file of the corpus")
    return texts


def test_paragraphs_lose_their_line_wraps(folder: Path) -> None:
    assert read_paragraphs(folder / "b.txt") == ["The room was warm.", "The inn was cold."]


def test_corpus_is_documents_closed_by_eos(folder: Path, vocabulary: Vocabulary) -> None:
    corpus = load_corpus(folder, vocabulary, heldout_fraction=0.25)
    assert corpus.train.dtype == np.uint16
    assert (corpus.train == 1).sum() == (corpus.heldout == 1).sum() == 2
    assert corpus.train[-1] == corpus.heldout[-1] == 1
    documents = [
        [*np.split(split, np.flatnonzero(split == 1))[number]]
        for number in (0, 1)
        for split in (corpus.train, corpus.heldout)
    ]
    first = documents[0] + documents[1]
    assert first == vocabulary.encode(("A happy day. " * 40).strip())
    assert len(documents[1]) == round(len(first) * 0.25)
    second = documents[2][1:] + documents[3][1:]
    assert second == vocabulary.encode("The room was warm.") + vocabulary.encode(
        "The inn was cold."
    )
    everything = load_corpus(folder, vocabulary, heldout_fraction=0)
    assert len(everything.heldout) == 0
    assert everything.fingerprint != corpus.fingerprint


def test_cache_is_used_and_follows_the_texts(
    folder: Path, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    plain = load_corpus(folder, vocabulary)
    first = load_corpus(folder, vocabulary, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(Vocabulary, "encode_all", lambda *_: pytest.fail("tokenised again"))
        again = load_corpus(folder, vocabulary, cache=cache)
    assert isinstance(again.train, np.memmap)
    for corpus in (first, again):
        np.testing.assert_array_equal(corpus.train, plain.train)
        np.testing.assert_array_equal(corpus.heldout, plain.heldout)
        assert corpus.fingerprint == plain.fingerprint
    assert len(list(cache.iterdir())) == 3
    sidecar = json.loads(next(cache.glob("*.json")).read_text())
    assert sidecar["vocabulary"] == vocabulary.fingerprint
    assert list(sidecar["files"]) == ["a.txt.gz", "b.txt"]

    (folder / "b.txt").write_text("Another text.")
    changed = load_corpus(folder, vocabulary, cache=cache)
    assert changed.fingerprint != first.fingerprint and len(changed.train) < len(first.train)

    for array in cache.glob("*.train.npy"):
        array.write_bytes(array.read_bytes()[:-4])
    with pytest.raises(ElmError, match="damaged cache, delete"):
        load_corpus(folder, vocabulary, cache=cache)


def test_bad_corpora_are_refused(folder: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no text folder at"):
        load_corpus(tmp_path / "none", vocabulary)
    with pytest.raises(FileNotFoundError, match=r"no \*\.txt or \*\.txt\.gz in"):
        load_corpus(tmp_path, vocabulary)
    with pytest.raises(ElmError, match="heldout_fraction is 1"):
        load_corpus(folder, vocabulary, heldout_fraction=1)
    whole = (folder / "a.txt.gz").read_bytes()
    (folder / "a.txt.gz").write_bytes(whole[:-12])
    with pytest.raises(ElmError, match=r"a\.txt\.gz: not a readable UTF-8 text"):
        load_corpus(folder, vocabulary)
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"\xff\xfe\xfa"))
    with pytest.raises(ElmError, match=r"a\.txt\.gz: not a readable UTF-8 text"):
        load_corpus(folder, vocabulary)
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"\n \n"))
    (folder / "b.txt").write_text("")
    with pytest.raises(ElmError, match="all empty"):
        load_corpus(folder, vocabulary)


# --- Streams ---------------------------------------------------------------------------------

IDS = np.arange(3, 2003).astype(np.uint16)


def stream(objective: str = "span_corruption", **changes: int) -> DenoisingStream:
    sizes = {"batch_size": 4, "inputs_length": 32, "targets_length": 16, "vocab_size": 2200}
    return DenoisingStream(IDS, objective, **(sizes | changes))


def chunk_of(batch: dict[str, np.ndarray], row: int) -> list[int]:
    inputs, targets = (
        batch[key][row][batch[key][row] != 0]
        for key in ("encoder_input_tokens", "decoder_target_tokens")
    )
    if inputs[-1] == 1:
        return uncorrupt(inputs, targets, 2199)
    return [*inputs.tolist(), *targets[:-1].tolist()]


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm"])
def test_stream_shows_every_chunk_once_an_epoch(objective: str) -> None:
    batches = stream(objective)
    count, length = batches.chunks_per_epoch, batches.chunk_length
    assert count == (len(IDS) - length + 1) // length
    chunks = [
        chunk_of(batches.batch_at(step), row)
        for step in range(-(-2 * count // 4))
        for row in range(4)
    ]
    epochs = [sorted(chunks[:count]), sorted(chunks[count : 2 * count])]
    for epoch in epochs:
        assert all(len(chunk) == length for chunk in epoch)
        joined = [token for chunk in epoch for token in chunk]
        assert all(after == before + 1 for before, after in pairwise(joined))
    assert epochs[0] != epochs[1], "each epoch starts at another offset"
    assert chunks[:count] != sorted(chunks[:count]), "chunks are shuffled"


def test_stream_depends_on_seed_and_step_alone() -> None:
    first, second = stream(seed=3), stream(seed=3)
    later = [second.batch_at(step) for step in (40, 7, 0)]
    for step, batch in zip((40, 7, 0), later, strict=True):
        for key, array in first.batch_at(step).items():
            np.testing.assert_array_equal(array, batch[key])
    other = stream(seed=4).batch_at(7)["encoder_input_tokens"]
    assert (other != later[1]["encoder_input_tokens"]).any()
    assert first.state() == second.state() != stream(seed=4).state()
    json.dumps(first.state())


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm"])
def test_stream_batches_have_t5x_arrays(objective: str) -> None:
    batch = stream(objective, targets_length=20).batch_at(2)
    targets = batch["decoder_target_tokens"]
    assert batch["encoder_input_tokens"].shape == (4, 32) and targets.shape == (4, 20)
    assert all(array.dtype == np.int32 for array in batch.values())
    np.testing.assert_array_equal(batch["decoder_input_tokens"][:, 1:], targets[:, :-1])
    assert not batch["decoder_input_tokens"][:, 0].any()
    np.testing.assert_array_equal(batch["decoder_loss_weights"], targets != 0)


def test_a_corpus_of_one_chunk_suffices() -> None:
    sizes = {"batch_size": 3, "inputs_length": 9, "targets_length": 10, "vocab_size": 2200}
    batches = DenoisingStream(IDS[:10], "prefix_lm", **sizes)
    assert batches.chunks_per_epoch == 1
    batch = batches.batch_at(5)
    assert [chunk_of(batch, row) for row in range(3)] == [IDS[:10].tolist()] * 3


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ("span_corupption", {}, "did you mean 'span_corruption'"),
        ("span_corruption", {"targets_length": 4}, "needs at least 8"),
        ("span_corruption", {"sentinels": 1}, "needs 2 sentinels, the vocabulary has 1"),
        ("span_corruption", {"inputs_length": 4000, "targets_length": 4000}, "sentinels"),
        ("prefix_lm", {"targets_length": 1}, "needs at least 1 and 2"),
        ("prefix_lm", {"inputs_length": 4000, "targets_length": 4000}, "2000 tokens, a chunk"),
        ("prefix_lm", {"batch_size": 0}, "batch_size is 0"),
        ("prefix_lm", {"seed": -1}, "seed -1"),
    ],
)
def test_bad_streams_are_refused(objective: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ElmError, match=message):
        stream(objective, **changes)
    with pytest.raises(ElmError, match="step is -1"):
        stream().batch_at(-1)
