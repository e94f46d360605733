"""Int8 kernels: the grid, the products and their gradients, training and scoring on top."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_jax.checkpoints import (
    Backbone,
    fold_expert,
    initialize,
    load_backbone,
    quantize_backbone,
    save_backbone,
    to_huggingface,
)
from elm_jax.cli.main import main
from elm_jax.decoding import GenerationConfig, choice_log_probs, generate, mixed_choice_log_probs
from elm_jax.errors import ElmError
from elm_jax.experts import (
    ExpertStore,
    bind_variables,
    expert_shapes,
    flatten,
    init_expert,
    logical_axes,
)
from elm_jax.experts.apply import backbone_shapes
from elm_jax.models import T5, ExpertSpec, T5Config, get_spec
from elm_jax.models.quantize import (
    dequantize_kernel,
    int8_matmul,
    is_quantized,
    quantize_kernel,
)
from elm_jax.training import OptimizerSpec, RunConfig, TrainState, make_mesh, make_optimizer
from elm_jax.training.experts import TrainingOptions, train_experts
from elm_jax.training.sharding import shardings
from elm_jax.training.step import make_train_step

CONFIG = T5Config(
    vocab_size=50, emb_dim=32, num_heads=3, head_dim=8, mlp_dim=40,
    num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.0,
)  # fmt: skip
LORA = get_spec("lora", rank=2, targets=("q", "k", "v", "o", "wi", "wo"))
FLOAT = initialize(CONFIG, 0)
INT8 = quantize_backbone(FLOAT)


def dequantized(backbone: Backbone) -> dict:
    """The float32 weights that an int8 backbone stands for, under the float config's names."""
    arrays = flatten(backbone.params)
    out: dict = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        if name == "kernel_scale":
            continue
        if f"{path}_scale" in arrays:
            array = dequantize_kernel(array, arrays[f"{path}_scale"])
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return out


def expert(spec: ExpertSpec, seed: int = 1) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: rng.normal(0, 0.1, s.shape).astype(np.float32), expert_shapes(CONFIG, spec)
    )


def batch() -> tuple[np.ndarray, np.ndarray]:
    made = tiny.batch(np.random.default_rng(0), CONFIG)
    return made["encoder_input_tokens"], made["decoder_input_tokens"]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(1, 1), (7, 5), (64, 9)]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
)
def test_no_value_moves_more_than_half_a_step(
    seed: int, shape: tuple[int, int], size: float
) -> None:
    rng = np.random.default_rng(seed)
    kernel = (rng.standard_normal(shape) * size * rng.choice([0, 1, 1e-3], shape[1])).astype("f4")
    steps, scale = quantize_kernel(kernel)
    assert steps.dtype == np.int8 and scale.dtype == np.float32
    assert steps.shape == shape and scale.shape == shape[1:]
    moved = np.abs(dequantize_kernel(steps, scale).astype("f8") - kernel)
    assert (moved <= scale.astype("f8") * 0.5 * (1 + 1e-4)).all()
    np.testing.assert_allclose(
        np.abs(kernel).max(0), np.where(steps.any(0), scale * 127.5, 0), 1e-6
    )
    for ours, theirs in zip(quantize_kernel(jnp.asarray(kernel)), (steps, scale), strict=True):
        # XLA may divide by a constant as a product with its inverse: one step at a tie.
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1 if ours.dtype == jnp.int8 else 0)


def test_equals_qwix() -> None:
    qwix = pytest.importorskip("qwix")
    kernel = np.random.default_rng(0).standard_normal((33, 17)).astype(np.float32)
    theirs = qwix.quantize(jnp.asarray(kernel), "int8", channelwise_axes=[1])
    steps, scale = quantize_kernel(jnp.asarray(kernel))
    np.testing.assert_array_equal(steps, theirs.qvalue)
    np.testing.assert_allclose(scale, theirs.scale[0], rtol=1e-6)


def test_only_matrices_of_blocks_are_quantized() -> None:
    found = {path: str(leaf.dtype) for path, leaf in flatten(INT8.params).items()}
    int8 = {path for path, dtype in found.items() if dtype == "int8"}
    # The encoder layer has 4 + 3 kernels, the decoder layer 8 + 3.
    assert len(int8) == 7 + 11 and all(is_quantized(path) for path in int8)
    assert {path for path in found if path.endswith("_scale")} == {f"{p}_scale" for p in int8}
    untouched = set(found) - int8 - {f"{path}_scale" for path in int8}
    assert {path.rpartition("/")[2] for path in untouched} == {
        "embedding", "rel_embedding", "scale", "kernel",
    }  # fmt: skip
    assert [p for p in untouched if p.endswith("/kernel")] == ["decoder/logits_dense/kernel"]
    assert INT8.fingerprint == FLOAT.fingerprint and INT8.name == FLOAT.name
    assert INT8.config == CONFIG.replace(quantization="int8")


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("spec", [None, LORA], ids=["none", "lora"])
def test_logits_are_those_of_the_rounded_weights(spec: ExpertSpec | None, scan: bool) -> None:
    quantized = quantize_backbone(FLOAT.run_as(scan_layers=scan))
    one = expert(spec) if spec is not None else None
    if spec is not None and scan:
        spec, one = get_spec("adapter", bottleneck=2), None  # and another kind
    if one is None and spec is not None:
        one = init_expert(quantized.config, spec, jax.random.key(0))
        plain = init_expert(CONFIG, spec, jax.random.key(0))
    else:
        plain = one
    inputs, targets = batch()
    logits = jax.jit(T5(quantized.config, spec).apply)(
        bind_variables(spec, quantized.params, one), inputs, targets
    )
    apply = jax.jit(T5(CONFIG, spec).apply)
    rounded, original = (
        apply(bind_variables(spec, params, plain), inputs, targets)
        for params in (dequantized(INT8), FLOAT.params)
    )
    np.testing.assert_allclose(logits, rounded, rtol=1e-4, atol=1e-4)
    difference = np.abs(np.asarray(logits) - original).max() / np.asarray(original).std()
    assert 1e-4 < difference < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_and_its_gradient(dtype: str) -> None:
    rng = np.random.default_rng(0)
    steps, scale = quantize_kernel(rng.standard_normal((24, 16)).astype(np.float32))
    x = jnp.asarray(rng.standard_normal((3, 5, 24)), dtype)
    kernel = jnp.asarray(dequantize_kernel(steps, scale))
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]

    def ours(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(int8_matmul(x, steps, scale).astype(jnp.float32)))

    def plain(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(x.astype(jnp.float32) @ kernel))

    product = int8_matmul(x, steps, scale)
    assert product.dtype == x.dtype
    np.testing.assert_allclose(
        product.astype(np.float32),
        x.astype(np.float32) @ kernel,
        rtol=tolerance,
        atol=tolerance * 5,
    )
    gradient = jax.jit(jax.grad(ours))(x)
    assert gradient.dtype == x.dtype
    np.testing.assert_allclose(
        gradient.astype(np.float32), jax.grad(plain)(x), rtol=tolerance, atol=tolerance * 10
    )
    stacked = jax.vmap(jax.grad(ours))(jnp.stack([x, -x]))  # a stack of experts, one kernel
    np.testing.assert_allclose(
        stacked[0].astype(np.float32), gradient.astype(np.float32), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("spec", "remat"), [(LORA, "none"), (get_spec("elm_code"), "minimal")], ids=["lora", "adapter"]
)
def test_gradient_is_that_of_the_rounded_weights(spec: ExpertSpec, remat: str) -> None:
    inputs, targets = batch()

    def gradient(config: T5Config, params: dict) -> dict:
        def loss(one: dict) -> jax.Array:
            logits = T5(config, spec).apply({"params": params, "expert": one}, inputs, targets)
            return jnp.sum(jax.nn.log_softmax(logits)[..., 7])

        return jax.jit(jax.grad(loss))(expert(spec))

    ours = flatten(gradient(INT8.config.replace(remat=remat), INT8.params))
    plain = flatten(gradient(CONFIG, dequantized(INT8)))
    largest = max(float(jnp.abs(leaf).max()) for leaf in plain.values())
    for path, leaf in plain.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-3, atol=1e-5 * largest, err_msg=path)


@pytest.mark.parametrize("what", ["training", "generation"])
def test_float_kernels_are_never_all_in_memory(what: str) -> None:
    """Neither ahead of a loop over tokens, nor kept from the forward to the backward pass."""
    config = CONFIG.replace(emb_dim=64, mlp_dim=1024, num_encoder_layers=4, num_decoder_layers=4)
    inputs, targets = batch()

    def temporary(quantization: str | None) -> int:
        run_as = config.replace(scan_layers=True, quantization=quantization)
        model = T5(run_as, LORA)

        def train(params: dict, one: dict) -> jax.Array:
            def loss(one: dict) -> jax.Array:
                return jnp.sum(model.apply({"params": params, "expert": one}, inputs, targets))

            return jax.grad(loss)(one)

        def decode(params: dict, one: dict) -> jax.Array:
            variables = {"params": params, "expert": one}
            return generate(model, variables, inputs, GenerationConfig(max_new_tokens=4)).tokens

        run = jax.jit({"training": train, "generation": decode}[what])
        lowered = run.lower(backbone_shapes(run_as), expert_shapes(run_as, LORA))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    shapes = flatten(backbone_shapes(config))
    kernels = sum(4 * leaf.size for path, leaf in shapes.items() if is_quantized(path))
    assert temporary("int8") - temporary(None) < 0.25 * kernels


def test_rules_cover_the_scales() -> None:
    config = INT8.config
    axes = flatten(logical_axes(config, None)[0])
    for path, names in axes.items():
        if path.endswith("_scale"):
            assert tuple(names) == tuple(axes[path.removesuffix("_scale")])[1:]
    assert set(axes) == set(flatten(INT8.params))
    mesh = make_mesh()
    placed = shardings(mesh, logical_axes(config, None)[0], backbone_shapes(config))
    names = flatten(placed)
    assert names["encoder/layers_0/mlp/wi_0/kernel_scale"].spec == jax.sharding.PartitionSpec(
        "tensor"
    )
    assert names["encoder/layers_0/mlp/wo/kernel_scale"].spec == jax.sharding.PartitionSpec("fsdp")


def test_int8_is_in_no_state() -> None:
    optimizer = make_optimizer(OptimizerSpec(), 1)
    keys = jax.random.split(jax.random.key(0), 2)
    one = jax.vmap(lambda key: init_expert(INT8.config, LORA, key))(keys)
    state = TrainState(jnp.zeros((), jnp.int32), one, jax.vmap(optimizer.init)(one))
    made = tiny.batch(np.random.default_rng(0), CONFIG)
    stacked = {name: np.stack([x, x]) for name, x in made.items()}
    step = jax.jit(make_train_step(T5(INT8.config, LORA), LORA, optimizer))
    after, metrics = step(state, INT8.params, keys, stacked)
    for leaf in jax.tree.leaves(after):
        assert leaf.dtype != jnp.int8
    kernels = {leaf.shape for p, leaf in flatten(FLOAT.params).items() if is_quantized(p)}
    assert not kernels & {leaf.shape[1:] for leaf in jax.tree.leaves(after.opt_state)}
    assert np.isfinite(metrics["loss"]).all() and (np.asarray(metrics["grad_norm"]) > 0).all()


def test_mixed_batches_and_ranks_on_int8() -> None:
    inputs = np.random.default_rng(0).integers(2, 50, (4, 40)).astype(np.int32)
    choices = np.array([[[5, 6, 1], [7, 1, 0]]], np.int32).repeat(4, 0)
    stack = jax.tree.map(lambda *x: np.stack(x), expert(LORA, 1), expert(LORA, 2))
    places = np.array([1, 0, 2, 1])
    model = T5(INT8.config, LORA)
    scores, _ = mixed_choice_log_probs(model, INT8.params, stack, places, inputs, choices)
    zero = jax.tree.map(np.zeros_like, expert(LORA))
    for place, one in enumerate([expert(LORA, 1), expert(LORA, 2), zero]):
        alone, _ = choice_log_probs(
            T5(CONFIG, LORA), {"params": dequantized(INT8), "expert": one}, inputs, choices
        )
        rows = places == place
        np.testing.assert_allclose(scores[rows], alone[rows], rtol=1e-4, atol=1e-4)


def test_train_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, names = tmp_path / "tiny", tiny.tasks(tmp_path / "tasks", ["sentiment_inn"])
    backbone, store = tiny.backbone(folder), str(tmp_path / "store")
    common = ["--backbone", str(backbone), "--store", store, "--tasks", *names]
    train = [
        "train", *common, "--steps", "2", "--batch-size", "4", "--feature-lengths", "inputs=32",
        "targets=8",
    ]  # fmt: skip
    assert main([*train, "--quantize", "int8"]) == 0
    info, arrays = ExpertStore(store).load("sentiment_inn")
    assert info.settings["quantization"] == "int8"
    assert info.backbone["fingerprint"] == load_backbone(backbone).fingerprint
    assert {leaf.dtype for leaf in jax.tree.leaves(arrays)} == {np.dtype("float32")}
    assert main(train) != 0
    assert "was trained with another quantization (int8, now None)" in capsys.readouterr().err
    evaluate = ["evaluate", *common, "--with", "sentiment_inn", "--max-examples", "8"]
    assert main([*evaluate, "--output", str(tmp_path / "int8"), "--quantize", "int8"]) == 0
    assert "note:" not in capsys.readouterr().err
    assert main([*evaluate, "--output", str(tmp_path / "float")]) == 0
    assert "note: the backbone is not quantised; 1 experts" in capsys.readouterr().err
    found = next((tmp_path / "int8" / "scores").rglob("*.json")).read_text()
    assert '"quantization": "int8"' in found


def test_settings_of_a_float_run_are_unchanged(tmp_path: Path) -> None:
    """An expert that was trained before there was a quantisation counts as trained without."""
    backbone = load_backbone(tiny.backbone(tmp_path / "tiny"))
    names = tiny.tasks(tmp_path / "tasks", ["sentiment_inn"], train=4, test=1)
    options = TrainingOptions(train_steps=1, batch_size=2)
    run = RunConfig(train_steps=1)
    store = ExpertStore(tmp_path / "store", create=True)
    train_experts(backbone, names, store.path, options=options, run=run)
    path = store.path / "sentiment_inn" / "expert.json"
    text = path.read_text()
    assert '"quantization": null' in text
    path.write_text(text.replace(',\n    "quantization": null', ""))
    assert "quantization" not in store.info("sentiment_inn").settings
    outcome = train_experts(backbone, names, store.path, options=options, run=run)
    assert outcome[0].status == "there"


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ElmError, match="must be one of int8, got 'int4'"):
        quantize_backbone(FLOAT, "int4")
    with pytest.raises(ElmError, match="must be one of int8, got 'in8' .did you mean 'int8'"):
        T5Config(8, 2, 1, 2, 4, 1, 1, quantization="in8")
    with pytest.raises(ElmError, match="must be one of int8"):
        TrainingOptions(quantize="fp8")
    with pytest.raises(ElmError, match="is quantised to int8 already"):
        quantize_backbone(INT8)
    broken = jax.tree.map(lambda x: np.array(x), FLOAT.params)
    broken["decoder"]["layers_0"]["mlp"]["wo"]["kernel"][0, 0] = np.nan
    with pytest.raises(ElmError, match="'decoder/layers_0/mlp/wo/kernel': .* not finite"):
        quantize_backbone(dataclasses.replace(FLOAT, params=broken))
    full = get_spec("full")
    with pytest.raises(ElmError, match="`full` expert .* unquantised"):
        init_expert(INT8.config, full, jax.random.key(0))
    with pytest.raises(ElmError, match="`full` expert .* unquantised"):
        bind_variables(full, INT8.params, INT8.params)
    with pytest.raises(ElmError, match=r"is quantised \(int8\)"):
        save_backbone(INT8, tmp_path / "saved")
    with pytest.raises(ElmError, match=r"is quantised \(int8\)"):
        to_huggingface(INT8, tmp_path / "exported")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ElmError, match="quantised"):
        fold_expert(INT8, LORA, expert(LORA), "one")
    with pytest.raises(ElmError, match="then call quantize_backbone"):
        initialize(INT8.config, 0)
    with pytest.raises(ElmError, match="is quantised; cast it before"):
        INT8.cast("bfloat16")
    with pytest.raises(ElmError, match="'quantization' is no way to run"):
        FLOAT.run_as(quantization="int8")
