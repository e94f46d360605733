"""The model by itself: its tree, its experts, its cache, its gradients."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning

from elm_jax.experts.apply import bind_variables
from elm_jax.experts.tree import count_parameters, flatten, stack, unflatten
from elm_jax.models import T5, AdapterSpec, ExpertSpec, LoraSpec, T5Config, get_spec, t5

B, T, U, V = 3, 9, 7, 53
CONFIG = T5Config(
    vocab_size=V, emb_dim=24, num_heads=3, head_dim=5, mlp_dim=40,
    num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip
TIED = CONFIG.replace(logits_via_embedding=True, mlp_activations=("relu",), num_decoder_layers=2)
# Every place that an expert can sit in.
EVERYWHERE = LoraSpec(rank=3, alpha=5.0, targets=("q", "k", "v", "o", "wi", "wo"))
SPECS = {"adapter": get_spec("adapter"), "elm_code": get_spec("elm_code"), "lora": EVERYWHERE}


def tokens(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns padded inputs int32 [B, T] and shifted targets int32 [B, U]."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(2, V, (B, T)).astype(np.int32)
    targets = rng.integers(2, V, (B, U)).astype(np.int32)
    inputs[0, 5:] = 0
    targets[:, 0] = 0
    return inputs, targets


@functools.cache
def init(config: T5Config, spec: ExpertSpec | None) -> tuple[Any, Any]:
    """Returns random params (NumPy's: quicker than compiling `init`) and the initial expert."""
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("scale"):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        fan_in = shape[0] if path.endswith("kernel") else 1
        return rng.normal(0, fan_in**-0.5, shape).astype(np.float32)

    arrays = flatten(shapes(config, None)["params"])
    params = unflatten({path: draw(path, x.shape) for path, x in arrays.items()})
    if not isinstance(spec, AdapterSpec | LoraSpec):
        return params, None
    rngs = {"params": jax.random.key(0), "expert": jax.random.key(1)}
    ones = jnp.ones((1, 1), jnp.int32)
    expert = jax.jit(lambda: T5(config, spec).init(rngs, ones, ones)["expert"])()
    return params, jax.tree.map(np.asarray, expert)


def randomize(tree: Any, seed: int = 0, scale: float = 0.1) -> Any:
    """Returns normal noise in a tree's shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(np.float32), tree)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="deterministic")
def forward(
    config: T5Config, spec: ExpertSpec | None, variables: Any, *inputs: Any, **options: Any
) -> jax.Array:
    return T5(config, spec).apply(variables, *inputs, **options)


def logits(config: T5Config, spec: ExpertSpec | None, variables: Any, **options: Any) -> Any:
    """Returns the logits of `tokens()`."""
    return np.asarray(forward(config, spec, variables, *tokens(), **options))


def shapes(config: T5Config, spec: ExpertSpec | None) -> dict[str, Any]:
    ones = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    rngs = {"params": jax.random.key(0), "expert": jax.random.key(0)}
    return dict(jax.eval_shape(T5(config, spec).init, rngs, ones, ones))


# The tree


def test_the_whole_tree_of_one_layer() -> None:
    config = T5Config(
        vocab_size=11, emb_dim=8, num_heads=2, head_dim=3, mlp_dim=16,
        num_encoder_layers=1, num_decoder_layers=1,
    )  # fmt: skip
    variables = shapes(config, get_spec("adapter", bottleneck=4))
    assert {path: x.shape for path, x in flatten(variables["params"]).items()} == {
        "token_embedder/embedding": (11, 8),
        "encoder/relpos_bias/rel_embedding": (2, 32),
        "encoder/layers_0/pre_attention_layer_norm/scale": (8,),
        "encoder/layers_0/attention/query/kernel": (8, 6),
        "encoder/layers_0/attention/key/kernel": (8, 6),
        "encoder/layers_0/attention/value/kernel": (8, 6),
        "encoder/layers_0/attention/out/kernel": (6, 8),
        "encoder/layers_0/pre_mlp_layer_norm/scale": (8,),
        "encoder/layers_0/mlp/wi_0/kernel": (8, 16),
        "encoder/layers_0/mlp/wi_1/kernel": (8, 16),
        "encoder/layers_0/mlp/wo/kernel": (16, 8),
        "encoder/encoder_norm/scale": (8,),
        "decoder/relpos_bias/rel_embedding": (2, 32),
        "decoder/layers_0/pre_self_attention_layer_norm/scale": (8,),
        "decoder/layers_0/self_attention/query/kernel": (8, 6),
        "decoder/layers_0/self_attention/key/kernel": (8, 6),
        "decoder/layers_0/self_attention/value/kernel": (8, 6),
        "decoder/layers_0/self_attention/out/kernel": (6, 8),
        "decoder/layers_0/pre_cross_attention_layer_norm/scale": (8,),
        "decoder/layers_0/encoder_decoder_attention/query/kernel": (8, 6),
        "decoder/layers_0/encoder_decoder_attention/key/kernel": (8, 6),
        "decoder/layers_0/encoder_decoder_attention/value/kernel": (8, 6),
        "decoder/layers_0/encoder_decoder_attention/out/kernel": (6, 8),
        "decoder/layers_0/pre_mlp_layer_norm/scale": (8,),
        "decoder/layers_0/mlp/wi_0/kernel": (8, 16),
        "decoder/layers_0/mlp/wi_1/kernel": (8, 16),
        "decoder/layers_0/mlp/wo/kernel": (16, 8),
        "decoder/decoder_norm/scale": (8,),
        "decoder/logits_dense/kernel": (8, 11),
    }
    assert {path: x.shape for path, x in flatten(variables["expert"]).items()} == {
        "encoder/layers_0/mlp_adapter/down_kernel": (8, 4),
        "encoder/layers_0/mlp_adapter/up_kernel": (4, 8),
        "decoder/layers_0/mlp_adapter/down_kernel": (8, 4),
        "decoder/layers_0/mlp_adapter/up_kernel": (4, 8),
    }
    assert {x.dtype for x in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}


def test_tied_and_ungated_trees() -> None:
    paths = set(flatten(shapes(TIED, None)["params"]))
    assert "decoder/logits_dense/kernel" not in paths
    assert {p for p in paths if "layers_0/mlp/wi" in p} == {
        "encoder/layers_0/mlp/wi/kernel", "decoder/layers_0/mlp/wi/kernel"
    }  # fmt: skip


def test_parameter_paths_are_those_of_the_docstring() -> None:
    text = re.sub(r"\s", "", t5.__doc__.split("(t5x's):")[1]).rstrip(".")
    documented = set()
    for item in re.findall(r"(?:\{[^}]*\}|[^,{])+", text):
        prefix, _, group = item.partition("{")
        documented |= {prefix + name for name in group.rstrip("}").split(",")} if group else {item}
    paths = list(flatten(shapes(CONFIG, None)["params"]))
    for path in paths:
        assert any(path == d or path.startswith(d + "/") for d in documented), path
    for name in documented:
        assert any(path == name or path.startswith(name + "/") for path in paths), name


@pytest.mark.parametrize(
    "spec", [None, *SPECS.values(), get_spec("full")], ids=["none", *SPECS, "full"]
)
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_every_array_has_an_axis_name_for_each_dimension(config: T5Config, spec: Any) -> None:
    variables = shapes(config, spec)
    for collection in {"params", "expert"} & variables.keys():
        axes = flatten(partitioning.get_axis_names(variables[f"{collection}_axes"]))
        arrays = flatten(variables[collection])
        assert axes.keys() == arrays.keys()
        for path, array in arrays.items():
            assert len(axes[path]) == array.ndim, path
            assert all(isinstance(name, str) for name in axes[path]), path
            # A mesh axis can shard one dimension only.
            assert len(set(axes[path])) == array.ndim, path


def test_elm_code_has_the_published_size_at_xl() -> None:
    xl = T5Config(
        vocab_size=32128, emb_dim=2048, num_heads=32, head_dim=64, mlp_dim=5120,
        num_encoder_layers=24, num_decoder_layers=24,
    )  # fmt: skip
    expert = flatten(shapes(xl, get_spec("elm_code"))["expert"])
    norms = {p: x for p, x in expert.items() if p.endswith("scale_delta")}
    adapters = {p: x for p, x in expert.items() if p not in norms}
    places = {p.rsplit("/", 1)[0] for p in adapters}
    one = {p: x for p, x in adapters.items() if p.startswith("decoder/layers_23/mlp_adapter/")}
    assert len(places) == 96
    assert count_parameters(one) == 264_256
    assert count_parameters(adapters) == 25_368_576
    assert count_parameters(norms) == 249_856


# Experts


@pytest.mark.parametrize("spec", [get_spec("adapter"), EVERYWHERE], ids=["adapter", "lora"])
def test_adapter_and_lora_start_as_the_identity(spec: ExpertSpec) -> None:
    params, expert = init(CONFIG, spec)
    bare = logits(CONFIG, None, {"params": params})
    np.testing.assert_array_equal(logits(CONFIG, spec, {"params": params, "expert": expert}), bare)
    moved = {"params": params, "expert": randomize(expert)}
    assert np.abs(logits(CONFIG, spec, moved) - bare).max() > 1e-2


def test_full_starts_as_the_identity_and_adds_its_task_vector() -> None:
    params, expert = init(CONFIG, get_spec("full"))
    assert expert is None
    tau = randomize(params)
    bare = logits(CONFIG, None, {"params": params})
    zero = bind_variables(get_spec("full"), params, jax.tree.map(np.zeros_like, tau))
    np.testing.assert_array_equal(logits(CONFIG, get_spec("full"), zero), bare)
    moved = logits(CONFIG, get_spec("full"), bind_variables(get_spec("full"), params, tau))
    summed = jax.tree.map(lambda p, t: p + t, params, tau)
    np.testing.assert_array_equal(moved, logits(CONFIG, None, {"params": summed}))


def test_elm_code_starts_near_the_identity() -> None:
    spec = get_spec("elm_code")
    params, expert = init(CONFIG, spec)
    bare = logits(CONFIG, None, {"params": params})
    difference = np.abs(logits(CONFIG, spec, {"params": params, "expert": expert}) - bare).max()
    assert 0 < difference < 0.02 * np.abs(bare).max()


def test_an_expert_leaves_the_initial_backbone_alone() -> None:
    rngs = {"params": jax.random.key(0), "expert": jax.random.key(1)}

    def initial(spec: ExpertSpec | None) -> Any:
        init = jax.jit(functools.partial(T5(TIED, spec).init, method="encode"))
        return init(rngs, jnp.ones((1, 1), jnp.int32))["params"]

    bare, with_expert = initial(None), initial(get_spec("elm_code"))
    assert "encoder" in bare
    jax.tree.map(np.testing.assert_array_equal, with_expert, bare)


def test_lora_equals_merged_weights() -> None:
    params, expert = init(CONFIG, EVERYWHERE)
    expert = randomize(expert)
    merged, flat = dict(flatten(params)), flatten(expert)
    updates = {path.removesuffix("/lora_a") for path in flat if path.endswith("lora_a")}
    assert len(updates) == (4 + 3) + (8 + 3)
    for path in updates:
        a, b = flat[f"{path}/lora_a"], flat[f"{path}/lora_b"]
        merged[f"{path}/kernel"] = merged[f"{path}/kernel"] + EVERYWHERE.scale * a @ b
    applied = logits(CONFIG, EVERYWHERE, {"params": params, "expert": expert})
    by_hand = logits(CONFIG, None, {"params": unflatten(merged)})
    np.testing.assert_allclose(applied, by_hand, atol=2e-5)


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(bottleneck=4),
        AdapterSpec(bottleneck=4, sublayers=("self_attention", "mlp"), use_bias=True),
        AdapterSpec(bottleneck=4, placement="sequential", inner_residual=True, use_bias=True),
        AdapterSpec(bottleneck=4, placement="sequential", sublayers=("self_attention",)),
        AdapterSpec(bottleneck=4, sublayers=("mlp",), train_layer_norms=True),
    ],
    ids=["equation 3", "parallel both", "sequential residual", "sequential", "norms"],
)
def test_an_encoder_block_by_hand(spec: AdapterSpec) -> None:
    """One encoder layer in NumPy, adapter included."""
    params, expert = init(TIED, spec)
    expert = randomize(expert, scale=0.5)
    p = {k: np.asarray(v, np.float64) for k, v in flatten(params["encoder"]).items()}
    e = {k: np.asarray(v, np.float64) for k, v in flatten(expert["encoder"]).items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scale = p[f"{name}/scale"] + e.get(f"{name}/scale_delta", 0)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + TIED.layer_norm_epsilon) * scale

    def adapt(sublayer: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if sublayer not in spec.sublayers:
            return y
        w = {k.split("/")[-1]: v for k, v in e.items() if f"/{sublayer}_adapter/" in k}
        z = x if spec.placement == "parallel" else y
        a = np.maximum(z @ w["down_kernel"] + w.get("down_bias", 0), 0) @ w["up_kernel"]
        a = a + w.get("up_bias", 0) + (z if spec.inner_residual else 0)
        return y + a if spec.placement == "parallel" else a

    ids = tokens()[0][1]  # no padding
    x = np.asarray(params["token_embedder"]["embedding"], np.float64)[ids]
    h = norm(x, "layers_0/pre_attention_layer_norm")
    q, k, v = (
        (h @ p[f"layers_0/attention/{name}/kernel"]).reshape(T, 3, 5)
        for name in ("query", "key", "value")
    )
    offset = np.arange(T)[None, :] - np.arange(T)[:, None]  # key - query; under 8 each has a bucket
    bucket = np.where(offset > 0, 16 + offset, -offset)
    bucket[[0, -1], [-1, 0]] = 16 + 8, 8  # |offset| 8 begins the logarithmic half
    bias = p["relpos_bias/rel_embedding"][:, bucket]
    scores = np.exp(np.einsum("qnk,tnk->nqt", q, k) + bias)
    weights = scores / scores.sum(-1, keepdims=True)
    mixed = np.einsum("nqt,tnk->qnk", weights, v).reshape(T, 15)
    x = x + adapt("self_attention", h, mixed @ p["layers_0/attention/out/kernel"])
    h = norm(x, "layers_0/pre_mlp_layer_norm")
    y = np.maximum(h @ p["layers_0/mlp/wi/kernel"], 0) @ p["layers_0/mlp/wo/kernel"]
    x = norm(x + adapt("mlp", h, y), "encoder_norm")

    variables = {"params": params, "expert": expert}
    encode = jax.jit(functools.partial(T5(TIED, spec).apply, method="encode"))
    ours = encode(variables, ids[None])
    np.testing.assert_allclose(ours[0], x, atol=2e-5)


@pytest.mark.parametrize("name", SPECS)
def test_stacked_experts_equal_each_alone(name: str) -> None:
    spec = SPECS[name]
    params, expert = init(CONFIG, spec)
    experts = [randomize(expert, seed) for seed in range(3)]

    def apply(expert: Any) -> jax.Array:
        return T5(CONFIG, spec).apply({"params": params, "expert": expert}, *tokens())

    stacked = np.asarray(jax.jit(jax.vmap(apply))(stack(experts)))
    for one, expert in zip(stacked, experts, strict=True):
        alone = logits(CONFIG, spec, {"params": params, "expert": expert})
        np.testing.assert_allclose(one, alone, atol=2e-5)
    assert np.abs(stacked[0] - stacked[1]).max() > 1e-2


# Decoding and packing


@pytest.mark.parametrize(
    ("config", "name"),
    [(TIED, None), *((CONFIG, name) for name in SPECS)],
    ids=["none, tied", *SPECS],
)
def test_cached_steps_equal_teacher_forcing(config: T5Config, name: str | None) -> None:
    spec = SPECS[name] if name else None
    params, expert = init(config, spec)
    variables = {"params": params} | ({"expert": randomize(expert)} if name else {})
    model, (inputs, targets) = T5(config, spec), tokens()
    encoded = jax.jit(functools.partial(model.apply, method="encode"))(variables, inputs)
    forced = logits(config, spec, variables)

    @jax.jit
    def step(cache: Any, token: jax.Array, position: jax.Array, encoded: Any = None) -> Any:
        return model.apply(
            variables | cache, token, position, inputs,
            length=U + 2, encoded=encoded, method="decode_step", mutable="cache",
        )  # fmt: skip

    cache: Any = {}
    for i in range(U):
        first = {"encoded": encoded} if i == 0 else {}
        scores, cache = step(cache, targets[:, i : i + 1], i, **first)
        np.testing.assert_allclose(scores[:, 0], forced[:, i], atol=2e-5)


def test_later_targets_and_padding_change_nothing() -> None:
    params, _ = init(CONFIG, None)
    (inputs, targets), variables = tokens(), {"params": params}
    before = logits(CONFIG, None, variables)
    changed = targets.copy()
    changed[:, 4:] = 7
    after = forward(CONFIG, None, variables, inputs, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-2
    wider = np.pad(inputs, ((0, 0), (0, 3)))
    padded = forward(CONFIG, None, variables, wider, targets)
    np.testing.assert_allclose(padded, before, atol=1e-5)


def test_packed_examples_equal_separate_ones() -> None:
    spec = get_spec("adapter")
    params, expert = init(CONFIG, spec)
    variables = {"params": params, "expert": randomize(expert)}
    rng = np.random.default_rng(1)
    lengths = [(5, 3), (4, 4), (1, 2)]  # of inputs and targets
    examples = [[rng.integers(2, V, n) for n in pair] for pair in lengths]

    def row(parts: list[np.ndarray], length: int) -> np.ndarray:
        ids = np.concatenate(parts)
        return np.pad(ids, (0, length - len(ids)))[None].astype(np.int32)

    def pack(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return row(parts, 12), row([np.full(len(p), i) for i, p in enumerate(parts, 1)], 12)

    inputs, encoder_segments = pack([inputs for inputs, _ in examples])
    shifted = [np.r_[0, targets[:-1]] for _, targets in examples]
    targets, decoder_segments = pack(shifted)
    packed = np.asarray(forward(
        CONFIG, spec, variables, inputs, targets,
        encoder_segment_ids=encoder_segments, decoder_segment_ids=decoder_segments,
    ))  # fmt: skip
    assert np.isfinite(packed).all()
    start = 0
    for (one, _), target in zip(examples, shifted, strict=True):
        alone = forward(CONFIG, spec, variables, row([one], 6), row([target], 6))
        stop = start + len(target)
        np.testing.assert_allclose(packed[:, start:stop], alone[:, : len(target)], atol=2e-5)
        start = stop


# Numerics, dropout and gradients


@pytest.mark.parametrize("name", [None, *SPECS])
def test_bfloat16_is_close(name: str | None) -> None:
    spec = SPECS[name] if name else None
    params, expert = init(CONFIG, spec)
    variables = {"params": params} | ({"expert": randomize(expert)} if name else {})
    full = logits(CONFIG, spec, variables)
    half = forward(CONFIG.replace(dtype="bfloat16"), spec, variables, *tokens())
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_logits_of_bfloat16_computation_are_float32_sums(config: T5Config) -> None:
    params, _ = init(config, None)
    half = logits(config.replace(dtype="bfloat16"), None, {"params": params})
    assert half.dtype == np.float32
    # Rounded to bfloat16 on the way, every one of them would be a bfloat16 number.
    assert np.mean(half != half.astype(jnp.bfloat16).astype(np.float32)) > 0.9


def test_dropout_acts_in_training_only() -> None:
    params, _ = init(CONFIG, None)
    variables = {"params": params}

    def train(seed: int) -> np.ndarray:
        rngs = {"dropout": jax.random.key(seed)}
        return logits(CONFIG, None, variables, deterministic=False, rngs=rngs)

    np.testing.assert_array_equal(train(0), train(0))
    assert np.abs(train(0) - train(1)).max() > 1e-2
    assert np.abs(train(0) - logits(CONFIG, None, variables)).max() > 1e-2


def jaxpr_shapes(jaxpr: Any) -> set[tuple[int, ...]]:
    """Returns the shape of every value a jaxpr computes, inner jaxprs included."""
    found = {v.aval.shape for equation in jaxpr.eqns for v in equation.outvars}
    for equation in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= jaxpr_shapes(inner)
    return found


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_of_the_expert_alone(name: str) -> None:
    spec = SPECS[name]
    params, expert = init(CONFIG, spec)
    expert = randomize(expert)
    model, (inputs, targets) = T5(CONFIG, spec), tokens()

    def loss(expert: Any, params: Any) -> jax.Array:
        variables = {"params": params, "expert": expert}
        return jax.nn.logsumexp(model.apply(variables, inputs, targets), axis=-1).mean()

    gradient = jax.jit(jax.grad(loss))(expert, params)
    assert flatten(gradient).keys() == flatten(expert).keys()
    for path, g in flatten(gradient).items():
        assert np.isfinite(g).all() and np.abs(g).max() > 0, path

    # The backbone's gradient would show as a computed value of a kernel's shape.
    def kernels(argument: int) -> set[tuple[int, ...]]:
        traced = jax.jit(jax.grad(loss, argnums=argument)).trace(expert, params).jaxpr
        computed = jaxpr_shapes(traced.jaxpr)
        return {s for s in ((V, 24), (24, V), (24, 15), (24, 40), (40, 24)) if s in computed}

    assert kernels(0) == set()
    assert (24, V) in kernels(1)
