"""Experts folded into weights: the same logits, here and in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from elm_jax.checkpoints import (
    Backbone,
    fingerprint,
    fold_expert,
    load_backbone,
    save_backbone,
    save_huggingface,
    save_t5x,
)
from elm_jax.errors import ElmError
from elm_jax.experts import bind_variables
from elm_jax.experts.apply import backbone_shapes, expert_shapes
from elm_jax.experts.tree import flatten
from elm_jax.models import T5, AdapterSpec, FullSpec, LoraSpec, T5Config

CONFIG = T5Config(
    vocab_size=31, emb_dim=12, num_heads=3, head_dim=5, mlp_dim=16,
    num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip
TOKENS = np.array([[3, 4, 1, 0, 0], [9, 8, 7, 6, 1]], np.int32)
SPECS = {
    "full": FullSpec(),
    "lora": LoraSpec(rank=2, alpha=3.0, targets=("q", "o", "wi", "wo")),
}


def draw(shapes: Any, seed: int, scale: float = 0.3) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(0, scale, s.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    params = draw(backbone_shapes(CONFIG), 0)
    return Backbone("little", CONFIG, params, fingerprint(CONFIG, params))


@pytest.mark.parametrize("kind", SPECS)
def test_the_folded_backbone_computes_the_same(
    backbone: Backbone, tmp_path: Path, kind: str
) -> None:
    spec = SPECS[kind]
    expert = draw(expert_shapes(CONFIG, spec), 1, 0.2)
    variables = bind_variables(spec, backbone.params, expert)
    wanted = np.asarray(jax.jit(T5(CONFIG, spec).apply)(variables, TOKENS, TOKENS))
    folded = fold_expert(backbone, spec, expert, "rte")
    assert folded.name == "little+rte" and folded.fingerprint != backbone.fingerprint
    found = jax.jit(T5(CONFIG).apply)({"params": folded.params}, TOKENS, TOKENS)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    bare = jax.jit(T5(CONFIG).apply)({"params": backbone.params}, TOKENS, TOKENS)
    assert np.abs(bare - wanted).max() > 0.1

    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    path = save_huggingface(folded, tmp_path / "hf")
    model = transformers.T5ForConditionalGeneration.from_pretrained(path).eval()
    ids = torch.tensor(TOKENS).long()
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=(ids > 0).long(), decoder_input_ids=ids)
    np.testing.assert_allclose(out.logits.numpy(), wanted, atol=1e-4)


def test_stacked_layers_fold_as_others_do(backbone: Backbone) -> None:
    expert = draw(expert_shapes(CONFIG, SPECS["lora"]), 1)
    wanted = fold_expert(backbone, SPECS["lora"], expert, "x")
    scanned = backbone.run_as(scan_layers=True)
    folded = fold_expert(scanned, SPECS["lora"], expert, "x")
    assert folded.fingerprint == wanted.fingerprint
    assert folded.params["encoder"].keys() == scanned.params["encoder"].keys()


def test_the_sum_is_rounded_once(backbone: Backbone) -> None:
    half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), backbone.params)
    given = Backbone("half", CONFIG, half, fingerprint(CONFIG, half))
    tau = draw(backbone_shapes(CONFIG), 1, 1e-2)
    folded = flatten(fold_expert(given, FullSpec(), tau, "x").params)
    for path, array in flatten(half).items():
        wanted = (array.astype(np.float32) + flatten(tau)[path]).astype(ml_dtypes.bfloat16)
        assert folded[path].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(folded[path], wanted)


def test_what_cannot_be_folded_is_refused(backbone: Backbone) -> None:
    adapter = AdapterSpec(bottleneck=2)
    with pytest.raises(ElmError, match="'rte' is a bottleneck adapter.*only 'full' and 'lora'"):
        fold_expert(backbone, adapter, draw(expert_shapes(CONFIG, adapter), 1), "rte")
    with pytest.raises(ElmError, match="expert 'rte' lacks"):
        fold_expert(backbone, FullSpec(), {}, "rte")


def test_a_quantised_backbone_is_not_written(backbone: Backbone, tmp_path: Path) -> None:
    config = CONFIG.replace(quantization="int8")
    quantised = Backbone("little", config, backbone.params, backbone.fingerprint)
    for write in (save_backbone, save_huggingface, save_t5x):
        with pytest.raises(ElmError, match="'little' is quantised .int8."):
            write(quantised, tmp_path / "out")
    with pytest.raises(ElmError, match="is quantised; fold into the original"):
        fold_expert(quantised, FullSpec(), backbone.params, "x")
    assert not (tmp_path / "out").exists()


def test_scanned_layers_are_written_one_by_one(backbone: Backbone, tmp_path: Path) -> None:
    scanned = backbone.run_as(scan_layers=True)
    for write, name in ((save_backbone, "own"), (save_huggingface, "hf"), (save_t5x, "t5x")):
        loaded = load_backbone(write(scanned, tmp_path / name))
        assert loaded.fingerprint == backbone.fingerprint and not loaded.config.scan_layers
