"""The text form, its reader, and the vote."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_jax.errors import ElmError
from elm_jax.retrieval.text import TEXT_FORMATS, format_instance, read_texts, text_format
from elm_jax.retrieval.vote import Candidate, majority_vote


def test_text_form() -> None:
    assert (
        format_instance("Is {it} good?", ("yes", "no"))
        == "Answer Choices: yes|no, Instance: Is {it} good?"
    )
    assert format_instance("x") == format_instance("x", []) == "Answer Choices: None, Instance: x"


def test_the_ten_forms_of_the_paper() -> None:
    made = {name: format_instance("Is it good?", ["yes", "no"], name) for name in TEXT_FORMATS}
    assert made == {
        "choices_and_instance": "Answer Choices: yes|no, Instance: Is it good?",
        "labels_and_instance": "Answer Choices: yes, no, Instance: Is it good?",
        "instance": "Instance: Is it good?",
        "choices": "Answer Choices: yes|no",
        "labels": "Answer Choices: yes, no",
        "bare_instance": "Is it good?",
        "bare_choices": "yes|no",
        "bare_labels": "yes, no",
        "choices_sep_instance": "yes|no</s>Is it good?",
        "labels_sep_instance": "yes, no</s>Is it good?",
    }
    assert format_instance("x", None, "choices_sep_instance") == "None</s>x"
    assert format_instance("x", None, "labels_and_instance") == "Answer Choices: , Instance: x"
    with pytest.raises(ElmError, match="did you mean 'choices'"):
        text_format("choice")


def test_read_texts_takes_both_key_names_and_gzip(tmp_path: Path) -> None:
    rows = [
        {"inputs": "a", "answer_choices": ["p", "q"], "targets": ["p"]},
        {"input": "b\u2028c", "answer_choices": None},
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    expected = [
        "Answer Choices: p|q, Instance: a",
        "Answer Choices: None, Instance: b\u2028c",
    ]
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text(lines)
    packed.write_bytes(gzip.compress(lines.encode()))
    assert read_texts(plain) == read_texts(packed) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"inputs": "a"', "broken JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"text": "a"}', "needs 'inputs'"),
        ('{"inputs": "  "}', "needs 'inputs'"),
        ('{"inputs": "a", "answer_choices": "yes|no"}', "list of strings"),
        (r'{"inputs": "\ud800"}', "surrogate"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"inputs": "fine"}\n' + line + "\n")
    with pytest.raises(ElmError, match=message) as error:
        read_texts(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)


def test_missing_empty_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no instances file .*gone.jsonl"):
        read_texts(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ElmError, match="empty.jsonl holds no instances"):
        read_texts(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"inputs": "a"}\n' * 99)[:-9])
    with pytest.raises(ElmError, match="cut.jsonl.gz is truncated"):
        read_texts(tmp_path / "cut.jsonl.gz")


def test_most_votes_win_however_near_the_others_are() -> None:
    assert majority_vote(["far", "near", "far"], [0.1, 0.99, 0.1]) == (
        Candidate("far", 2, 0.1),
        Candidate("near", 1, 0.99),
    )


def test_ties_go_to_the_higher_sum_then_to_the_first_id() -> None:
    # Two votes each: b sums to 1.25, a to 1.0, c to 1.25. b and c tie again; b sorts first.
    ids = ["c", "a", "b", "a", "c", "b"]
    scores = [0.5, 0.5, 1.0, 0.5, 0.75, 0.25]
    assert [c.expert for c in majority_vote(ids, scores)] == ["b", "c", "a"]


def test_a_weighted_vote_and_the_first_found() -> None:
    ids, scores = ["far", "near", "far"], [0.1, 0.99, 0.1]
    assert majority_vote(ids, scores, rule="weighted")[0].expert == "near"
    ids, scores = ["b", "a", "a", "b"], [0.1, 0.9, 0.9, 0.1]
    assert majority_vote(ids, scores)[0].expert == "a"
    assert majority_vote(ids, scores, ties="first")[0].expert == "b"
    with pytest.raises(ElmError, match="accepted: majority, weighted"):
        majority_vote(ids, scores, rule="mean")


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3)), min_size=1, max_size=12))
def test_the_vote_is_the_brute_force_one(votes: list[tuple[str, int]]) -> None:
    ids, scores = zip(*votes, strict=True)
    experts = sorted(set(ids))
    counts = [ids.count(e) for e in experts]
    sums = [sum(s for i, s in votes if i == e) for e in experts]
    best = max(range(len(experts)), key=lambda i: (counts[i], sums[i], -i))
    assert majority_vote(ids, scores)[0].expert == experts[best]
    best = max(range(len(experts)), key=lambda i: (sums[i], -i))
    assert majority_vote(ids, scores, rule="weighted")[0].expert == experts[best]
    best = max(range(len(experts)), key=lambda i: (counts[i], -ids.index(experts[i])))
    assert majority_vote(ids, scores, ties="first")[0].expert == experts[best]


def test_a_vote_needs_queries_and_matching_lengths() -> None:
    with pytest.raises(ValueError, match="at least one query"):
        majority_vote([], [])
    with pytest.raises(ValueError, match="zip"):
        majority_vote(["a"], [0.1, 0.2])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-1, 1)), min_size=1, max_size=5))
def test_the_order_of_queries_does_not_matter(votes: list[tuple[str, float]]) -> None:
    outcomes = {majority_vote(*zip(*p, strict=True)) for p in itertools.permutations(votes)}
    assert len(outcomes) == 1
    (outcome,) = outcomes
    assert sum(candidate.votes for candidate in outcome) == len(votes)
