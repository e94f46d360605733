"""Experts under t5x's own scripts, and against the native loop; needs t5x."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import tiny

from elm_jax import gin_check, t5x
from elm_jax.checkpoints import load_backbone
from elm_jax.data import mini
from elm_jax.decoding import greedy_decode
from elm_jax.errors import ElmError
from elm_jax.experts import ExpertStore, bind_variables
from elm_jax.experts.store import ExpertInfo
from elm_jax.experts.tree import flatten
from elm_jax.gin_utils import gin_folder
from elm_jax.models import T5, AdapterSpec, FullSpec, LoraSpec, get_spec
from elm_jax.t5x.experts import (
    checkpoint_shapes,
    load_t5x_expert,
    read_arrays,
    save_t5x_expert,
    split,
)
from elm_jax.training import Member, OptimizerSpec, RunConfig, train_stack

if not t5x.is_available():
    pytest.skip("t5x is not installed", allow_module_level=True)

CONFIG = tiny.CONFIG.replace(dropout_rate=0.0)
TASK = "sentiment_play"


@dataclasses.dataclass(frozen=True)
class World:
    """A tiny backbone of ours, its gin file, and a task of eight rows."""

    folder: Path
    backbone: Path
    model: Path

    def bindings(self, name: str, **macros) -> list[str]:
        macros = {
            "TASKS": str(self.folder / TASK),
            "VOCABULARY_FILE": str(self.backbone),
            "INITIAL_CHECKPOINT_PATH": str(self.backbone),
            "BATCH_SIZE": 8,
            "TASK_FEATURE_LENGTHS": {"inputs": 128, "targets": 16},
            **macros,
        }
        lines = [f"{key} = {value!r}" for key, value in macros.items()]
        if name.startswith("train"):
            lines += [
                "train/utils.DatasetConfig.pack = False",
                "train/utils.DatasetConfig.shuffle = False",
            ]
        return lines

    def run(self, script: str, name: str, *files: str, **macros) -> None:
        """Does in this process what `python -m t5x.<script>` does with gin/t5x/<name>.gin."""
        import gin

        module = importlib.import_module(f"t5x.{script}")
        paths = [str(self.model), f"t5x/{name}.gin", *files, "t5x/folders.gin"]
        with gin_check.fresh_gin(module, gin_check.search_folders()):
            gin.parse_config_files_and_bindings(paths, self.bindings(name, **macros))
            function = {"train": "train", "eval": "evaluate", "infer": "infer"}[script]
            with gin.unlock_config():
                entry = gin.get_configurable(getattr(module, function))
            entry()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5x")
    backbone = tiny.backbone(folder / "tiny", dropout_rate=0.0)
    train, test = mini.examples(TASK, "train")[:8], mini.examples(TASK, "test")[:6]
    tiny.task(folder / TASK, {"train": train, "test": test})
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in CONFIG.to_json().items()}
    model = folder / "tiny.gin"
    model.write_text(
        "from __gin__ import dynamic_registration\nfrom elm_jax.models import config\n"
        + "".join(f"config.T5Config.{key} = {value!r}\n" for key, value in fields.items())
    )
    return World(folder, backbone, model)


@pytest.fixture(scope="module")
def sharded(world):
    """Two steps of `python -m t5x.train` on four devices, data and model parallel."""
    flags = [
        "partitioning.PjitPartitioner.num_partitions = None",
        "partitioning.PjitPartitioner.model_parallel_submesh = (1, 1, 1, 2)",
        *world.bindings("train", MODEL_DIR=str(world.folder / "sharded"), TRAIN_STEPS=2),
    ]
    done = subprocess.run(
        [
            sys.executable, "-m", "t5x.train", f"--gin_search_paths={gin_folder()}",
            f"--gin_file={world.model}", "--gin_file=t5x/train_prompt_expert.gin",
            "--gin_file=t5x/folders.gin", *(f"--gin_bindings={flag}" for flag in flags),
        ],
        env={
            **os.environ, "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4",
        },
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return world.folder / "sharded"


@pytest.mark.parametrize(
    ("binding", "said"),
    [
        ("specs.LoraSpec.rank = 2", None),
        ("LEARNIN_RATE = 0.1", "nothing reads the macro 'LEARNIN_RATE' .did you mean 'LEARNING_R"),
        ("INFER_MODE = 'score'", "nothing reads the macro 'INFER_MODE'"),  # another script's
        ("specs.AdapterSpec.bottleneck = 2", "nothing reads specs.AdapterSpec.bottleneck"),
    ],
)
def test_settings_that_nothing_reads_are_refused(binding, said, world, monkeypatch):
    """As gin itself takes them without a word."""
    import t5x.train

    import gin
    from elm_jax.t5x import strict

    files = ["t5x/train_prompt_expert.gin", "experts/lora.gin", "t5x/folders.gin"]
    files, bindings = [str(world.model), *files], [*world.bindings("train"), binding]
    bindings += ["MODEL_DIR = 'run'", "TRAIN_STEPS = 1"]
    given = {"gin_file": files, "gin_bindings": bindings, "gin_search_paths": []}
    monkeypatch.setattr(strict.flags, "FLAGS", types.SimpleNamespace(**given))
    with gin_check.fresh_gin(t5x.train, gin_check.search_folders()):
        gin.parse_config_files_and_bindings(files, bindings, finalize_config=False)
        if said is None:
            strict.check_settings()
        else:
            with pytest.raises(ElmError, match=said):
                strict.check_settings()


def close(a, b, **tolerance):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], err_msg=key, **tolerance)


def test_a_sharded_run_goes_on_with_the_expert_alone(world, sharded):
    """Two steps on 2 x 2 devices and two more on one, as four on one."""
    assert list(checkpoint_shapes(sharded / "checkpoint_2")) == ["expert"]
    resumed, straight = (str(world.folder / name) for name in ("resumed", "straight"))
    shutil.copytree(sharded, resumed)
    for folder in (resumed, straight):
        world.run("train", "train_prompt_expert", MODEL_DIR=folder, TRAIN_STEPS=4)
    spec, expert = load_t5x_expert(resumed, CONFIG)
    assert spec == AdapterSpec() and np.abs(flatten(expert)[UP]).max() > 1e-3
    close(expert, load_t5x_expert(straight, CONFIG)[1], atol=1e-5)


UP = "encoder/layers_0/mlp_adapter/up_kernel"


def test_eval_and_infer_agree_with_our_own_decoding(world, sharded):
    checkpoint = str(sharded / "checkpoint_2")
    output = world.folder / "eval"
    world.run("eval", "eval", CHECKPOINT_PATH=checkpoint, EVAL_OUTPUT_DIR=str(output))
    metrics = json.loads(next(output.glob("inference_eval/*-metrics.jsonl")).read_text())
    scored = world.folder / "infer"
    world.run(
        "infer", "infer", CHECKPOINT_PATH=checkpoint, INFER_OUTPUT_DIR=str(scored),
        INFER_MODE="score",
    )  # fmt: skip
    rows = [json.loads(line) for line in next(scored.glob("*-score.jsonl*1")).open()]

    spec, expert = load_t5x_expert(checkpoint, CONFIG)
    backbone = load_backbone(world.backbone)
    model, variables = T5(CONFIG, spec), bind_variables(spec, backbone.params, expert)
    from elm_jax.data.vocabulary import Vocabulary
    from elm_jax.decoding import choice_log_probs

    vocabulary = Vocabulary(backbone.vocabulary_path)
    predicted, expected = [], []
    for row in rows:
        texts = [row["inputs"][f"{name}_pretokenized"] for name in ("inputs", "targets")]
        inputs, targets = (np.array([[*vocabulary.encode(text), 1]]) for text in texts)
        scores, _ = choice_log_probs(model, variables, inputs, targets[:, None])
        expected.append(float(scores[0, 0]))
        tokens = greedy_decode(model, variables, inputs, max_decode_len=16)
        predicted.append(vocabulary.decode(np.asarray(tokens)[0]) == texts[1])
    assert len(rows) == 6
    np.testing.assert_allclose([row["score"] for row in rows], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["mean_log_likelihood"], np.mean(expected), rtol=1e-4)
    assert metrics["exact_match"] == 100 * np.mean(predicted)


def test_from_a_t5x_checkpoint_and_a_stored_expert(world, tmp_path):
    """Both ends of a start: the backbone and its step by t5x, the expert from a store."""
    import orbax.checkpoint as ocp

    params = {k: v for k, v in load_backbone(world.backbone).params.items()}
    params = jax.tree.map(lambda a: np.asarray(a, np.float32) + 1, params)
    initial = tmp_path / "t5x" / "checkpoint_7"
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(initial / "state", {"target": params, "state": {"step": np.int32(7)}})
    spec = get_spec("lora")
    _, expert = load_t5x_expert(
        save_t5x_expert(spec, _random(spec), CONFIG, tmp_path / "made"), CONFIG
    )
    info = ExpertInfo("one", spec, ("t",), ("p",), {"name": "tiny", "fingerprint": "none"})
    ExpertStore(tmp_path / "store", create=True).write(info, expert)
    world.run(
        "train", "train_prompt_expert", "experts/lora.gin",
        MODEL_DIR=str(tmp_path / "run"), TRAIN_STEPS=8, CHECKPOINT_PERIOD=1,
        INITIAL_CHECKPOINT_PATH=str(initial), SAVE_BACKBONE=True,
        INITIAL_EXPERT=str(tmp_path / "store" / "one"),
    )  # fmt: skip
    backbone, started = split(read_arrays(tmp_path / "run" / "checkpoint_7"))
    close(backbone, params, atol=0)
    close(started, expert, atol=0)


def _random(spec):
    from elm_jax.experts.apply import expert_shapes

    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: rng.normal(size=s.shape).astype(np.float32), expert_shapes(CONFIG, spec)
    )


def make_model(spec, optimizer_def, backbone, config=CONFIG, cls=None):
    """Returns the model object, t5x's partitioner, and the initializer of the run's state."""
    from t5x import partitioning

    from elm_jax.t5x.checkpoints import ExpertInitializer
    from elm_jax.t5x.models import ExpertModel
    from elm_jax.t5x.partitioning import logical_axis_rules

    model = (cls or ExpertModel)(config, spec, None, None, optimizer_def, seed=3, expert_id="one")
    partitioner = partitioning.PjitPartitioner(
        num_partitions=1, logical_axis_rules=logical_axis_rules()
    )
    initializer = ExpertInitializer(
        backbone=str(backbone), optimizer_def=optimizer_def,
        init_fn=model.get_initial_variables, input_shapes={}, partitioner=partitioner,
    )  # fmt: skip
    return model, partitioner, initializer


def make_trainer(spec, optimizer_def, folder, backbone):
    from t5x import trainer

    model, partitioner, initializer = make_model(spec, optimizer_def, backbone)
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    return trainer.Trainer(
        model, state, partitioner, eval_names=[], summary_dir=str(folder),
        train_state_axes=initializer.train_state_axes, rng=jax.random.PRNGKey(0),
        learning_rate_fn=lambda step: 0.0, num_microbatches=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "optimizer"),
    [
        (AdapterSpec(4), OptimizerSpec(learning_rate=1e-2, clip_norm=0.1, schedule="linear")),
        (LoraSpec(2), OptimizerSpec("adafactor", learning_rate=1e-2)),
        (FullSpec(), OptimizerSpec(learning_rate=1e-3, weight_decay=0.1)),
    ],
)
def test_the_native_loop_and_t5x_agree(spec, optimizer, world, tmp_path):
    """The same seed, batches and optimizer give the same losses over 50 steps."""
    from elm_jax.t5x.optimizers import ExpertOptimizer

    steps, stream = 50, tiny.Stream(0, CONFIG)
    run = RunConfig(steps, optimizer, seed=3, log_every=1)
    params = load_backbone(world.backbone).params
    [native] = train_stack(
        CONFIG, params, spec, [Member("one", stream)], run, folder=tmp_path / "native"
    )
    trainer = make_trainer(spec, ExpertOptimizer(optimizer, steps), tmp_path, world.backbone)
    futures = [trainer.train(iter([stream.batch_at(i)]), 1) for i in range(steps)]
    losses = [float(future.result()["loss"].value) for future in futures]
    backbone, expert = split(trainer.train_state.params)
    trainer.close()
    wanted = [record["loss"] for record in native.history]
    assert wanted[-1] < wanted[0] - 0.05
    np.testing.assert_allclose(losses, wanted, rtol=2e-5)
    close(expert, native.params, atol=2e-4)
    close(backbone, params, atol=0)


def test_frozen_weights_cost_no_gradient(world, tmp_path):
    """A clip outside the partition would need them all, but for the model's stop_gradient."""
    from t5x import trainer as t5x_trainer

    from elm_jax.t5x.models import ExpertModel
    from elm_jax.t5x.optimizers import AnyOptaxWrapper, ExpertOptimizer, partition

    class Unfrozen(ExpertModel):
        def variables(self, params):
            backbone, expert = split(params)
            return bind_variables(self.spec, backbone, expert)

    sizes = {"emb_dim": 64, "mlp_dim": 128, "num_encoder_layers": 2, "dropout_rate": 0.0}
    folder = tiny.backbone(tmp_path / "wide", **sizes)
    wide, spec = load_backbone(folder).config, AdapterSpec(4)
    batch = tiny.Stream(0, wide, rows=4, length=32).batch_at(0)

    def flops(optimizer_def, cls=ExpertModel):
        model, _, initializer = make_model(spec, optimizer_def, folder, wide, cls)
        state = initializer.global_train_state_shape

        def step(state, batch):
            return t5x_trainer.train_with_lr(state, batch, 0.0, jax.random.key(0), model, None)[0]

        analysis = jax.jit(step).lower(state, batch).compile().cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    clip = optax.clip_by_global_norm(1.0)
    outside = AnyOptaxWrapper(optax.chain(clip, partition(optax.adamw(1e-3))))
    ours, wasteful = flops(ExpertOptimizer(OptimizerSpec(), 1)), flops(outside, Unfrozen)
    assert ours < 0.75 * wasteful
    assert flops(outside) < 1.01 * ours


def test_axes_of_optimizer_states_that_t5x_does_not_know():
    from flax.core import freeze
    from t5x import train_state

    from elm_jax.t5x.models import ExpertModel
    from elm_jax.t5x.optimizers import AnyOptaxWrapper, partition

    inner = optax.chain(
        optax.scale_by_adam(),
        optax.inject_hyperparams(optax.adafactor, "min_dim_size_to_factor")(
            1e-3, min_dim_size_to_factor=4
        ),
    )
    model = ExpertModel(CONFIG, AdapterSpec(8, use_bias=True), None, None)
    optimizer_def = AnyOptaxWrapper(partition(inner))
    state = jax.eval_shape(
        lambda: train_state.FlaxOptimTrainState.create(
            optimizer_def, freeze(model.get_initial_variables(jax.random.PRNGKey(0), {}))
        )
    )
    axes = flatten(state.as_logical_axes().state_dict()["state"]["param_states"])
    path = "expert/encoder/layers_0/mlp_adapter/down_kernel"
    found = {key.split(f"/{path}")[0].split("/")[-1]: v for key, v in axes.items() if path in key}
    assert tuple(found["mu"]) == tuple(found["nu"]) == ("embed", "adapter")
    assert found["v_row"] is None and found["v_col"] is None and found["v"] is None
    biases = {
        k: v
        for k, v in axes.items()
        if k.endswith("mu/expert/encoder/layers_0/mlp_adapter/up_bias")
    }
    assert [tuple(names) for names in biases.values()] == [("embed",)]


def test_a_backbone_of_another_architecture_is_named(world, tmp_path):
    from elm_jax.t5x.checkpoints import RestoreExpert

    other = CONFIG.replace(mlp_dim=32)
    spec = AdapterSpec(4)
    saved = save_t5x_expert(spec, _random(spec), CONFIG, tmp_path / "run")
    held = {"target": checkpoint_shapes(saved), "state": {}}
    with pytest.raises(ElmError, match="has mlp_dim 24, but the model's is 32"):
        RestoreExpert(str(world.backbone), other)(held, {"target": {}})
    with pytest.raises(ElmError, match="holds no 'expert', only encoder"):
        RestoreExpert(str(world.backbone), CONFIG, spec)({"target": {"encoder": {}}}, held)
