"""Several real processes on one run, and runs that are asked to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from elm_jax.errors import ElmError
from elm_jax.experts import ExpertStore, flatten
from elm_jax.training import distributed

ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("distributed")
    folders = tiny.tasks(root / "tasks", ["sentiment_inn", "sentiment_play"])
    return [
        sys.executable, "-m", "elm_jax.cli.main", "train",
        "--backbone", str(tiny.backbone(root / "tiny")), "--tasks", *folders,
        "--expert", "lora", "--expert-option", "rank=2", "--experts-per-step", "2",
        "--feature-lengths", "inputs=32", "targets=8", "--batch-size", "4",
        "--learning-rate", "0.01", "--checkpoint-every", "2", "--log-every", "2",
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(arguments: list[str], count: int, devices: int = 1) -> list[subprocess.Popen[str]]:
    port = free_port()
    flags = f"{ENVIRONMENT['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return [
        subprocess.Popen(
            [*arguments, "--distributed", f"127.0.0.1:{port}", "--process", f"{i}/{count}"],
            env={**ENVIRONMENT, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    ended = []
    for process in processes:
        out, err = process.communicate()
        ended.append((process.returncode, out, err))
    return ended


def arrays(store: Path) -> dict[str, np.ndarray]:
    opened = ExpertStore(store)
    return {
        f"{name}/{path}": array
        for name in opened.ids()
        for path, array in flatten(opened.load(name)[1]).items()
    }


def records(store: Path) -> list[dict]:
    [path] = (store / ".runs").glob("*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("alone") / "store"
    subprocess.run(
        [*arguments, "--steps", "6", "--store", str(store)],
        env=ENVIRONMENT, check=True, capture_output=True,
    )  # fmt: skip
    return store


def equal(store: Path, other: Path) -> None:
    found, wanted = arrays(store), arrays(other)
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_allclose(found[path], array, atol=2e-4, err_msg=path)


@pytest.mark.parametrize(
    ("count", "devices", "mesh"), [(2, 1, "fsdp=2"), (2, 2, "data=2,tensor=2")]
)
def test_processes_train_what_one_trains(
    count: int, devices: int, mesh: str, arguments: list[str], alone: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    command = [*arguments, "--steps", "6", "--store", str(store), "--mesh", *mesh.split(",")]
    ended = finish(start(command, count, devices))
    assert [code for code, _, _ in ended] == [0] * count, ended
    assert ["sentiment_inn" in out for _, out, _ in ended] == [True, False]  # one speaks for all
    equal(store, alone)
    for one, two in zip(records(store), records(alone), strict=True):
        assert one["step"] == two["step"] and one["loss"] == pytest.approx(two["loss"], abs=1e-4)
    assert ExpertStore(store).verify("sentiment_inn") == []


def test_sigterm_ends_all_with_a_checkpoint_that_another_number_goes_on_from(
    arguments: list[str], tmp_path: Path
) -> None:
    stores = {name: tmp_path / name for name in ("whole", "cut")}
    command = [*arguments, "--steps", "40"]
    cut = [*command, "--store", str(stores["cut"]), "--mesh", "data=2"]
    processes = start(cut, 2)
    wait_for_a_checkpoint(stores["cut"], processes)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [code for code, _, _ in ended] == [75, 75], ended
    assert all("asked to stop" in err for _, _, err in ended)
    assert ExpertStore(stores["cut"]).ids() == []
    # One process goes on from what two have written.
    for store in stores.values():
        subprocess.run(
            [*command, "--store", str(store)], env=ENVIRONMENT, check=True, capture_output=True
        )
    equal(stores["cut"], stores["whole"])
    steps = [record["step"] for record in records(stores["cut"])]
    assert steps == sorted(set(steps)) and steps[-1] == 40  # each once, though cut in two


def wait_for_a_checkpoint(store: Path, processes: list[subprocess.Popen[str]]) -> None:
    while not list((store / ".runs").glob("*/checkpoints/[0-9]*")):
        if any(process.poll() is not None for process in processes):
            pytest.fail(f"ended before its first checkpoint: {finish(processes)}")
        time.sleep(0.1)


def test_one_process_stops_and_a_second_run_on_its_folder_is_refused(
    arguments: list[str], tmp_path: Path
) -> None:
    command = [*arguments, "--steps", "3000", "--store", str(tmp_path / "store")]
    first = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_a_checkpoint(tmp_path / "store", [first])
    second = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert second.returncode == 1 and "is in use by another run" in second.stderr, second.stderr
    assert f"process {first.pid}" in second.stderr
    first.send_signal(signal.SIGTERM)
    [(code, _, err)] = finish([first])
    assert code == 75 and "the same command goes on from there" in err


def test_a_coordinator_that_never_answers() -> None:
    code = (
        "from elm_jax.training import distributed\n"
        f"distributed.initialize('127.0.0.1:{free_port()}', (1, 2), timeout=3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "did not meet within 3 s (process 1 of 2" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("how", "process", "said"),
    [
        ("slrum", None, "did you mean 'slurm'"),
        ("slurm", None, "SLURM_JOB_ID is not set"),
        ("host:port", None, "expected HOST:PORT"),
        ("10.0.0.1:1234", None, "needs --process"),
        ("10.0.0.1:1234", (2, 2), "0 <= I < N, got 2/2"),
        ("none", (0, 2), "needs --distributed HOST:PORT"),
    ],
)
def test_bad_ways(
    how: str, process: tuple[int, int] | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ElmError) as raised:
        distributed.initialize(how, process)
    assert said in str(raised.value)
