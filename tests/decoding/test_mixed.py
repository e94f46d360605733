"""Mixed batches against each example alone with its expert, and PEFT's; the pool of experts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_jax.decoding import (
    GenerationConfig,
    choice_log_probs,
    generate,
    mixed_choice_log_probs,
    mixed_generate,
    mixed_log_likelihood,
    tree_log_probs,
)
from elm_jax.decoding import rank as rank_module
from elm_jax.decoding.rank import pack_choices
from elm_jax.errors import ElmError
from elm_jax.experts import ExpertInfo, ExpertPool, ExpertStore
from elm_jax.experts.apply import backbone_shapes, expert_shapes
from elm_jax.experts.routing import choose_form, group_examples, group_size, route
from elm_jax.models import T5, ExpertSpec, T5Config, get_spec
from elm_jax.models.scan import from_storage

CONFIG = T5Config(
    vocab_size=50, emb_dim=16, num_heads=3, head_dim=8, mlp_dim=20,
    num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip
LORA = get_spec("lora", rank=2, targets=("q", "k", "v", "o", "wi", "wo"))
SPECS = {"lora": LORA, "adapter": get_spec("adapter"), "elm_code": get_spec("elm_code")}
EXPERTS = 3
PLACES = np.array([2, 0, 3, 2, 0, 2], np.int32)  # one expert unused, one bare, one of three
BACKBONE = {"name": "tiny", "fingerprint": "sha256:0"}


def draw(shapes: dict, seed: int, *stacked: int) -> dict:
    rng = np.random.default_rng(seed)

    def one(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, 0.3, (*stacked, *shape.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def tokens(length: int, rows: int = len(PLACES)) -> np.ndarray:
    rng = np.random.default_rng(length)
    drawn = rng.integers(2, CONFIG.vocab_size, (rows, length)).astype(np.int32)
    return np.where(np.arange(length) < rng.integers(1, length + 1, (rows, 1)), drawn, 0)


CHOICES = np.array([[[5, 6, 1], [5, 7, 1], [9, 1, 0]]], np.int32).repeat(len(PLACES), 0)
PARAMS = draw(backbone_shapes(CONFIG), 0)


def experts(spec: ExpertSpec) -> dict:
    return draw(expert_shapes(CONFIG, spec), 1, EXPERTS)


def variables(stack: dict, place: int) -> dict:
    """The backbone with one expert; zeros are the bare backbone."""
    one = jax.tree.map(lambda x: x[place] if place < EXPERTS else np.zeros_like(x[0]), stack)
    return {"params": PARAMS, "expert": one}


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Records what XLA compiles."""
    seen: list[str] = []

    def listen(name: str, seconds: float, **_: object) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("form", ["gathered", "grouped"])
@pytest.mark.parametrize("name", SPECS)
def test_scores_equal_each_example_alone(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[name]
    model, stack = T5(CONFIG, spec), experts(spec)
    if form == "gathered":  # the encoder takes the examples in turns, as on long inputs
        monkeypatch.setattr(rank_module, "CPU_TOKENS_AT_ONCE", 96)
    inputs = tokens(40)  # long beside the choices: the decoder reads the encoder without its keys
    scores, counts = mixed_choice_log_probs(
        model, PARAMS, stack, PLACES, inputs, CHOICES, form=form
    )
    np.testing.assert_array_equal(counts, [[3, 3, 2]] * len(PLACES))
    monkeypatch.undo()
    for place in range(EXPERTS + 1):
        alone, _ = choice_log_probs(model, variables(stack, place), inputs, CHOICES)
        rows = place == PLACES
        np.testing.assert_allclose(scores[rows], alone[rows], rtol=1e-5, atol=1e-4)
    one, _ = choice_log_probs(model, variables(stack, 2), inputs[3:4], CHOICES[3:4])
    np.testing.assert_allclose(scores[3:4], one, rtol=1e-5, atol=1e-4)
    assert np.ptp(np.asarray(scores)[PLACES == 2] - np.asarray(alone)[PLACES == 2]) > 0.01


def test_bare_backbone_is_the_backbone() -> None:
    inputs = tokens(8)
    bare = np.full(len(PLACES), EXPERTS)
    scores, _ = mixed_choice_log_probs(
        T5(CONFIG, LORA), PARAMS, experts(LORA), bare, inputs, CHOICES
    )
    expected, _ = choice_log_probs(T5(CONFIG), {"params": PARAMS}, inputs, CHOICES)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_log_likelihood_equals_teacher_forcing() -> None:
    spec = SPECS["adapter"]
    model, stack, inputs = T5(CONFIG, spec), experts(spec), tokens(8)
    targets = np.array([[7, 8, 1], [9, 1, 0]] * 3, np.int32)
    scores, counts = mixed_log_likelihood(model, PARAMS, stack, PLACES, inputs, targets)
    np.testing.assert_array_equal(counts, [3, 2] * 3)
    apply = jax.jit(model.apply)
    for row, place in enumerate(PLACES):
        shifted = np.pad(targets, ((0, 0), (1, 0)))[row : row + 1, :-1]
        logits = np.asarray(apply(variables(stack, place), inputs[row : row + 1], shifted))[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = log_p[np.arange(counts[row]), targets[row, : counts[row]]].sum()
        np.testing.assert_allclose(scores[row], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "form", "beams"),
    [("lora", "gathered", 1), ("lora", "grouped", 3), ("elm_code", "grouped", 1)],
)
def test_generation_equals_each_example_alone(name: str, form: str, beams: int) -> None:
    spec = SPECS[name]
    model, stack, inputs = T5(CONFIG, spec), experts(spec), tokens(8)
    config = GenerationConfig(max_new_tokens=6, num_beams=beams, num_return_sequences=beams)
    found = mixed_generate(model, PARAMS, stack, PLACES, inputs, config, form=form)
    assert found.tokens.shape == (len(PLACES), beams, 6)
    for place in np.unique(PLACES):
        alone = generate(model, variables(stack, place), inputs, config)
        rows = place == PLACES
        np.testing.assert_array_equal(found.tokens[rows], alone.tokens[rows])
    one = generate(model, variables(stack, 2), inputs[3:4], config)
    np.testing.assert_array_equal(found.tokens[3:4], one.tokens)


@pytest.mark.parametrize("form", ["gathered", "grouped"])
def test_scanned_layers(form: str) -> None:
    config = CONFIG.replace(num_encoder_layers=2, num_decoder_layers=2)
    scanned = config.replace(scan_layers=True)
    spec = SPECS["elm_code"]
    params = draw(backbone_shapes(config), 0)
    stack = draw(expert_shapes(config, spec), 1, EXPERTS)
    inputs = tokens(8)
    plain, _ = mixed_choice_log_probs(T5(config, spec), params, stack, PLACES, inputs, CHOICES)
    scores, _ = mixed_choice_log_probs(
        T5(scanned, spec), from_storage(params, scanned), stack, PLACES, inputs, CHOICES, form=form
    )
    np.testing.assert_allclose(scores, plain, rtol=1e-5, atol=1e-4)


def test_equals_peft_adapter_names(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from elm_jax.checkpoints import Backbone, to_huggingface
    from elm_jax.experts.peft import save_peft_expert

    spec = get_spec("lora", rank=2, targets=("q", "v"))
    stack, inputs = experts(spec), tokens(8)
    folder = to_huggingface(Backbone("random", CONFIG, PARAMS, ""), tmp_path / "backbone")
    base = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    for place in range(EXPERTS):
        one = variables(stack, place)["expert"]
        saved = save_peft_expert(spec, one, tmp_path / str(place))
        if place == 0:
            model = peft.PeftModel.from_pretrained(base, saved, adapter_name="0")
        else:
            model.load_adapter(saved, adapter_name=str(place))
    places = np.where(PLACES == 3, 1, PLACES)
    targets = np.array([[7, 8, 1]] * len(PLACES), np.int32)
    source = torch.from_numpy(inputs.astype(np.int64))
    with torch.inference_mode():
        logits = model.eval()(
            input_ids=source,
            attention_mask=(source > 0).long(),
            labels=torch.from_numpy(targets.astype(np.int64)),
            adapter_names=[str(place) for place in places],
        ).logits
    expected = torch.log_softmax(logits, -1).numpy()
    expected = np.take_along_axis(expected, targets[..., None].astype(np.int64), -1).sum((1, 2))
    scores, _ = mixed_log_likelihood(T5(CONFIG, spec), PARAMS, stack, places, inputs, targets)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", ["gathered", "grouped"])
def test_backbone_products_stay_whole(form: str) -> None:
    """In a mixed batch each kernel of the backbone is in one product, without a batch axis."""
    model, stack, inputs = T5(CONFIG, LORA), experts(LORA), tokens(8)
    tree = pack_choices(CHOICES)

    def products(stack: dict, places: np.ndarray | None) -> list[str]:
        def run(params: dict, expert: dict) -> jax.Array:
            given = {"params": params, "expert": expert}
            return tree_log_probs(model, given, inputs, tree, places=places, form=form)

        text = jax.jit(run).lower(PARAMS, stack).as_text()
        dots = [line for line in text.splitlines() if "dot_general" in line]
        shapes = {leaf.shape for leaf in jax.tree.leaves(PARAMS) if leaf.ndim == 2}
        kernels = "|".join(f"{a}x{b}" for a, b in shapes if {a, b} != {2})
        return [d for d in dots if re.search(rf", tensor<({kernels})xf32>\) ->", d)]

    mixed = products(stack, PLACES)
    alone = products(variables(stack, 0)["expert"], None)
    assert len(mixed) == len(alone) > 8
    assert not [line for line in mixed if "batching_dims" in line]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([(1, 1, 1), (3, 7, 2), (2, 12, 4), (5, 4, 3)]))
def test_groups_hold_every_example_once(data: st.DataObject, shape: tuple[int, int, int]) -> None:
    kinds, batch, size = shape
    drawn = data.draw(st.lists(st.integers(0, kinds), min_size=batch, max_size=batch))
    group = jax.jit(group_examples, static_argnums=(1, 2))
    found = jax.tree.map(np.asarray, group(jnp.array(drawn), kinds, size))
    present = found.rows[found.rows < batch]
    assert sorted(present) == list(range(batch))
    np.testing.assert_array_equal(found.rows[found.places], np.arange(batch))
    np.testing.assert_array_equal(found.experts[found.places // size], drawn)


def test_form_depends_on_size_and_batch() -> None:
    assert choose_form(32, 8, size=2**20) == "gathered"
    assert choose_form(256, 8, size=2**24) == "grouped"
    assert choose_form(16, 8, size=2**30) == "gathered"  # groups would be hardly fewer
    assert group_size(32, 8) == 4


# The pool.


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    """Experts a to d of one spec, and one of another."""
    store = ExpertStore(tmp_path / "store", create=True)
    for seed, name in enumerate("abcd"):
        write(store, name, LORA, seed)
    write(store, "other", dataclasses.replace(LORA, rank=3), 9)
    return store


def write(store: ExpertStore, name: str, spec: ExpertSpec, seed: int) -> None:
    info = ExpertInfo(name, spec, (name,), ("p",), BACKBONE)
    store.write(info, draw(expert_shapes(CONFIG, spec), seed))


def held(pool: ExpertPool, place: int) -> dict:
    return jax.tree.map(lambda x: np.asarray(x[place]), pool.experts)


def test_pool_loads_and_evicts_the_longest_unused(store: ExpertStore) -> None:
    pool = ExpertPool(CONFIG, LORA, 3, store=store, backbone=BACKBONE)
    first = pool.places(["a", "b", None, "a", "c"])
    assert first[0] == first[3] and len({*first}) == 4 and first[2] == 3
    pool.places(["a"])
    assert pool.ids == ("b", "c", "a")
    second = pool.places(["d", "c"])  # b goes
    assert pool.ids == ("a", "d", "c") and "b" not in pool
    for name, place in zip(["d", "c"], second, strict=True):
        jax.tree.map(np.testing.assert_array_equal, held(pool, place), store.params(name))
    assert second[0] == first[1]
    again = pool.places(["b", "a", "c"])  # d goes, though a was out of use longer: it is asked for
    assert {*pool.ids} == {"a", "b", "c"} and again[1] == first[0]


def test_put_and_remove(store: ExpertStore) -> None:
    pool = ExpertPool(CONFIG, LORA, 2)
    one, other = store.params("a"), store.params("b")
    place = pool.put("a", one)
    assert pool.put("a", other) == place and len(pool) == 1  # replaced where it stood
    jax.tree.map(np.testing.assert_array_equal, held(pool, place), other)
    pool.put("alpha", one)
    with pytest.raises(
        ElmError, match=r"no place is free for expert 'c': the pool holds 2 \(a, al"
    ):
        pool.put("c", one)
    with pytest.raises(ElmError, match="'alhpa' is not in the pool .*did you mean 'alpha'"):
        pool.remove("alhpa")
    pool.remove("a")
    assert pool.ids == ("alpha",) and pool.put("c", one) == place


def test_swapping_compiles_nothing(store: ExpertStore) -> None:
    pool = ExpertPool(CONFIG, LORA, 2, store=store)
    model, inputs = T5(CONFIG, LORA), tokens(8)
    config = GenerationConfig(max_new_tokens=3)

    def run(names: list[str | None]) -> tuple[np.ndarray, np.ndarray]:
        places = pool.places(names)
        given = (model, PARAMS, pool.experts, places, inputs)
        scores = np.asarray(mixed_choice_log_probs(*given, CHOICES)[0])
        return scores, np.asarray(mixed_generate(*given, config).tokens)

    names = ["a", None, "b", "a", "b", None]
    with compilations() as first:
        before, _ = run(names)
    assert first
    with compilations() as seen:
        run(["c", "d", "c", None, "c", "c"])
        pool.remove("c")
        pool.put("new", store.params("b"))
        run(["new"] * 6)
        after, _ = run(names)
    assert not seen
    np.testing.assert_array_equal(before, after)


def test_what_a_pool_refuses(store: ExpertStore) -> None:
    pool = ExpertPool(CONFIG, LORA, 2, store=store, backbone=BACKBONE)
    pool.places(["a"])
    with pytest.raises(
        ElmError, match=r"'othr' is neither in the pool .* nor in .*did you mean 'other'"
    ):
        pool.places(["b", "othr"])
    with pytest.raises(
        ElmError, match=r"'other' is LoraSpec\(rank=3.* pool is for LoraSpec\(rank=2"
    ):
        pool.places(["b", "other"])
    assert pool.ids == ("a",)  # nothing was loaded, nobody lost a place
    with pytest.raises(ElmError, match="names 3 different experts, but the pool has 2 places"):
        pool.places(["a", "b", "c"])
    with pytest.raises(ElmError, match="belongs to backbone 'tiny'"):
        ExpertPool(
            CONFIG, LORA, 1, store=store, backbone={"name": "big", "fingerprint": "sha256:1"}
        ).places(["a"])
    with pytest.raises(ElmError, match="has shape .* expected"):
        pool.put("wrong", store.params("other"))
    with pytest.raises(ElmError, match="cannot hold `full` experts"):
        ExpertPool(CONFIG, get_spec("full"), 2)
    for capacity in (0, True, 2.0):
        with pytest.raises(ElmError, match="positive integer"):
            ExpertPool(CONFIG, LORA, capacity)


def test_bare_backbone_where_no_adapter_is_the_identity() -> None:
    spec = get_spec("adapter", placement="sequential")
    with pytest.raises(ElmError, match="bare backbone .* sequential adapters without inner_res"):
        ExpertPool(CONFIG, spec, 1).places([None])
    with pytest.raises(ElmError, match="bare backbone"):
        mixed_choice_log_probs(T5(CONFIG, spec), PARAMS, experts(spec), PLACES, tokens(8), CHOICES)


def test_what_a_mixed_batch_refuses() -> None:
    model, stack, inputs = T5(CONFIG, LORA), experts(LORA), tokens(8)

    def score(model: T5 = model, places: object = PLACES, form: str = "auto") -> None:
        mixed_choice_log_probs(model, PARAMS, stack, places, inputs, CHOICES, form=form)

    with pytest.raises(ElmError, match="example 1 names place 4, .* 0 to 2 .3 is the bare"):
        score(places=[0, 4, 0, 0, 0, 0])
    with pytest.raises(ElmError, match="example 0 names place -1"):
        score(places=[-1, 0, 0, 0, 0, 0])
    with pytest.raises(ElmError, match=r"of 6 examples needs places int \[6\], got int64 \[2\]"):
        score(places=[0, 1])
    with pytest.raises(ElmError, match="float64"):
        score(places=[0.0] * 6)
    with pytest.raises(ElmError, match="form must be one of .*did you mean 'grouped'"):
        score(form="groupd")
    with pytest.raises(ElmError, match="cannot hold `full` experts: each is a whole backbone"):
        score(T5(CONFIG, get_spec("full")))
    with pytest.raises(ElmError, match="needs the spec of its experts"):
        score(T5(CONFIG))
    with pytest.raises(ElmError, match="form must be one of"):
        route(CONFIG, stack, PLACES, form="sorted")
