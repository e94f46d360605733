"""The training step: one expert by hand, several at once, and what must not matter."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import batch

from elm_jax.errors import ElmError
from elm_jax.experts import bind_variables, flatten, stack, unstack
from elm_jax.experts.apply import backbone_shapes, expert_shapes
from elm_jax.models import T5, ExpertSpec, T5Config, get_spec
from elm_jax.training import LossSpec, OptimizerSpec, TrainState, make_optimizer, make_train_step
from elm_jax.training.step import token_loss

CONFIG = T5Config(
    vocab_size=23, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24,
    num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.2,
)  # fmt: skip
SPECS = {
    "adapter": get_spec("adapter", bottleneck=4, up_init_stddev=0.1),
    "elm_code": get_spec("elm_code", bottleneck=4),
    "lora": get_spec("lora", rank=2, dropout_rate=0.1),
    "full": get_spec("full"),
}
# Adam divides by the gradient: a larger epsilon keeps rounding of tiny ones from being enlarged.
ADAMW = OptimizerSpec(learning_rate=0.01, eps=1e-3)


def draw(shapes: dict, seed: int, scale: float = 0.2) -> dict:
    """Random arrays, layer norms about 1."""
    rng = np.random.default_rng(seed)

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + rng.normal(0, scale, leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


BACKBONE = draw(backbone_shapes(CONFIG), 0)


def experts(spec: ExpertSpec, count: int) -> list[dict]:
    return [draw(expert_shapes(CONFIG, spec), 1 + seed, 0.05) for seed in range(count)]


def keys(count: int) -> jax.Array:
    return jnp.stack([jax.random.key(seed) for seed in range(count)])


def batches(count: int, seed: int = 0, **kwargs: int) -> list[dict]:
    return [batch(np.random.default_rng([seed, i]), CONFIG, **kwargs) for i in range(count)]


def start(optimizer: optax.GradientTransformation, trees: list[dict], step: int = 0) -> TrainState:
    stacked = jax.tree.map(jnp.asarray, stack(trees))
    return TrainState(jnp.int32(step), stacked, jax.vmap(optimizer.init)(stacked))


@functools.cache
def compiled(
    kind: str, optimizer: OptimizerSpec | None = None, dropout: float = 0.2, **kwargs: object
) -> tuple:
    spec = SPECS[kind]
    made = optax.sgd(1.0) if optimizer is None else make_optimizer(optimizer, 10)
    model = T5(CONFIG.replace(dropout_rate=dropout), spec)
    return made, jax.jit(make_train_step(model, spec, made, **kwargs))


def assert_close(one: dict, other: dict, **tolerance: float) -> None:
    for path, leaf in flatten(one).items():
        np.testing.assert_allclose(flatten(other)[path], leaf, err_msg=path, **tolerance)


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_equals_a_step_written_by_hand(kind: str) -> None:
    """jax.grad of the mean loss and optax, on one expert without a stack, dropout included."""
    spec, [expert], [data] = SPECS[kind], experts(SPECS[kind], 1), batches(1)
    optimizer, step = compiled(kind, replace(ADAMW, weight_decay=0.1))

    def apply(expert: dict) -> jax.Array:
        return T5(CONFIG, spec).apply(
            bind_variables(spec, BACKBONE, expert),
            data["encoder_input_tokens"],
            data["decoder_input_tokens"],
            deterministic=False,
            rngs={"dropout": jax.random.fold_in(jax.random.key(0), 5)},
        )

    answers = jax.jit(apply)(expert).argmax(-1)
    every_other = np.arange(answers.shape[1]) % 2 == 0
    data["decoder_target_tokens"] = np.where(
        every_other, answers, data["decoder_target_tokens"]
    ).astype(np.int32)  # so that there are hits

    def loss(expert: dict) -> jax.Array:
        log_p = jax.nn.log_softmax(apply(expert))
        picked = jnp.take_along_axis(log_p, data["decoder_target_tokens"][..., None], -1)[..., 0]
        return -(picked * data["decoder_loss_weights"]).sum() / data["decoder_loss_weights"].sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(expert)
    updates, _ = optimizer.update(grads, optimizer.init(expert), expert)
    state, metrics = step(start(optimizer, [expert], 5), BACKBONE, keys(1), stack([data]))
    assert_close(optax.apply_updates(expert, updates), unstack(state.expert, 0), atol=1e-6)
    assert int(state.step) == 6
    assert metrics["loss"][0] == pytest.approx(float(value), rel=1e-5)
    assert metrics["grad_norm"][0] == pytest.approx(float(optax.global_norm(grads)), rel=1e-4)
    assert metrics["expert_norm"][0] == pytest.approx(
        float(optax.global_norm(unstack(state.expert, 0))), rel=1e-5
    )
    weights = data["decoder_loss_weights"]
    accuracy = float(((answers == data["decoder_target_tokens"]) * weights).sum() / weights.sum())
    assert 0 < accuracy < 1
    assert metrics["accuracy"][0] == pytest.approx(accuracy, rel=1e-6)
    seen = (data["encoder_input_tokens"] > 0).sum() + (data["decoder_target_tokens"] > 0).sum()
    assert metrics["tokens"][0] == seen


@pytest.mark.parametrize(
    "kind, one_by_one", [("elm_code", False), ("lora", False), ("lora", True), ("full", False)]
)
def test_a_stack_equals_each_alone(kind: str, one_by_one: bool) -> None:
    """Three experts, their own batches and dropout, AdamW with clipping, three steps."""
    trees = experts(SPECS[kind], 3)
    optimizer, step = compiled(kind, replace(ADAMW, clip_norm=0.5), one_by_one=one_by_one)
    together = start(optimizer, trees)
    alone = [start(optimizer, [tree]) for tree in trees]
    for number in range(3):
        data = batches(3, number)
        together, metrics = step(together, BACKBONE, keys(3), stack(data))
        for i in range(3):
            alone[i], single = step(alone[i], BACKBONE, keys(3)[i : i + 1], stack(data[i : i + 1]))
            for name, value in single.items():
                np.testing.assert_allclose(metrics[name][i], value[0], rtol=1e-4, err_msg=name)
    for i in range(3):
        assert_close(unstack(alone[i].expert, 0), unstack(together.expert, i), atol=1e-5)
    moved = optax.global_norm(
        jax.tree.map(jnp.subtract, unstack(together.expert, 0), unstack(together.expert, 1))
    )
    assert moved > 0.1  # the members are not by chance the same


def test_clipping_is_per_expert() -> None:
    clipping = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    spec = SPECS["adapter"]
    step = jax.jit(make_train_step(T5(CONFIG, spec), spec, clipping))
    calm, wild = experts(spec, 2)
    wild = jax.tree.map(lambda x: 1e4 * x, wild)
    data = stack(batches(2))
    one, metrics = step(start(clipping, [calm, wild]), BACKBONE, keys(2), data)
    two, _ = step(start(clipping, [calm, calm]), BACKBONE, keys(2), data)
    assert metrics["grad_norm"][1] != metrics["grad_norm"][0]
    assert_close(unstack(two.expert, 0), unstack(one.expert, 0), atol=1e-7)
    change = jax.tree.map(jnp.subtract, unstack(one.expert, 0), calm)
    assert float(optax.global_norm(change)) == pytest.approx(0.01, rel=1e-3)


def test_accumulation_equals_one_batch() -> None:
    [expert], [data] = experts(SPECS["lora"], 1), batches(1, rows=8)
    spec = get_spec("lora", rank=2)
    model = T5(CONFIG.replace(dropout_rate=0.0), spec)
    results = []
    for accumulation in (1, 2):
        sgd = optax.sgd(0.5)
        step = jax.jit(make_train_step(model, spec, sgd, accumulation=accumulation))
        results.append(step(start(sgd, [expert]), BACKBONE, keys(1), stack([data])))
    (whole, metrics), (halves, others) = results
    assert_close(whole.expert, halves.expert, atol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-5, err_msg=name)
    with pytest.raises(ElmError, match="batch size 8 is not divisible by accumulation 3"):
        step = make_train_step(model, spec, sgd, accumulation=3)
        jax.eval_shape(step, start(sgd, [expert]), BACKBONE, keys(1), stack([data]))


def test_padding_and_masked_tokens_do_not_count() -> None:
    [expert], [data] = experts(SPECS["adapter"], 1), batches(1)
    optimizer, step = compiled("adapter", dropout=0.0)

    def run(changed: dict) -> tuple:
        state, metrics = step(start(optimizer, [expert]), BACKBONE, keys(1), stack([changed]))
        return unstack(state.expert, 0), metrics

    plain, metrics = run(data)
    padded, same = run({k: np.pad(v, ((0, 0), (0, 3))) for k, v in data.items()})
    assert_close(plain, padded, atol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(same[name], metrics[name], rtol=1e-5, err_msg=name)

    masked = dict(data, decoder_loss_weights=data["decoder_loss_weights"].copy())
    masked["decoder_loss_weights"][1:] = 0
    other = dict(masked, decoder_target_tokens=data["decoder_target_tokens"].copy())
    other["decoder_target_tokens"][1:] = 7
    assert_close(run(masked)[0], run(other)[0], atol=1e-7)
    assert run(masked)[1]["loss"] != pytest.approx(float(metrics["loss"][0]))

    nothing = dict(data, decoder_loss_weights=np.zeros_like(data["decoder_loss_weights"]))
    unmoved, metrics = run(nothing)
    assert_close(expert, unmoved, atol=0)
    assert metrics["loss"][0] == metrics["accuracy"][0] == 0


def test_token_loss_by_numpy() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 3, (2, 3, 7)), rng.integers(0, 7, (2, 3))
    smoothing, z_loss = 0.1, 0.01
    log_z = np.log(np.exp(logits).sum(-1))
    wanted = np.full((2, 3, 7), smoothing / 7)
    wanted[np.arange(2)[:, None], np.arange(3), targets] += 1 - smoothing
    expected = -(wanted * (logits - log_z[..., None])).sum(-1) + z_loss * log_z**2
    found = token_loss(jnp.float32(logits), jnp.asarray(targets), LossSpec(smoothing, z_loss))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    plain = token_loss(jnp.float32(logits), jnp.asarray(targets), LossSpec())
    by_optax = optax.softmax_cross_entropy_with_integer_labels(jnp.float32(logits), targets)
    np.testing.assert_allclose(plain, by_optax, rtol=1e-5)


def test_state_holds_no_backbone() -> None:
    spec = SPECS["adapter"]
    optimizer = make_optimizer(OptimizerSpec(), 10)
    state = start(optimizer, experts(spec, 2))
    allowed = {(2, *leaf.shape) for leaf in flatten(expert_shapes(CONFIG, spec)).values()}
    assert {leaf.shape for leaf in jax.tree.leaves(state)} <= allowed | {(), (2,)}
    scalars = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert scalars < sum(leaf.size for leaf in jax.tree.leaves(BACKBONE))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"label_smoothing": 1.0}, r"\[0, 1\), got 1.0"), ({"z_loss": -1}, "not be negative, got -1")],
)
def test_loss_out_of_range(fields: dict, message: str) -> None:
    with pytest.raises(ElmError, match=message):
        LossSpec(**fields)
