"""Vocabulary: T5's ids, sentinels, seqio's and Hugging Face's encodings, training."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from elm_jax.data import mini
from elm_jax.data.vocabulary import ByteVocabulary, Vocabulary, train_vocabulary
from elm_jax.errors import ElmError

TEXTS = (
    "Mr. Knightley, a sensible man about seven or eight-and-thirty.",
    "  Tabs\tand\nlines,   doubled  blanks ",
    "Ünïcode: ½ ﬁne “quotes” — 日本語 … №7",
    "unseen glyphs \u2603\U0001f984",
    "",
)


@pytest.fixture(scope="module")
def t5(shared_data: Path) -> Vocabulary:
    return Vocabulary(shared_data / "vocab/t5_32k/spiece.model")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [
        row["inputs"] for task in mini.TASKS for row in mini.examples(task.name, "train", size=40)
    ]


@pytest.fixture(scope="module")
def trained(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    prefix = tmp_path_factory.mktemp("vocabulary") / "small"
    return Vocabulary(train_vocabulary(texts, prefix, 400), extra_ids=10)


def test_t5_has_its_known_ids(t5: Vocabulary) -> None:
    assert t5.vocab_size == 32100
    assert t5.encode("The cat") == [37, 1712]
    assert (t5.sentinel(0), t5.sentinel(99)) == (32099, 32000)
    assert t5.encode("a <extra_id_0> b") == [3, 9, 32099, 3, 115]
    digest = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
    assert t5.fingerprint == digest


def test_decode_stops_at_eos_and_maps_outsiders_to_unknown(t5: Vocabulary) -> None:
    assert t5.decode([37, 1712, 1, 1712]) == "The cat"
    assert t5.decode([1, 37]) == ""
    assert t5.decode([]) == ""
    assert t5.decode([37, 32100]) == t5.decode([37, 2]) == t5.decode([37, -1])
    assert t5.decode([37, 32099]) == "The <extra_id_0>"


def test_encode_all_is_encode_of_each(t5: Vocabulary) -> None:
    assert t5.encode_all(TEXTS) == [t5.encode(text) for text in TEXTS]


def test_ids_are_seqios(t5: Vocabulary, trained: Vocabulary) -> None:
    pytest.importorskip("seqio")
    for vocabulary in (t5, trained):
        reference = vocabulary.to_seqio()
        assert vocabulary.vocab_size == reference.vocab_size
        for text in (*TEXTS, "span <extra_id_3> and <extra_id_0>"):
            ids = vocabulary.encode(text)
            assert ids == list(reference.encode(text)) == list(reference.encode_tf(text).numpy())
            assert vocabulary.decode(ids) == reference.decode(ids)
        assert vocabulary.decode([5, 10**6, 1, 8]) == reference.decode([5, 10**6, 1, 8])


def test_bytes_are_seqios() -> None:
    pytest.importorskip("seqio")
    ours = ByteVocabulary("tokenizer_config.json")
    for text in TEXTS:
        assert ours.encode(text) == list(ours.to_seqio().encode(text))
        assert ours.decode(ours.encode(text)) == ours.to_seqio().decode(ours.encode(text)) == text


def test_ids_are_hugging_faces(t5: Vocabulary) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.T5Tokenizer.from_pretrained(str(Path(t5.path).parent))
    for text in TEXTS[:1] + TEXTS[2:3] + ("Which <extra_id_0> of the two <extra_id_1> ?",):
        assert tokenizer(text, add_special_tokens=False).input_ids == t5.encode(text)


def test_trained_model_has_t5s_special_ids_and_size(trained: Vocabulary) -> None:
    assert trained.vocab_size == 410
    assert trained.sentinel(0) == 409 and trained.sentinel(9) == 400
    with pytest.raises(ElmError, match="10 sentinels, no <extra_id_10>"):
        trained.sentinel(10)
    text = "The holiday was a very happy one."
    assert trained.decode([*trained.encode(text), 1, 77]) == text
    # Normalisation is T5's: compatibility characters are folded, blanks collapsed.
    assert trained.encode("  ﬁne   day") == trained.encode("fine day")


def test_training_is_deterministic_to_the_byte(texts: list[str], tmp_path: Path) -> None:
    models = [train_vocabulary(iter(texts), tmp_path / name, 300) for name in ("a", "sub/b")]
    first, second = (hashlib.sha256(model.read_bytes()).hexdigest() for model in models)
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "sub"]


def test_a_model_with_sentinels_of_its_own_needs_no_extra_ids(
    t5: Vocabulary, tmp_path: Path
) -> None:
    path = tmp_path / "own.model"
    path.write_bytes(t5._processor.serialized_model_proto())
    own = Vocabulary(path, extra_ids=0)
    assert (own.vocab_size, own.sentinels, own.sentinel(0)) == (32100, 100, 32099)


def test_bad_files_and_sizes_are_refused(tmp_path: Path, trained: Vocabulary) -> None:
    with pytest.raises(FileNotFoundError, match=r"no SentencePiece model at .*none\.model"):
        Vocabulary(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("hello")
    with pytest.raises(ElmError, match=r"text\.model is not a SentencePiece model$"):
        Vocabulary(tmp_path / "text.model")
    with pytest.raises(ElmError, match="extra_ids is -1"):
        Vocabulary(trained.path, extra_ids=-1)
    with pytest.raises(ElmError, match="too high"):
        train_vocabulary(["a b c"] * 9, tmp_path / "x", 1000)
    with pytest.raises(ElmError, match="there are none"):
        train_vocabulary([], tmp_path / "x", 100)
    assert not (tmp_path / "x.model").exists()


def test_other_special_ids_are_refused(tmp_path: Path) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four five"] * 20),
        model_writer=model,
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "llama.model").write_bytes(model.getvalue())
    with pytest.raises(ElmError, match=r"\(pad, eos, unk\) ids are \(-1, 2, 0\)"):
        Vocabulary(tmp_path / "llama.model")
