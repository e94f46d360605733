"""Rank classification against plain teacher forcing, ours and PyTorch's."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.checkpoints import Backbone, to_huggingface
from elm_jax.decoding import (
    choice_lengths,
    choice_log_probs,
    pack_choices,
    stacked_choice_log_probs,
    tree_log_probs,
)
from elm_jax.decoding import rank as rank_module
from elm_jax.decoding.rank import rank
from elm_jax.decoding.shapes import round_up, trim_padding
from elm_jax.errors import ElmError
from elm_jax.experts.apply import backbone_shapes, expert_shapes
from elm_jax.models import T5, ExpertSpec, FullSpec, T5Config, get_spec

CONFIG = T5Config(
    vocab_size=60,
    emb_dim=16,
    num_heads=3,
    head_dim=16,
    mlp_dim=24,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
# Shared beginnings, one choice a prefix of another, equal choices, unequal lengths, absent ones.
CHOICES = np.array(
    [
        [[5, 6, 7, 1, 0], [5, 6, 1, 0, 0], [5, 8, 7, 9, 1]],
        [[1, 0, 0, 0, 0], [9, 9, 9, 9, 1], [0, 0, 0, 0, 0]],
        [[7, 1, 0, 0, 0], [7, 1, 0, 0, 0], [6, 1, 0, 0, 0]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [11, 12, 1, 0, 0]],
    ],
    np.int32,
)
LENGTHS = np.array([[4, 3, 5], [1, 5, 0], [2, 2, 2], [0, 0, 3]])


def inputs(batch: int = 4, length: int = 9, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, CONFIG.vocab_size, (batch, length)).astype(np.int32)
    padding = np.arange(length) >= rng.integers(1, length + 1, (batch, 1))
    return np.where(padding, 0, tokens)


def initial(spec: ExpertSpec | None = None, seed: int = 0, config: T5Config = CONFIG) -> dict:
    """Random variables, large enough for scores to differ."""
    rng = np.random.default_rng(seed)
    shapes = {"params": backbone_shapes(config)}
    if spec is not None:
        shapes["expert"] = expert_shapes(config, spec)

    def draw(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, 0.3, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def naive(model: T5, variables: dict, tokens: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """Each choice with its own copy of the input, every position, log_softmax."""
    batch, options, length = choices.shape
    targets = choices.reshape(-1, length)
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    repeated = np.repeat(tokens, options, axis=0)
    logits = jax.jit(model.apply)(variables, repeated, shifted)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    scores = jnp.sum(picked * (targets > 0), axis=-1).reshape(batch, options)
    return np.where((choices > 0).any(-1), scores, -np.inf)


LORA = get_spec("lora", targets=("q", "k", "v", "o"))


@pytest.mark.parametrize("length", [9, 40])  # the longer one reads the encoder without its keys
@pytest.mark.parametrize(
    "spec, tied",
    [(None, True), (get_spec("adapter"), False), (get_spec("elm_code"), False), (LORA, True)],
    ids=["none", "adapter", "elm_code", "lora"],
)
def test_equals_encoding_every_choice_anew(
    spec: ExpertSpec | None, tied: bool, length: int
) -> None:
    config = CONFIG.replace(logits_via_embedding=tied)
    model, variables = T5(config, spec), initial(spec, config=config)
    tokens = inputs(length=length)
    scores, counts = choice_log_probs(model, variables, tokens, CHOICES)
    np.testing.assert_array_equal(counts, LENGTHS)
    expected = naive(model, variables, tokens, CHOICES)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-4)


def test_few_choices_make_no_keys_or_values() -> None:
    """By the compiler's count of operations: two tokens cost less than a long input's keys."""
    model, variables = T5(CONFIG), initial()
    tree = pack_choices(np.array([[[5, 1], [6, 1]]]).repeat(4, 0))
    tokens = inputs(length=120)
    encoded = np.zeros((4, 120, CONFIG.emb_dim), np.float32)

    def operations(*nodes: np.ndarray, method: str) -> float:
        run = jax.jit(lambda v, e, *nodes: model.apply(v, e, tokens, *nodes, method=method))
        return run.lower(variables, encoded, *nodes).compile().cost_analysis()["flops"]

    keys = 2 * 2 * encoded.size * 3 * 16 * CONFIG.num_decoder_layers
    assert operations(tree.nodes, tree.depths, tree.visible, method="decode_tree") < keys
    assert operations(tree.nodes, method="decode") > keys


def test_equals_pytorch_teacher_forcing(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    variables, tokens = initial(), inputs()
    backbone = Backbone("random", CONFIG, variables["params"], "")
    folder = to_huggingface(backbone, tmp_path / "backbone")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    expected = np.full(LENGTHS.shape, -np.inf)
    for row, choice in np.argwhere(LENGTHS):
        target = torch.tensor(CHOICES[row, choice, : LENGTHS[row, choice]].astype(np.int64))[None]
        source = torch.tensor(tokens[row].astype(np.int64))[None]
        with torch.inference_mode():
            loss = theirs(input_ids=source, attention_mask=(source > 0).long(), labels=target).loss
        expected[row, choice] = -float(loss) * target.shape[1]
    scores, _ = choice_log_probs(T5(CONFIG), variables, tokens, CHOICES)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-4)


def test_random_choices_equal_the_naive_way() -> None:
    rng = np.random.default_rng(3)
    model, variables = T5(CONFIG), initial()
    for seed in range(2):
        choices = rng.integers(2, 5, (4, 5, 7)).astype(np.int32)  # few tokens: many shared prefixes
        ends = rng.integers(0, 7, (4, 5, 1))
        at = np.arange(7)
        choices = np.where(at < ends, choices, np.where(at == ends, 1, 0))
        tokens = inputs(seed=seed)
        scores, _ = choice_log_probs(model, variables, tokens, choices)
        np.testing.assert_allclose(
            scores, naive(model, variables, tokens, choices), rtol=1e-5, atol=1e-4
        )


def test_turns_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model, variables = T5(CONFIG), initial()
    arguments = (model, variables, inputs(), pack_choices(CHOICES))
    whole = jax.jit(tree_log_probs, static_argnums=0)(*arguments)
    monkeypatch.setattr(rank_module, "CPU_TOKENS_AT_ONCE", 18)
    monkeypatch.setattr(rank_module, "LOGITS_AT_ONCE", 1)
    parts = jax.jit(lambda *rest: tree_log_probs(model, *rest))(*arguments[1:])
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)


def test_every_distinct_beginning_is_one_node() -> None:
    # Beginnings: none, 5, 5 6, 5 6 7, 5 8, 5 8 7, 5 8 7 9.
    first = pack_choices(CHOICES[:1])
    assert first.nodes.shape == (1, 8)
    assert first.nodes[0, :7].tolist() == [0, 5, 6, 7, 8, 7, 9]
    assert first.depths[0, :7].tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert first.sources[0, :, :5].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 0], [0, 1, 4, 5, 6]]
    assert np.flatnonzero(first.visible[0, 6]).tolist() == [0, 1, 4, 5, 6]
    np.testing.assert_array_equal(first.targets[0, :, :5], CHOICES[0])


def test_more_choices_do_not_encode_again() -> None:
    """By the compiler's count of operations, where the naive way grows with the choices."""
    model, variables, tokens = T5(CONFIG), initial(), inputs(length=100)

    def operations(choices: np.ndarray) -> tuple[float, float]:
        ours = jax.jit(lambda v, t, tree: tree_log_probs(model, v, t, tree))
        options = choices.shape[1]
        plain = jax.jit(lambda v, t, c: model.apply(v, jnp.repeat(t, options, 0), c))
        lowered = (
            ours.lower(variables, tokens, pack_choices(choices)),
            plain.lower(variables, tokens, choices.reshape(-1, 2)),
        )
        one, other = (x.compile().cost_analysis()["flops"] for x in lowered)
        return one, other

    few, naively_few = operations(np.array([[[5, 1]]]).repeat(4, 0))
    many, naively_many = operations(np.array([[[c, 1] for c in range(2, 10)]]).repeat(4, 0))
    assert many < 1.5 * few
    assert naively_many > 7 * naively_few


@pytest.mark.parametrize("kind", ["adapter", "lora", "full"])
def test_stacked_equals_each_expert_alone(kind: str) -> None:
    spec = get_spec(kind)
    model = T5(CONFIG, spec)
    params = initial()["params"]
    alone = [
        jax.tree.map(lambda p: p * 0.1, initial(None, seed)["params"])
        if isinstance(spec, FullSpec)
        else initial(spec, seed)["expert"]
        for seed in (1, 2, 3)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    scores, counts = stacked_choice_log_probs(model, spec, params, stacked, inputs(), CHOICES)
    assert scores.shape == (3, 4, 3)
    for x, expert in enumerate(alone):
        if isinstance(spec, FullSpec):
            variables = {"params": jax.tree.map(jnp.add, params, expert)}
        else:
            variables = {"params": params, "expert": expert}
        one, _ = choice_log_probs(model, variables, inputs(), CHOICES)
        np.testing.assert_allclose(scores[x], one, rtol=1e-5, atol=1e-4)
    assert not np.allclose(scores[0, 0], scores[1, 0])
    assert rank(scores, counts).shape == (3, 4)


def test_vmap_over_experts() -> None:
    spec = get_spec("lora")
    model, params = T5(CONFIG, spec), initial()["params"]
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x), *(initial(spec, seed)["expert"] for seed in (1, 2))
    )

    def one(expert: dict) -> jax.Array:
        variables = {"params": params, "expert": expert}
        return choice_log_probs(model, variables, inputs(), CHOICES)[0]

    expected, _ = stacked_choice_log_probs(model, spec, params, stacked, inputs(), CHOICES)
    np.testing.assert_allclose(jax.vmap(one)(stacked), expected, rtol=1e-5, atol=1e-4)


def test_same_shapes_compile_once() -> None:
    spec = get_spec("lora")
    params = initial()["params"]
    experts = jax.tree.map(lambda x: x[None], initial(spec)["expert"])
    compiled = rank_module._stacked_tree_log_probs
    sizes = []
    for seed in range(3):
        args = (params, experts, inputs(seed=seed), CHOICES[::-1] if seed else CHOICES)
        stacked_choice_log_probs(T5(CONFIG, spec), spec, *args)
        sizes.append(compiled._cache_size())
    assert sizes[0] == sizes[1] == sizes[2]


def test_padding_does_not_count() -> None:
    model, variables = T5(CONFIG), initial()
    scores, _ = choice_log_probs(model, variables, inputs(), CHOICES)
    wide = np.pad(inputs(), ((0, 0), (0, 60)))
    longer = np.pad(CHOICES, ((0, 0), (0, 2), (0, 9)))
    padded, counts = choice_log_probs(model, variables, wide, longer)
    np.testing.assert_allclose(padded[:, :3], scores, rtol=1e-5, atol=1e-5)
    assert np.isneginf(padded[:, 3:]).all() and not counts[:, 3:].any()


def test_rank() -> None:
    scores = [[-3.0, -1.0, -2.0], [-2.0, -2.0, -2.0], [-6.0, -2.0, -9.0], [0.0, -5.0, -4.0]]
    counts = [[1, 1, 1], [2, 2, 2], [6, 1, 3], [0, 1, 1]]
    assert rank(scores, counts).tolist() == [1, 0, 1, 2]
    assert rank(scores, counts, mean=True).tolist() == [1, 0, 0, 2]
    assert rank(np.full((2, 3), -np.inf), np.array([[0, 0, 0], [0, 1, 0]])).tolist() == [-1, 1]


def test_equal_choices_tie_and_the_first_wins() -> None:
    scores, counts = choice_log_probs(T5(CONFIG), initial(), inputs(), CHOICES[2:3].repeat(4, 0))
    np.testing.assert_array_equal(scores[:, 0], scores[:, 1])
    assert set(rank(scores, counts).tolist()) <= {0, 2}


@pytest.mark.parametrize(
    "row, message",
    [
        ([5, 0, 6, 1], "choice 1 of row 0 must be tokens, then one end of sequence"),
        ([5, 6, 7, 0], r"got \[5, 6, 7, 0\]"),
        ([0, 5, 1, 0], "choice 1 of row 0"),
    ],
)
def test_malformed_choices_are_refused(row: list[int], message: str) -> None:
    with pytest.raises(ElmError, match=message):
        choice_lengths(np.array([[[4, 1, 0, 0], row]]))


def test_misfitting_arguments_are_refused() -> None:
    model, variables = T5(CONFIG), initial()
    with pytest.raises(ElmError, match="token 60, but the backbone's vocabulary ends at 59"):
        choice_log_probs(model, variables, inputs(1), np.array([[[60, 1]]]))
    with pytest.raises(ElmError, match="3 inputs, but choices for 4"):
        choice_log_probs(model, variables, inputs(3), CHOICES)
    with pytest.raises(ElmError, match=r"integers \[B, C, U\], got float64 \[1, 1\]"):
        choice_lengths(np.ones((1, 1)))


def test_round_up_has_two_sizes_an_octave() -> None:
    sizes = [round_up(n) for n in range(1, 1025)]
    assert all(n <= size < max(1.5 * n, n + 1) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 20


def test_only_common_padding_is_cut() -> None:
    tokens = np.zeros((2, 100), np.int32)
    tokens[1, 40] = 3
    assert trim_padding(tokens).shape == (2, 48)
    assert trim_padding(jnp.asarray(tokens)).shape == (2, 100)
    assert trim_padding(np.zeros((2, 20), np.int32)).shape == (2, 20)
