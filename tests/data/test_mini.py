from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from elm_jax.data import mini
from elm_jax.errors import ElmError

NAMES = [task.name for task in mini.TASKS]
# What a bag of words can tell; the others need the order of the words.
LEXICAL = [
    task.name
    for task in mini.TASKS
    if task.kind in ("sentiment", "topic")
    or task.name in ("inference_number", "inference_witness", "inference_rumour", "choice_tool")
    or task.name in ("choice_kind", "choice_sequel")
]
Example = dict[str, Any]


@pytest.fixture(scope="module")
def suite() -> dict[str, dict[str, list[Example]]]:
    return {name: {s: mini.examples(name, s) for s in mini.SIZES} for name in NAMES}


def words(example: Example) -> set[str]:
    return set(re.findall(r"[a-z]+", example["inputs"].lower()))


def naive_bayes(
    train: Sequence[Example], label: Callable[[Example], Any]
) -> Callable[[Example, Any], float]:
    """Returns a function which scores a label for an example by its bag of words."""
    totals = Counter(label(e) for e in train)
    counts = Counter((label(e), word) for e in train for word in words(e))

    def score(example: Example, candidate: Any) -> float:
        total = totals[candidate]
        likelihood = sum(
            math.log((counts[candidate, word] + 0.1) / (total + 1)) for word in words(example)
        )
        return math.log(total + 0.1) + likelihood

    return score


def label_index(example: Example) -> int:
    return example["answer_choices"].index(example["targets"][0])


def test_there_are_enough_tasks_kinds_and_prompts():
    train, unseen = mini.train_tasks(), mini.unseen_tasks()
    assert len(train) >= 16 and len({task.kind for task in train}) >= 5
    assert len(unseen) >= 8
    assert train + unseen == mini.TASKS and not set(train) & set(unseen)
    assert len(set(NAMES)) == len(NAMES)
    for task in mini.TASKS:
        assert len(set(task.prompts)) == 2
        assert task.name.startswith(task.kind + "_")


def test_unseen_tasks_have_training_tasks_of_their_ability_but_for_one():
    train = {task.name: task for task in mini.train_tasks()}
    for task in mini.unseen_tasks():
        assert all(train[name].kind == task.kind for name in task.related)
    assert [task.name for task in mini.unseen_tasks() if not task.related] == ["reckoning_coins"]
    assert not any(task.related for task in mini.train_tasks())
    generated = [task for task in mini.unseen_tasks() if not task.options]
    generated = [task for task in generated if not any(t.labels for t in task.templates)]
    assert {task.kind for task in generated} == {"extraction", "rewriting"}


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_well_formed(name, suite):
    for split, rows in suite[name].items():
        assert len(rows) == mini.SIZES[split]
        assert len({row["id"] for row in rows}) == len(rows)
        assert set(Counter(row["prompt"] for row in rows).values()) == {len(rows) // 2}
        for row in rows:
            assert set(row) == {"inputs", "targets", "answer_choices", "prompt", "id"}
            assert len(row["targets"]) == 1
            assert 12 <= len(row["inputs"].split()) <= 45, row["inputs"]
            if row["answer_choices"] is not None:
                assert row["targets"][0] in row["answer_choices"]
                assert len(set(row["answer_choices"])) == len(row["answer_choices"]) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_english_is_clean(name, suite):
    for row in suite[name]["train"]:
        for text in [row["inputs"], *row["targets"], *(row["answer_choices"] or [])]:
            assert not re.search(r"[{}]|  |\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text), text
        assert not re.search(r"^[a-z]|[.?!]\s[a-z]|\b(\w+) \1\b", row["inputs"]), row["inputs"]


@pytest.mark.parametrize("name", NAMES)
def test_no_test_example_is_in_train(name, suite):
    train = {row["inputs"] for row in suite[name]["train"]}
    train |= {row["inputs"] for row in mini.examples(name, "train", size=300, seed=7)}
    test = {row["inputs"] for row in suite[name]["test"]}
    assert len(test) == mini.SIZES["test"]
    assert not train & test


@pytest.mark.parametrize("name", ["topic_season", "extraction_place"])
def test_no_text_is_in_both_splits_under_two_prompts(name):
    """The prompts of these tasks put the passage first or last, so it can be cut out."""
    task = next(task for task in mini.TASKS if task.name == name)

    def texts(split):
        found = set()
        for row in mini.examples(name, split):
            template = next(t for t in task.templates if t.name == row["prompt"])
            pattern = re.escape(template.text).replace(r"\{text\}", "(?P<text>.*)")
            pattern = re.sub(r"\\\{\w+\\\}", ".*", pattern)
            found.add(re.fullmatch(pattern, row["inputs"])["text"])
        return found

    train, test = texts("train"), texts("test")
    assert len(train) == 400 and len(test) == 100 and not train & test


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_balanced(name, suite):
    for rows in suite[name].values():
        for prompt in {row["prompt"] for row in rows}:
            own = [row for row in rows if row["prompt"] == prompt]
            [(_, most)] = Counter(row["targets"][0] for row in own).most_common(1)
            assert most <= 0.6 * len(own)
        if rows[0]["answer_choices"]:
            by_position = Counter(label_index(row) for row in rows)
            assert max(by_position.values()) <= 0.6 * len(rows)


@pytest.mark.parametrize("name", LEXICAL)
def test_a_bag_of_words_learns_the_lexical_tasks(name, suite):
    correct, majority = [], []
    for prompt in {row["prompt"] for row in suite[name]["train"]}:
        train, test = (
            [row for row in suite[name][split] if row["prompt"] == prompt] for split in mini.SIZES
        )
        score = naive_bayes(train, lambda row: row["targets"][0])
        [(commonest, _)] = Counter(row["targets"][0] for row in train).most_common(1)
        for row in test:
            best = max(row["answer_choices"], key=lambda choice: score(row, choice))
            correct.append(best == row["targets"][0])
            majority.append(commonest == row["targets"][0])
    accuracy, floor = sum(correct) / len(correct), sum(majority) / len(majority)
    assert accuracy >= max(0.65, floor + 0.25)


@pytest.mark.parametrize(
    "name", ["sentiment_play", "sentiment_dinner", "topic_letter", "inference_rumour"]
)
def test_a_related_training_task_tells_about_an_unseen_one(name, suite):
    """These tasks share the order of their outcomes with the related ones."""
    task = next(task for task in mini.TASKS if task.name == name)
    rows = suite[name]["test"]

    def accuracy(related: str) -> float:
        score = naive_bayes(suite[related]["train"], label_index)
        best = (max(range(len(task.outcomes)), key=lambda k: score(row, k)) for row in rows)
        return sum(k == label_index(row) for k, row in zip(best, rows, strict=True)) / len(rows)

    assert max(map(accuracy, task.related)) >= 1 / len(task.outcomes) + 0.2


def test_a_smaller_size_is_a_prefix_of_a_larger():
    for name in NAMES[::5]:
        large = mini.examples(name, "train", size=120)
        assert mini.examples(name, "train", size=37) == large[:37]
        assert mini.examples(name, "train", size=0) == []


def test_seeds_differ():
    first, second = (mini.examples("topic_room", "train", size=20, seed=s) for s in (0, 1))
    assert not {row["inputs"] for row in first} & {row["inputs"] for row in second}
    assert not {row["id"] for row in first} & {row["id"] for row in second}


def test_texts_do_not_depend_on_the_process():
    program = (
        "import hashlib, json; from elm_jax.data import mini\n"
        "rows = [mini.examples(t.name, s, size=24) for t in mini.TASKS for s in mini.SIZES]\n"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    rows = [mini.examples(t.name, s, size=24) for t in mini.TASKS for s in mini.SIZES]
    assert digests == {hashlib.sha256(json.dumps(rows).encode()).hexdigest()}


def test_write(tmp_path):
    paths = mini.write(tmp_path / "data", tasks="unseen", train_size=8, test_size=4)
    unseen = [task.name for task in mini.unseen_tasks()]
    assert [p.relative_to(tmp_path / "data").as_posix() for p in paths] == [
        f"{name}/{split}.jsonl" for name in unseen for split in ("train", "test")
    ]
    assert sorted(p for p in (tmp_path / "data").rglob("*") if p.is_file()) == sorted(paths)
    for path in paths:
        split = path.stem
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        size = {"train": 8, "test": 4}[split]
        assert rows == mini.examples(path.parent.name, split, size=size)


def test_write_takes_one_task_and_replaces_its_files(tmp_path):
    mini.write(tmp_path, tasks="topic_room", train_size=4, test_size=4)
    train, _ = mini.write(tmp_path, tasks="topic_room", train_size=6, test_size=4)
    assert len(train.read_text().splitlines()) == 6


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(ElmError, match=r"'topic_seasons' \(did you mean 'topic_season'\?\)"):
        mini.examples("topic_seasons", "train")
    with pytest.raises(ElmError, match=r"'tests' .*\(did you mean 'test'\?\)|'tests', only"):
        mini.examples("topic_season", "tests")
    with pytest.raises(ElmError, match=r"did you mean 'unseen'\?"):
        mini.write("unused", tasks="unsen")


def test_a_wrong_size_is_told():
    with pytest.raises(ElmError, match="0 or more, got -1"):
        mini.examples("topic_season", "train", size=-1)


def test_an_exhausted_grammar_is_told(monkeypatch):
    prompt = mini.Prompt("only", "{text} Is it so?", ("yes",))
    task = mini.MiniTask(
        "topic_tiny", "topic", False, (prompt,), {"text": ("A", "B", "C")}, {"": {}}
    )
    monkeypatch.setattr(mini, "TASKS", (task,))
    with pytest.raises(ElmError, match="mini:topic_tiny: only [0-3] different train examples"):
        mini.examples("topic_tiny", "train", size=10)


def test_a_broken_grammar_is_told():
    prompt = mini.Prompt("only", "{text} Is it so?", ("yes",))
    with pytest.raises(ElmError, match=r"no words for \{nam\} \(did you mean 'name'\?\)"):
        mini.MiniTask("t", "topic", False, (prompt,), {"text": ("{nam}",)}, {"": {}})
    with pytest.raises(ElmError, match="1 labels for 2 outcomes"):
        mini.MiniTask("t", "topic", False, (prompt,), {"text": ("A",)}, {"a": {}, "b": {}})
    with pytest.raises(ElmError, match="does not show"):
        mini.MiniTask(
            "t", "topic", False, (mini.Prompt("p", "Hm?", ("yes",)),), {"text": ("A",)}, {"": {}}
        )
