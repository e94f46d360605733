"""The loop: resume to the bit, divergence, what a run's folder accepts, an untouched backbone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from elm_jax.errors import ElmError, TrainingDiverged
from elm_jax.experts import ExpertStore, checksum, count_parameters, flatten, init_expert
from elm_jax.experts.apply import backbone_shapes
from elm_jax.models import T5Config, get_spec
from elm_jax.training import LossSpec, Member, OptimizerSpec, RunConfig, program, train_stack
from elm_jax.training.loop import expert_key
from elm_jax.training.metrics import MetricsWriter, read_metrics

CONFIG = T5Config(
    vocab_size=23, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24,
    num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.2,
)  # fmt: skip
SPEC = get_spec("adapter", bottleneck=4)
RUN = RunConfig(
    train_steps=6, optimizer=OptimizerSpec(learning_rate=0.05), log_every=2, checkpoint_every=3
)
MEMBERS = [Member(name, tiny.Stream(seed, CONFIG)) for seed, name in enumerate(("a", "b"))]


class Stop(Exception):
    """Ends a run from outside, as a kill would between two steps."""


@pytest.fixture(scope="module")
def params() -> dict:
    rng = np.random.default_rng(0)

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + rng.normal(0, 0.2, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, backbone_shapes(CONFIG))


def stop_at(wanted: int) -> Callable[..., None]:
    def progress(step: int, metrics: object) -> None:
        if step >= wanted:
            raise Stop

    return progress


def train(params: dict, folder: Path, run: RunConfig = RUN, **kwargs: object) -> list:
    return train_stack(
        CONFIG, params, SPEC, kwargs.pop("members", MEMBERS), run, folder=folder, **kwargs
    )


def test_outcome_and_untouched_backbone(params: dict, tmp_path: Path) -> None:
    before = checksum(params)
    seen: list[tuple[int, set]] = []
    trained = train(params, tmp_path, progress=lambda step, m: seen.append((step, set(m))))
    assert checksum(params) == before  # neither changed nor donated
    assert [t.id for t in trained] == ["a", "b"]
    fresh = init_expert(CONFIG, SPEC, expert_key(0, "a"))
    assert checksum(trained[0].params) != checksum(fresh) != checksum(trained[1].params)
    # records at 2, 4, 6 and, as a checkpoint is written there, at 3
    assert [row["step"] for row in trained[0].history] == [2, 3, 4, 6]
    assert set(trained[1].history[0]) == {"step", "loss", "accuracy", "grad_norm", "expert_norm"}
    assert [step for step, _ in seen] == [2, 3, 4, 6] and "loss" in seen[0][1]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]
    assert any((tmp_path / "tensorboard").iterdir())


def test_training_learns(params: dict, tmp_path: Path) -> None:
    class Same(tiny.Stream):
        def batch_at(self, step: int) -> dict:
            return super().batch_at(0)

    run = replace(RUN, train_steps=40, log_every=10, checkpoint_every=40)
    [trained] = train(params, tmp_path, run, members=[Member("a", Same(0, CONFIG))])
    assert trained.history[-1]["loss"] < 0.9 * trained.history[0]["loss"]


@pytest.mark.parametrize("stop", [2, 4])  # before and after the first checkpoint
def test_stopped_run_resumes_to_the_bit(params: dict, tmp_path: Path, stop: int) -> None:
    whole = train(params, tmp_path / "whole")
    with pytest.raises(Stop):
        train(params, tmp_path / "cut", progress=stop_at(stop))
    metrics = tmp_path / "cut/metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 5, "lo')  # torn by a kill
    resumed = train(params, tmp_path / "cut")
    assert [checksum(t.params) for t in resumed] == [checksum(t.params) for t in whole]
    assert [t.history for t in resumed] == [t.history for t in whole]
    assert [row["step"] for row in read_metrics(metrics)] == [2, 3, 4, 6]
    again = train(params, tmp_path / "cut", progress=stop_at(0))  # nothing is left to do
    assert [checksum(t.params) for t in again] == [checksum(t.params) for t in whole]


def test_member_is_the_same_in_any_stack(params: dict, tmp_path: Path) -> None:
    both = train(params, tmp_path / "both")
    [alone] = train(params, tmp_path / "alone", members=MEMBERS[1:])
    for path, leaf in flatten(alone.params).items():
        np.testing.assert_allclose(flatten(both[1].params)[path], leaf, rtol=1e-4, atol=1e-5)


def test_runs_alike_compile_once(
    params: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other experts, data and (at a constant rate) lengths of the run need no other step."""
    make, traced = program.make_train_step, []

    def make_counted(*args: object, **kwargs: object) -> Callable[..., object]:
        step = make(*args, **kwargs)

        def counted(*inputs: object) -> object:
            traced.append(jax.tree.leaves(inputs[3])[0].shape[0])  # X, of the batch
            return step(*inputs)

        return counted

    monkeypatch.setattr(program, "make_train_step", make_counted)
    program._functions.cache_clear()
    train(params, tmp_path / "one", members=MEMBERS[:1])
    train(params, tmp_path / "other", replace(RUN, train_steps=4), members=MEMBERS[1:])
    assert traced == [1]
    train(params, tmp_path / "both")
    assert traced == [1, 2]
    program._functions.cache_clear()


def test_state_on_disk_holds_no_backbone(params: dict, tmp_path: Path) -> None:
    train(params, tmp_path)
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.restore(tmp_path / "checkpoints/6/state")
    expert = count_parameters(tree["expert"])
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree["opt_state"])]
    assert sum(x.size for x in leaves) <= 2 * expert + 10  # two moments and counts
    assert expert < count_parameters(params)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"run": replace(RUN, seed=1)}, "seed"),
        ({"run": replace(RUN, optimizer=OptimizerSpec(learning_rate=0.01))}, "optimizer"),
        ({"run": replace(RUN, loss=LossSpec(label_smoothing=0.1))}, "loss"),
        ({"spec": get_spec("adapter", bottleneck=4, activation="gelu")}, "spec"),
        ({"config": CONFIG.replace(dropout_rate=0.0)}, "config"),
        ({"members": [MEMBERS[0], Member("b", tiny.Stream(9, CONFIG))]}, "members"),
    ],
)
def test_folder_of_another_run_is_refused(
    finished: Path, params: dict, change: dict, key: str
) -> None:
    arguments = {"config": CONFIG, "spec": SPEC, "members": MEMBERS, "run": RUN} | change
    with pytest.raises(ElmError, match=f"holds a run that differs in {key};"):
        train_stack(
            arguments["config"],
            params,
            arguments["spec"],
            arguments["members"],
            arguments["run"],
            folder=finished,
        )


@pytest.fixture(scope="module")
def finished(params: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(params, folder)
    return folder


def test_how_often_it_logs_is_not_part_of_a_run(finished: Path, params: dict) -> None:
    train(params, finished, replace(RUN, log_every=1, checkpoint_every=5, keep=1))


def assert_finite_checkpoints(folder: Path) -> None:
    with ocp.PyTreeCheckpointer() as reader:
        for step in sorted(folder.iterdir()):
            tree = reader.restore(step / "state")
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)), step


def test_divergence_names_expert_and_step(params: dict, tmp_path: Path) -> None:
    class Wild(tiny.Stream):
        """Token ids beyond the vocabulary from step 4 on: their embeddings are NaN."""

        def batch_at(self, step: int) -> dict:
            data = super().batch_at(step)
            data["encoder_input_tokens"] += 1000 * (step >= 4)
            return data

    members = [MEMBERS[0], Member("wild", Wild(1, CONFIG))]
    run = replace(RUN, train_steps=9, log_every=3, checkpoint_every=3)
    with pytest.raises(TrainingDiverged, match="expert 'wild': the loss is nan.*at step 5;") as e:
        train(params, tmp_path, run, members=members)
    assert f"{tmp_path / 'checkpoints'}: that of step 3 is kept;" in str(e.value)
    assert "\n" not in str(e.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert_finite_checkpoints(tmp_path / "checkpoints")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3]


def test_learning_rate_that_diverges(params: dict, tmp_path: Path) -> None:
    """The update of step 2 is beyond float32 while its loss and gradient are finite still."""
    fast = OptimizerSpec(learning_rate=3e38, warmup_steps=2, weight_decay=10.0)
    run = replace(RUN, optimizer=fast, log_every=1, checkpoint_every=1)
    with pytest.raises(TrainingDiverged, match="expert '[ab]'.*of the expert inf at step 2;"):
        train(params, tmp_path, run)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert_finite_checkpoints(tmp_path / "checkpoints")


def test_members_that_do_not_fit(params: dict, tmp_path: Path) -> None:
    with pytest.raises(ElmError, match=r"members with different ids, got \['a', 'a'\]"):
        train(params, tmp_path, members=[MEMBERS[0], MEMBERS[0]])
    longer = Member("longer", tiny.Stream(0, CONFIG, length=8))
    with pytest.raises(ElmError, match=r"encoder_input_tokens is \(4, 8\) for 'longer', \(4, 6\)"):
        train(params, tmp_path, members=[MEMBERS[0], longer])
    with pytest.raises(ElmError, match="keep must be at least 1, got 0"):
        replace(RUN, keep=0)
    for seed in (-1, 2**32):
        with pytest.raises(ElmError, match="seed must be from 0"):
            replace(RUN, seed=seed)


def test_metrics_file(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 1 / step, "experts": {"a": {"loss": step}}})
    fresh = MetricsWriter(tmp_path, tensorboard=False)
    fresh.resume(2)
    assert fresh.history("a") == [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}]
    assert fresh.history("b") == []
    assert [row["step"] for row in read_metrics(fresh.path)] == [1, 2]
    with fresh.path.open("a") as file:
        file.write("{")
    with pytest.raises(ElmError, match=r"metrics.jsonl:3: broken JSON"):
        read_metrics(fresh.path)


def test_events_for_tensorboard(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with contextlib.closing(MetricsWriter(tmp_path)) as writer:
        for step in (5, 10):
            writer.write({"step": step, "loss": 1 / step, "experts": {"a": {"loss": step / 2}}})
    events = loader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [(5, 0.2), (10, 0.1)]
    assert [e.value for e in events.Scalars("a/loss")] == [2.5, 5.0]
    assert set(events.Tags()["scalars"]) == {"loss", "a/loss"}


def killed_when(command: list[str], seen: Callable[[], bool]) -> bool:
    """Starts a command and kills it as soon as something is seen; False if it ended before."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None and not seen():
                time.sleep(0.0005)
        finally:
            process.send_signal(signal.SIGKILL)
    return process.returncode == -signal.SIGKILL


def test_killed_training_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """SIGKILL before the first checkpoint, while one is written, and between two."""
    model = tiny.backbone(tmp_path / "model")
    tasks = tiny.tasks(tmp_path / "tasks", ["topic_room", "topic_shop"])

    def command(store: str) -> list[str]:
        options = "--steps 240 --batch-size 4 --experts-per-step 2 --log-every 1"
        return [
            sys.executable, "-m", "elm_jax.cli.main", "train", "--backbone", str(model),
            "--tasks", *tasks, "--store", str(tmp_path / store), *options.split(),
            "--expert-option", "bottleneck=4", "--checkpoint-every", "60",
            "--feature-lengths", "inputs=32", "targets=8", "--json",
        ]  # fmt: skip

    runs = tmp_path / "cut/.runs"

    def steps() -> int:
        files = list(runs.glob("*/metrics.jsonl"))
        return files[0].read_bytes().count(b"\n") if files else 0

    def checkpoints() -> list[str]:
        return [p.name for p in runs.glob("*/checkpoints/*")]

    assert killed_when(command("cut"), lambda: steps() >= 3)
    assert not [name for name in checkpoints() if name.isdigit()] and steps() < 60
    assert killed_when(command("cut"), lambda: any(not n.isdigit() for n in checkpoints()))
    assert killed_when(command("cut"), lambda: "120" in checkpoints() and steps() > 125)
    store = ExpertStore(tmp_path / "cut")
    assert store.ids() == []
    outputs = {
        name: json.loads(
            subprocess.run(command(name), check=True, capture_output=True, text=True).stdout
        )
        for name in ("cut", "whole")
    }
    assert outputs["cut"] == outputs["whole"]
    whole = ExpertStore(tmp_path / "whole")
    assert store.ids() == whole.ids() == ["topic_room", "topic_shop"]
    for name in store.ids():
        assert store.info(name).checksum == whole.info(name).checksum
        assert store.info(name).history == whole.info(name).history
    [records] = [read_metrics(path) for path in runs.glob("*/metrics.jsonl")]
    assert [row["step"] for row in records] == list(range(1, 241))
    assert store.leftovers() == [] and not list(runs.glob("*/checkpoints"))
    assert os.listdir(tmp_path / "cut") and whole.verify("topic_room") == []
