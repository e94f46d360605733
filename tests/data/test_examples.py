"""Reading JSONL examples, finding tasks, sub-tasks by prompt, and answer choices."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from elm_jax.data import mini
from elm_jax.data.examples import (
    Example,
    TaskData,
    by_prompt,
    find_tasks,
    read_jsonl,
    with_answer_choices,
)
from elm_jax.errors import ElmError


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


ROW = {"inputs": "Is it?", "targets": "yes"}


# --- Reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["some.jsonl", "some.jsonl.gz"])
def test_rows_become_examples(tmp_path: Path, name: str) -> None:
    path = write(
        tmp_path / name,
        {
            "inputs": "Warm or cold?\n",
            "targets": ["warm", "hot"],
            "answer_choices": ["cold", " warm "],
            "prompt": "ask",
            "id": "x-1",
        },
        "",
        {"input": "Ünder?", "target": "no", "template": "t2", "answer_choices": None, "more": 1},
        {"inputs": "2 + 2?", "targets": "4", "id": 17},
    )
    assert read_jsonl(path) == [
        Example("Warm or cold?\n", ("warm", "hot"), ("cold", " warm "), "ask", "x-1"),
        Example("Ünder?", ("no",), None, "t2", "some:3"),
        Example("2 + 2?", ("4",), None, "default", "17"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"inputs": "a",', "broken JSON"),
        ("[1]", "a JSON object is expected, not list"),
        ("[" * 100_000, "broken JSON .*recursion"),
        ({"inputs": "cut \ud83d", "targets": "a"}, r"inputs holds '\\ud83d', half a surrogate"),
        (ROW | {"answer_choices": ["yes", "\udc00"]}, "answer_choices holds"),
        (ROW | {"prompt": "\ud800"}, "prompt holds"),
        ({"targets": "a"}, "no 'inputs' among the keys"),
        ({"inputz": "a", "targets": "a"}, r"no 'inputs' .* \(did you mean 'inputz'\?\)"),
        ({"inputs": "a"}, "no 'targets' among the keys"),
        ({"inputs": " ", "targets": "a"}, "inputs should be text, got ' '"),
        ({"inputs": 3, "targets": "a"}, "inputs should be text, got 3"),
        ({"inputs": "a", "targets": []}, "targets should be one or more strings"),
        ({"inputs": "a", "targets": ""}, "targets should be text, got ''"),
        ({"inputs": "a", "targets": ["a", None]}, "targets should be text, got None"),
        ({"inputs": "a", "targets": {"a": 1}}, "targets should be one or more strings"),
        (ROW | {"answer_choices": "yes"}, "answer_choices should be a list"),
        (ROW | {"answer_choices": []}, "answer_choices should be one or more strings"),
        (ROW | {"answer_choices": ["no", "maybe"]}, "target 'yes' is not in answer_choices"),
        (ROW | {"answer_choices": ["Yes", "no"]}, "did you mean 'Yes'"),
        (ROW | {"prompt": 3}, "prompt and id should be strings"),
        (ROW | {"id": ["a"]}, "prompt and id should be strings"),
    ],
)
def test_bad_rows_are_refused_with_their_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", ROW, "", row, ROW)
    with pytest.raises(ElmError, match=message) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:3: ") and "\n" not in str(caught.value)


def test_a_choice_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROW | {"answer_choices": ["no", "yes ", "no ", "yes", "no"]})
    assert read_jsonl(path)[0].answer_choices == ("no", "yes ")


@pytest.mark.parametrize("name", ["some.jsonl", "some.jsonl.gz"])
def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbf" + b"\r\n".join([json.dumps(ROW).encode()] * 2) + b"\r\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    assert [e.inputs for e in read_jsonl(path)] == ["Is it?"] * 2


@pytest.mark.parametrize("targets", ["yes", (), ["yes"]])
def test_targets_of_an_example_are_a_tuple(targets: Any) -> None:
    with pytest.raises(ElmError, match="a tuple of one or more is expected"):
        Example("Is it?", targets)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ElmError, match=r"empty\.jsonl: holds no examples"):
        read_jsonl(write(tmp_path / "empty.jsonl", "", " "))
    with pytest.raises(FileNotFoundError, match=r"no examples at .*did you mean 'empty\.jsonl'"):
        read_jsonl(tmp_path / "emty.jsonl")
    with pytest.raises(ElmError, match=r"\.jsonl or \.jsonl\.gz is expected"):
        read_jsonl(write(tmp_path / "rows.json", ROW))
    (tmp_path / "latin.jsonl").write_bytes(b'{"inputs": "\xe9"}')
    with pytest.raises(ElmError, match=r"latin\.jsonl:1: not UTF-8"):
        read_jsonl(tmp_path / "latin.jsonl")
    (tmp_path / "plain.jsonl.gz").write_text(json.dumps(ROW))
    with pytest.raises(ElmError, match=r"plain\.jsonl\.gz:1: damaged gzip file"):
        read_jsonl(tmp_path / "plain.jsonl.gz")


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.95])
def test_truncated_gzip_is_refused(tmp_path: Path, kept: float) -> None:
    path = write(tmp_path / "cut.jsonl.gz", *[ROW | {"id": str(n**5)} for n in range(3000)])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ElmError, match=r"cut\.jsonl\.gz:\d+: damaged gzip file"):
        read_jsonl(path)


# --- Tasks -----------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    root = tmp_path / "tasks"
    write(root / "beta/train.jsonl", ROW, ROW | {"prompt": "p/2"})
    write(root / "beta/test.jsonl.gz", ROW)
    write(root / "alpha/train.jsonl", ROW)
    write(root / "alpha/validation.jsonl", ROW)
    (root / "README.md").write_text("about")
    return root


def test_tasks_are_found_sorted_and_once(tasks: Path) -> None:
    found = find_tasks([f"{tasks}/beta", f"{tasks}/*"])
    assert [(task.name, task.splits) for task in found] == [
        ("alpha", ("train", "validation")),
        ("beta", ("train", "test")),
    ]
    assert [example.prompt for example in found[1].split("train")] == ["default", "p/2"]
    [slash] = find_tasks([f"{tasks}/beta/"])
    assert slash.name == "beta"


def test_a_link_names_a_task(tasks: Path) -> None:
    (tasks / "gamma").symlink_to(tasks / "beta")
    [task] = find_tasks([f"{tasks}/g*"])
    assert (task.name, task.splits) == ("gamma", ("train", "test"))


def test_splits_are_read_when_asked_for_and_once(tasks: Path) -> None:
    (tasks / "beta/test.jsonl.gz").write_bytes(b"broken")
    [beta] = find_tasks([f"{tasks}/beta"])
    train = beta.split("train")
    (tasks / "beta/train.jsonl").unlink()
    assert beta.split("train") is train
    with pytest.raises(ElmError, match="damaged gzip"):
        beta.split("test")


def test_a_missing_split_names_what_is_there(tasks: Path) -> None:
    beta = find_tasks([f"{tasks}/*"])[1]
    with pytest.raises(ElmError, match=r"no split 'validation'; .*beta holds test\.jsonl\.gz, tr"):
        beta.split("validation")
    with pytest.raises(ElmError, match=r"did you mean 'train'"):
        beta.split("trian")


def test_bad_patterns_are_refused(tasks: Path, tmp_path: Path) -> None:
    for pattern, message in (
        (f"{tasks}/betta", "no task matches .*did you mean 'beta'"),
        (f"{tasks}/x*", "no task matches"),
        (f"{tasks}/*.md", "no task matches"),
        ("/nowhere/at/all", "no task matches '/nowhere/at/all'"),
        ("mini:topic_wether", r"suite mini matches 'topic_wether' \(did you mean 'topic_weather'"),
        ("mini:unsen", "did you mean 'unseen'"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            find_tasks([f"{tasks}/alpha", pattern])
    (tasks / "empty").mkdir()
    for pattern, message in (
        (f"{tasks}/*", "empty is no task: neither train.jsonl nor test.jsonl"),
        (str(tasks), r"did you mean '.*tasks/\*'"),
        (f"{tasks}/beta/train.jsonl", "is a file; a task is a folder"),
    ):
        with pytest.raises(ElmError, match=message):
            find_tasks([pattern])
    write(tasks / "alpha/train.jsonl.gz", ROW)
    with pytest.raises(ElmError, match=r"both train\.jsonl and train\.jsonl\.gz"):
        find_tasks([f"{tasks}/alpha"])
    for patterns in cast(list[list[str]], [[], "mini"]):
        with pytest.raises(ElmError, match="list of at least one pattern"):
            find_tasks(patterns)


def test_two_tasks_of_one_name_are_refused(tasks: Path, tmp_path: Path) -> None:
    write(tmp_path / "other/beta/train.jsonl", ROW)
    with pytest.raises(ElmError, match=r"named 'beta': .*tasks/beta and .*other/beta"):
        find_tasks([f"{tasks}/*", f"{tmp_path}/other/*"])
    os.symlink(tasks / "beta", tmp_path / "beta")
    assert len(find_tasks([f"{tasks}/beta", f"{tmp_path}/beta"])) == 1


def test_the_embedded_suite_is_found_by_name() -> None:
    everything = find_tasks(["mini"])
    train, unseen = find_tasks(["mini:train"]), find_tasks(["mini:unseen"])
    names = [task.name for task in everything]
    assert names == sorted(task.name for task in mini.TASKS)
    assert sorted(task.name for task in train + unseen) == names
    assert {task.name for task in unseen} == {task.name for task in mini.unseen_tasks()}
    [one] = find_tasks([f"mini:{names[0]}"])
    rows = mini.examples(names[0], "test")
    assert [example.inputs for example in one.split("test")] == [row["inputs"] for row in rows]
    with pytest.raises(ElmError, match=f"mini:{names[0]} holds train, test"):
        one.split("validation")


def test_written_suite_reads_back_the_same(tmp_path: Path) -> None:
    mini.write(tmp_path, tasks="unseen")
    files, embedded = find_tasks([f"{tmp_path}/*"]), find_tasks(["mini:unseen"])
    for one, other in zip(files, embedded, strict=True):
        assert one.name == other.name and one.split("test") == other.split("test")


def test_shared_p3_loads_as_it_is(shared_data: Path) -> None:
    found = find_tasks([f"{shared_data}/p3/prompted/*"])
    assert len(found) == 33
    counts = {task.name: (len(task.split("train")), len(task.split("test"))) for task in found}
    assert counts["ag_news"] == (300, 120) and counts["super_glue-cb"] == (250, 120)
    assert sum(map(sum, counts.values())) == 12760
    example = found[1].split("train")[1]
    assert example.id == "ag_news|train|classify_with_choices_question_first|#52997"
    assert example.prompt == "classify_with_choices_question_first"


def test_by_prompt_divides_a_task(shared_data: Path) -> None:
    [task] = find_tasks([f"{shared_data}/p3/prompted/wiki_qa"])
    parts = by_prompt(task)
    assert list(parts) == sorted(parts) and len(parts) == 9
    for split in task.splits:
        pieces = [part.split(split) for part in parts.values() if split in part.splits]
        assert sorted(example.id for piece in pieces for example in piece) == sorted(
            example.id for example in task.split(split)
        )
    assert sum("train" in part.splits for part in parts.values()) == 8
    assert sum("test" in part.splits for part in parts.values()) == 7
    for name, part in parts.items():
        assert part.name == name
        for split in part.splits:
            assert {f"wiki_qa/{example.prompt}" for example in part.split(split)} == {name}


# --- Answer choices --------------------------------------------------------------------------


def examples(prompt: str, *targets: str) -> list[Example]:
    return [Example("?", (target,), None, prompt) for target in targets]


def test_auto_finds_closed_sets_prompt_by_prompt() -> None:
    train = [
        *examples("yes_no", "yes", "no", "yes ", "no"),
        *examples("true", "True", "False", "True", "False"),
        *examples("rare", "a", "a", "b"),
        *examples("single", "same", "same"),
        *examples("many", *"abcdeabcde"),
    ]
    test = [
        *examples("yes_no", "no"),
        *examples("true", "True"),
        *examples("rare", "a"),
        *examples("single", "same"),
        *examples("many", "a"),
        *examples("unknown", "a"),
        Example("?", ("x",), ("x", "y"), "many"),
    ]
    found = with_answer_choices(test, "auto", train=train, max_choices=4)
    assert [example.answer_choices for example in found] == [
        ("no", "yes"),
        ("False", "True"),
        None,
        None,
        None,
        None,
        ("x", "y"),
    ]
    assert with_answer_choices(test, "auto", train=train)[4].answer_choices == tuple("abcde")
    assert with_answer_choices(train, "auto")[0].answer_choices == ("no", "yes")


def test_auto_leaves_a_prompt_open_whose_test_targets_are_new() -> None:
    train = examples("p", "a", "b", "a", "b")
    assert [
        example.answer_choices
        for example in with_answer_choices(examples("p", "a", "c", "a"), "auto", train=train)
    ] == [None] * 3


def test_other_modes_keep_or_drop_choices() -> None:
    given = [Example("?", ("x",), ("x", "y")), Example("?", ("z",))]
    assert with_answer_choices(given, "given") == given
    assert [example.answer_choices for example in with_answer_choices(given, "none")] == [None] * 2
    with pytest.raises(ElmError, match="did you mean 'given'"):
        with_answer_choices(given, "givn")


def test_auto_on_shared_p3_ranks_the_closed_tasks(shared_data: Path) -> None:
    closed = {}
    for task in find_tasks([f"{shared_data}/p3/prompted/*"]):
        found = with_answer_choices(task.split("test"), "auto", train=task.split("train"))
        closed[task.name] = sum(example.answer_choices is not None for example in found) / len(
            found
        )
    for name in ("ag_news", "anli_r1", "dbpedia_14", "rotten_tomatoes", "super_glue-rte"):
        assert closed[name] == 1, name
    for name in ("xsum", "common_gen", "super_glue-copa", "web_questions"):
        assert closed[name] == 0, name


def test_the_room_imports_neither_tensorflow_nor_jax() -> None:
    code = (
        "import sys, elm_jax.data, elm_jax.data.tasks\n"
        "heavy = {'tensorflow', 'seqio', 'jax', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_task_data_is_plain_enough_to_make_by_hand() -> None:
    task = TaskData("mine", "memory", {"train": lambda: examples("p", "a")})
    assert task.split("train")[0].targets == ("a",)
    with pytest.raises(ElmError, match="memory holds train"):
        task.split("test")
