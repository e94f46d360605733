"""Scanned layers: the same model over stacked arrays, and the way between the two layouts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.decoding import choice_log_probs, greedy_decode
from elm_jax.errors import ElmError
from elm_jax.experts.apply import bind_variables, expert_shapes, init_expert, logical_axes
from elm_jax.experts.tree import flatten, unflatten
from elm_jax.models import T5, ExpertSpec, LoraSpec, T5Config, get_spec
from elm_jax.models.scan import from_storage, stack_layers, to_storage, unstack_layers
from elm_jax.training.sharding import make_mesh, shardings

B, T, U, V = 3, 9, 7, 53
CONFIG = T5Config(
    vocab_size=V, emb_dim=16, num_heads=2, head_dim=5, mlp_dim=24,
    num_encoder_layers=2, num_decoder_layers=2,
)  # fmt: skip
SPECS: dict[str, ExpertSpec] = {
    "adapter": get_spec("adapter", bottleneck=4),
    "elm_code": get_spec("elm_code", bottleneck=4),
    "lora": LoraSpec(rank=3, targets=("q", "k", "v", "o", "wi", "wo")),
    "full": get_spec("full"),
}
CASES = [*SPECS, "per_layer"]


def case(name: str) -> tuple[T5Config, ExpertSpec | None]:
    """Returns the config and spec of a case."""
    if name == "per_layer":
        return CONFIG.replace(relative_attention_per_layer=True), None
    return CONFIG, SPECS[name]


def draw(shapes: Any, seed: int, scale: float) -> Any:
    """Returns normal noise in a tree's shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(np.float32), shapes)


@functools.cache
def trees(name: str) -> tuple[Any, Any]:
    """Returns random arrays of backbone and expert, per layer."""
    config, spec = case(name)
    params = draw(expert_shapes(config, get_spec("full")), 0, 0.3)
    return params, None if spec is None else draw(expert_shapes(config, spec), 1, 0.1)


@functools.cache
def tokens() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs, targets = (rng.integers(2, V, (B, n)).astype(np.int32) for n in (T, U))
    inputs[0, 5:] = targets[:, 0] = 0
    return inputs, targets


def variables(name: str, scan: bool) -> tuple[T5, Any]:
    """Returns the model of a case and its variables in either layout."""
    config, spec = case(name)
    config = config.replace(scan_layers=scan)
    params, expert = (t if t is None else from_storage(t, config) for t in trees(name))
    return T5(config, spec), bind_variables(spec, params, expert)


def both(name: str, *inputs: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Applies the model in both layouts."""

    def run(scan: bool) -> np.ndarray:
        model, arrays = variables(name, scan)
        return np.asarray(jax.jit(lambda v: model.apply(v, *inputs, **options))(arrays))

    return run(False), run(True)


def test_the_stacked_tree_has_the_names_of_scalable_t5() -> None:
    config = T5Config(11, 8, 2, 3, 16, 4, 5, scan_layers=True, relative_attention_per_layer=True)
    lora = LoraSpec(rank=2, targets=("q",), blocks=("encoder", "cross"))
    shapes = {p: x.shape for p, x in flatten(expert_shapes(config, get_spec("full"))).items()}
    assert shapes == {
        "token_embedder/embedding": (11, 8),
        "encoder/encoder/relpos_bias/rel_embedding": (4, 2, 32),
        "encoder/encoder/pre_attention_layer_norm/scale": (4, 8),
        "encoder/encoder/attention/query/kernel": (4, 8, 6),
        "encoder/encoder/attention/key/kernel": (4, 8, 6),
        "encoder/encoder/attention/value/kernel": (4, 8, 6),
        "encoder/encoder/attention/out/kernel": (4, 6, 8),
        "encoder/encoder/pre_mlp_layer_norm/scale": (4, 8),
        "encoder/encoder/mlp/wi_0/kernel": (4, 8, 16),
        "encoder/encoder/mlp/wi_1/kernel": (4, 8, 16),
        "encoder/encoder/mlp/wo/kernel": (4, 16, 8),
        "encoder/encoder_norm/scale": (8,),
        "decoder/decoder/relpos_bias/rel_embedding": (5, 2, 32),
        "decoder/decoder/pre_self_attention_layer_norm/scale": (5, 8),
        "decoder/decoder/self_attention/query/kernel": (5, 8, 6),
        "decoder/decoder/self_attention/key/kernel": (5, 8, 6),
        "decoder/decoder/self_attention/value/kernel": (5, 8, 6),
        "decoder/decoder/self_attention/out/kernel": (5, 6, 8),
        "decoder/decoder/pre_cross_attention_layer_norm/scale": (5, 8),
        "decoder/decoder/encoder_decoder_attention/query/kernel": (5, 8, 6),
        "decoder/decoder/encoder_decoder_attention/key/kernel": (5, 8, 6),
        "decoder/decoder/encoder_decoder_attention/value/kernel": (5, 8, 6),
        "decoder/decoder/encoder_decoder_attention/out/kernel": (5, 6, 8),
        "decoder/decoder/pre_mlp_layer_norm/scale": (5, 8),
        "decoder/decoder/mlp/wi_0/kernel": (5, 8, 16),
        "decoder/decoder/mlp/wi_1/kernel": (5, 8, 16),
        "decoder/decoder/mlp/wo/kernel": (5, 16, 8),
        "decoder/decoder_norm/scale": (8,),
        "decoder/logits_dense/kernel": (8, 11),
    }
    assert {p: x.shape for p, x in flatten(expert_shapes(config, lora)).items()} == {
        "encoder/encoder/attention/query/lora_a": (4, 8, 2),
        "encoder/encoder/attention/query/lora_b": (4, 2, 6),
        "decoder/decoder/encoder_decoder_attention/query/lora_a": (5, 8, 2),
        "decoder/decoder/encoder_decoder_attention/query/lora_b": (5, 2, 6),
    }


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_layers_one_by_one(name: str) -> None:
    one_by_one, scanned = both(name, *tokens())
    np.testing.assert_allclose(scanned, one_by_one, atol=1e-5)
    assert one_by_one.std() > 0.1  # else the tolerance would say nothing


def test_packed_examples() -> None:
    segments = np.sort(np.random.default_rng(1).integers(1, 4, (B, T)), axis=1).astype(np.int32)
    packed = {"encoder_segment_ids": segments, "decoder_segment_ids": segments[:, :U]}
    one_by_one, scanned = both("adapter", *tokens(), **packed)
    np.testing.assert_allclose(scanned, one_by_one, atol=1e-5)


@pytest.mark.parametrize("name", ["elm_code", "per_layer"])
def test_decoding_with_a_cache_of_stacked_layers(name: str) -> None:
    decoded = [
        greedy_decode(*variables(name, scan), tokens()[0], max_decode_len=5)
        for scan in (False, True)
    ]
    np.testing.assert_array_equal(*decoded)
    model, arrays = variables(name, True)
    start, inputs = jnp.zeros((B, 1), jnp.int32), jnp.asarray(tokens()[0])
    _, made = jax.eval_shape(
        lambda v: model.apply(
            v, start, 0, inputs, length=6, encoded=jnp.zeros((B, T, 16)),
            method="decode_step", mutable=["cache"],
        ),
        arrays,
    )  # fmt: skip
    cache = made["cache"]["decoder"]["decoder"]
    assert cache["self_attention"]["self_key"].shape == (2, B, 2, 6, 5)
    assert cache["encoder_decoder_attention"]["cross_value"].shape == (2, B, 2, T, 5)


def test_ranking_of_choices() -> None:
    choices = np.array([[[5, 6, 1], [5, 1, 0]]] * B, np.int32)
    scores = [
        choice_log_probs(*variables("lora", s), tokens()[0], choices)[0] for s in (False, True)
    ]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_gradients_stack_likewise() -> None:
    config, spec = case("lora")
    params, expert = trees("lora")

    def gradient(config: T5Config) -> Any:
        def loss(expert: Any) -> jax.Array:
            bound = bind_variables(spec, from_storage(params, config), expert)
            return jax.nn.logsumexp(T5(config, spec).apply(bound, *tokens()), axis=-1).mean()

        return jax.jit(jax.grad(loss))(from_storage(expert, config))

    scanned = config.replace(scan_layers=True)
    one_by_one = flatten(gradient(config))
    for path, g in flatten(to_storage(gradient(scanned), scanned)).items():
        np.testing.assert_allclose(g, one_by_one[path], atol=1e-6, rtol=1e-4, err_msg=path)


def test_each_layer_draws_its_own_dropout() -> None:
    # Every layer adds the same constant, through the bias of its adapter, to a state of zeros.
    spec = get_spec("elm_code", bottleneck=2)
    config = T5Config(V, 64, 1, 4, 4, 3, 1, dropout_rate=0.5, scan_layers=True)
    params = jax.tree.map(jnp.zeros_like, expert_shapes(config, get_spec("full")))
    expert = jax.tree.map(jnp.zeros_like, expert_shapes(config, spec))
    params["encoder"]["encoder_norm"]["scale"] += 1
    expert["encoder"]["encoder"]["mlp_adapter"]["up_bias"] += 1
    encode = functools.partial(
        T5(config, spec).apply, deterministic=False, rngs={"dropout": jax.random.key(0)},
        method="encode",
    )  # fmt: skip
    encoded: Any = jax.jit(encode)({"params": params, "expert": expert}, np.ones((1, 2), np.int32))
    levels = np.unique(np.round(encoded[0, 0], 4))
    assert len(levels) == 4  # a feature was kept in 0, 1, 2 or 3 layers


@pytest.mark.parametrize("name", ["elm_code", "lora", "full"])
def test_initial_experts_shapes_axes_and_shardings(name: str) -> None:
    config, spec = CONFIG.replace(scan_layers=True), SPECS[name]
    made, shapes = init_expert(config, spec, jax.random.key(0)), expert_shapes(config, spec)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, shapes)
    per_layer = expert_shapes(CONFIG, spec)
    assert jax.tree.map(jnp.shape, to_storage(made, config)) == jax.tree.map(jnp.shape, per_layer)
    stacked, single = logical_axes(config, spec), logical_axes(CONFIG, spec)
    for ours, theirs in zip(stacked, single, strict=True):
        for path, names in flatten(ours).items():
            stack, *rest = path.split("/")
            inside = rest[0] == stack
            one = flatten(theirs)["/".join([stack, "layers_0", *rest[1:]]) if inside else path]
            assert tuple(names) == (("layers", *one) if inside else tuple(one)), path
    assert flatten(shardings(make_mesh(), stacked[1], shapes)).keys() == flatten(shapes).keys()


def test_layers_of_an_initial_expert_differ() -> None:
    config = CONFIG.replace(scan_layers=True)
    made = init_expert(config, get_spec("lora"), jax.random.key(0))
    a = flatten(made)["encoder/encoder/attention/query/lora_a"]
    assert np.abs(a[0] - a[1]).max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_stacking_is_undone(name: str) -> None:
    config, _ = case(name)
    for tree in trees(name):
        if tree is not None:
            stacked = stack_layers(tree, config)
            back = unstack_layers(stacked, config)
            jax.tree.map(np.testing.assert_array_equal, back, tree)
            assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves((stacked, back)))


def test_trees_that_do_not_fit_are_refused() -> None:
    params, _ = trees("adapter")
    fewer = CONFIG.replace(num_decoder_layers=1)
    with pytest.raises(ElmError, match="decoder/layers_1 is one too many: .* 1 decoder layers"):
        stack_layers(params, fewer)
    with pytest.raises(ElmError, match="encoder/layers_2 is missing: .* 3 encoder layers"):
        stack_layers(params, CONFIG.replace(num_encoder_layers=3))
    with pytest.raises(ElmError, match=r"decoder/decoder/.*its first axis should hold 1 layers"):
        unstack_layers(stack_layers(params, CONFIG), fewer)
    flat = flatten(params)
    del flat["encoder/layers_1/mlp/wo/kernel"]
    with pytest.raises(ElmError, match="the layers of encoder differ"):
        stack_layers(unflatten(flat), CONFIG)
