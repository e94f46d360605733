"""Greedy decoding against full recomputation and PyTorch's `generate`."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.checkpoints import Backbone, to_huggingface
from elm_jax.decoding import greedy_decode, stacked_greedy_decode
from elm_jax.decoding.greedy import _greedy, _stacked_greedy
from elm_jax.errors import ElmError
from elm_jax.experts.apply import backbone_shapes, expert_shapes
from elm_jax.models import T5, ExpertSpec, FullSpec, T5Config, get_spec

CONFIG = T5Config(
    vocab_size=6,
    emb_dim=16,
    num_heads=3,
    head_dim=6,
    mlp_dim=24,
    num_encoder_layers=2,
    num_decoder_layers=2,
)
LENGTH = 10


def inputs(batch: int = 8, length: int = 9) -> np.ndarray:
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, CONFIG.vocab_size, (batch, length)).astype(np.int32)
    return np.where(np.arange(length) >= rng.integers(1, length + 1, (batch, 1)), 0, tokens)


def initial(spec: ExpertSpec | None = None, seed: int = 0) -> dict:
    """Random variables, whose greedy outputs vary and often end early."""
    rng = np.random.default_rng(seed)
    shapes = {"params": backbone_shapes(CONFIG)}
    if spec is not None:
        shapes["expert"] = expert_shapes(CONFIG, spec)

    def draw(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, 0.3 if mean else 0.6, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def step_by_step(model: T5, variables: dict, tokens: np.ndarray, length: int) -> np.ndarray:
    """Argmax of the last position, all positions computed anew each time."""
    out = np.zeros((len(tokens), length), np.int32)
    done = np.zeros(len(tokens), bool)
    apply = jax.jit(model.apply)
    for u in range(length):
        shifted = np.pad(out, ((0, 0), (1, 0)))[:, :length]
        token = np.asarray(jnp.argmax(apply(variables, tokens, shifted)[:, u], axis=-1))
        out[:, u] = np.where(done, 0, token)
        done |= token == 1
    return out


@pytest.mark.parametrize("kind", [None, "elm_code", "lora"])
def test_equals_full_recomputation(kind: str | None) -> None:
    spec = None if kind is None else get_spec(kind)
    model, variables = T5(CONFIG, spec), initial(spec)
    tokens = greedy_decode(model, variables, inputs(), max_decode_len=LENGTH)
    assert tokens.shape == (8, LENGTH) and tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, step_by_step(model, variables, inputs(), LENGTH))


def test_outputs_vary_and_some_end_early() -> None:
    """Guards the comparisons of this file against being empty."""
    ends = []
    for seed in range(4):
        tokens = greedy_decode(T5(CONFIG), initial(seed=seed), inputs(), max_decode_len=LENGTH)
        ends += np.where((tokens == 1).any(1), (tokens == 1).argmax(1), LENGTH).tolist()
    assert LENGTH in ends and len(set(ends)) > 3, ends


def test_equals_pytorch_generate(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = torch.tensor(inputs().astype(np.int64))
    for seed in range(4):
        variables = initial(seed=seed)
        backbone = Backbone("random", CONFIG, variables["params"], "")
        folder = to_huggingface(backbone, tmp_path / str(seed))
        theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
        with torch.inference_mode():
            found = theirs.generate(
                input_ids=source,
                attention_mask=(source > 0).long(),
                max_new_tokens=LENGTH,
                num_beams=1,
                do_sample=False,
            ).numpy()[:, 1:]
        expected = np.pad(found, ((0, 0), (0, LENGTH - found.shape[1])))
        tokens = greedy_decode(T5(CONFIG), variables, inputs(), max_decode_len=LENGTH)
        np.testing.assert_array_equal(tokens, expected)


def test_stops_when_every_row_has_ended() -> None:
    """A row's steps are its tokens up to the end; the loop takes those of the longest row."""
    model, steps_seen = T5(CONFIG), set()
    for seed in range(4):
        for tokens in np.split(inputs(), 8):
            out, steps = _greedy(model, initial(seed=seed), tokens, LENGTH, 1)
            ended = (np.asarray(out) == 1).any(1)
            ends = np.where(ended, (np.asarray(out) == 1).argmax(1) + 1, LENGTH)
            assert int(steps) == ends.max()
            steps_seen.add(int(steps))
    assert min(steps_seen) < LENGTH


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_stacked_equals_each_expert_alone(kind: str) -> None:
    spec = get_spec(kind)
    model, params = T5(CONFIG, spec), initial()["params"]
    alone = [
        jax.tree.map(lambda p: p * 0.5, initial(None, seed)["params"])
        if isinstance(spec, FullSpec)
        else initial(spec, seed)["expert"]
        for seed in (1, 2, 3)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    together = stacked_greedy_decode(model, spec, params, stacked, inputs(), max_decode_len=LENGTH)
    assert together.shape == (3, 8, LENGTH)
    for x, expert in enumerate(alone):
        if isinstance(spec, FullSpec):
            variables = {"params": jax.tree.map(jnp.add, params, expert)}
        else:
            variables = {"params": params, "expert": expert}
        one = greedy_decode(model, variables, inputs(), max_decode_len=LENGTH)
        np.testing.assert_array_equal(together[x], one)
    assert not np.array_equal(together[0], together[1])


def test_stacked_steps_are_those_of_the_longest() -> None:
    spec = get_spec("lora")
    model, params = T5(CONFIG, spec), initial()["params"]
    alone = [initial(spec, seed)["expert"] for seed in (1, 5)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    seen = set()
    for tokens in np.split(inputs(), 8):
        out, steps = _stacked_greedy(model, spec, params, stacked, tokens, LENGTH, 1)
        ended = (np.asarray(out) == 1).any(-1)
        ends = np.where(ended, (np.asarray(out) == 1).argmax(-1) + 1, LENGTH)
        assert int(steps) == ends.max()
        seen.add(int(steps))
    assert min(seen) < LENGTH


def test_vmap_over_experts() -> None:
    spec = get_spec("adapter")
    model, params = T5(CONFIG, spec), initial()["params"]
    alone = [initial(spec, seed)["expert"] for seed in (1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)

    def one(expert: dict) -> jax.Array:
        variables = {"params": params, "expert": expert}
        return greedy_decode(model, variables, inputs(), max_decode_len=LENGTH)

    expected = stacked_greedy_decode(model, spec, params, stacked, inputs(), max_decode_len=LENGTH)
    np.testing.assert_array_equal(jax.vmap(one)(stacked), expected)


def test_shorter_limit_is_a_prefix() -> None:
    model, variables = T5(CONFIG), initial()
    whole = greedy_decode(model, variables, inputs(), max_decode_len=LENGTH)
    part = greedy_decode(model, variables, inputs(), max_decode_len=1)
    np.testing.assert_array_equal(part, whole[:, :1])


def test_padding_of_the_input_does_not_count() -> None:
    model, variables = T5(CONFIG), initial()
    narrow = greedy_decode(model, variables, inputs(), max_decode_len=LENGTH)
    wide = jnp.pad(inputs(), ((0, 0), (0, 30)))
    np.testing.assert_array_equal(
        greedy_decode(model, variables, wide, max_decode_len=LENGTH), narrow
    )


def test_no_room_is_refused() -> None:
    with pytest.raises(ElmError, match="max_decode_len must be at least 1, got 0"):
        greedy_decode(T5(CONFIG), initial(), inputs(), max_decode_len=0)
