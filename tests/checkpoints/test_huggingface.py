"""Hugging Face folders in and out, against transformers itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from elm_jax.checkpoints import (
    Backbone,
    fingerprint,
    from_huggingface,
    load_backbone,
    save_backbone,
    to_huggingface,
)
from elm_jax.checkpoints.huggingface import (
    config_from_hf,
    config_to_hf,
    params_from_hf,
    params_to_hf,
)
from elm_jax.errors import ElmError
from elm_jax.experts.apply import backbone_shapes
from elm_jax.experts.tree import flatten, unflatten
from elm_jax.models import T5, T5Config

CONFIG = T5Config(
    vocab_size=31, emb_dim=12, num_heads=3, head_dim=5, mlp_dim=16,
    num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip
TIED = CONFIG.replace(logits_via_embedding=True, mlp_activations=("relu",))
SIZES = dict(vocab_size=31, d_model=12, num_heads=3, d_kv=5, d_ff=16, num_layers=2)
TOKENS = np.array([[3, 4, 1, 0, 0], [9, 8, 7, 6, 1]], np.int32)


def make_backbone(config: T5Config = CONFIG, dtype: Any = np.float32) -> Backbone:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.normal(0, 0.3, s.shape).astype(dtype), backbone_shapes(config)
    )
    return Backbone("little", config, params, fingerprint(config, params))


def our_logits(backbone: Backbone) -> np.ndarray:
    run = jax.jit(lambda params: T5(backbone.config).apply({"params": params}, TOKENS, TOKENS))
    return np.asarray(run(backbone.params))


def their_logits(model: Any) -> np.ndarray:
    import torch

    ids = torch.tensor(TOKENS).long()
    with torch.no_grad():
        return model.eval()(
            input_ids=ids, attention_mask=(ids > 0).long(), decoder_input_ids=ids
        ).logits.numpy()


def assert_same_arrays(a: Any, b: Any) -> None:
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An untied model's folder, as we write it."""
    return to_huggingface(make_backbone(), tmp_path / "hf")


def edit(folder: Path, *, config: Any = None, drop: tuple[str, ...] = (), **tensors: Any) -> None:
    """Changes config keys (None deletes one) and tensors ('__' stands for '.')."""
    path = folder / "config.json"
    data = json.loads(path.read_text()) | (config or {})
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    weights = load_file(folder / "model.safetensors")
    weights |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({k: v for k, v in weights.items() if k not in drop}, folder / "model.safetensors")


# Out


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        TIED,
        TIED.replace(mlp_activations=("gelu",)),
        TIED.replace(mlp_activations=("gelu_tanh",)),
        CONFIG.replace(mlp_activations=("gelu", "linear"), layer_norm_epsilon=1e-3),
        TIED.replace(mlp_activations=("silu", "linear"), relative_attention_num_buckets=8),
    ],
    ids=lambda c: f"{'-'.join(c.mlp_activations)} {'tied' if c.logits_via_embedding else 'untied'}",
)
def test_transformers_loads_what_we_write(tmp_path: Path, config: T5Config) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = make_backbone(config)
    path = to_huggingface(backbone, tmp_path / "hf")
    model, info = transformers.T5ForConditionalGeneration.from_pretrained(
        path, output_loading_info=True
    )
    assert not any(info.values()), info
    np.testing.assert_allclose(our_logits(backbone), their_logits(model), atol=1e-4)

    back = from_huggingface(path)
    assert (back.name, back.config, back.fingerprint) == ("hf", config, backbone.fingerprint)
    assert_same_arrays(back.params, backbone.params)


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = make_backbone(TIED, ml_dtypes.bfloat16)
    path = to_huggingface(backbone, tmp_path / "hf")
    assert_same_arrays(from_huggingface(path).params, backbone.params)
    model = transformers.T5ForConditionalGeneration.from_pretrained(path, dtype="float32")
    np.testing.assert_allclose(our_logits(backbone), their_logits(model), atol=1e-4)


def test_the_vocabulary_goes_along_and_our_folder_agrees(tmp_path: Path) -> None:
    vocabulary = tmp_path / "any.model"
    vocabulary.write_bytes(b"pieces")
    backbone = dataclasses.replace(make_backbone(), vocabulary_path=vocabulary)
    loaded = load_backbone(to_huggingface(backbone, tmp_path / "hf"))
    assert loaded.vocabulary_path is not None
    assert loaded.vocabulary_path.read_bytes() == b"pieces"
    ours = load_backbone(save_backbone(loaded, tmp_path / "ours"))
    assert ours.fingerprint == loaded.fingerprint == backbone.fingerprint
    assert_same_arrays(ours.params, loaded.params)


def test_nothing_is_overwritten_and_what_has_no_counterpart_is_refused(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="hf exists"):
        to_huggingface(make_backbone(), folder)
    for activations in (("linear", "gelu"), ("relu", "relu"), ("linear",)):
        odd = make_backbone(TIED.replace(mlp_activations=activations))
        with pytest.raises(ElmError, match="no Hugging Face counterpart"):
            to_huggingface(odd, folder.parent / "odd")
    assert not (folder.parent / "odd").exists()


# In: what transformers writes


@pytest.mark.parametrize(
    "kind", ["t5 tied", "t5 untied", "t5 unscaled but tied", "mt5", "mt5 tied"]
)
def test_we_load_what_transformers_writes(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    scaled = kind == "t5 tied"
    name = "MT5" if kind.startswith("mt5") else "T5"
    options = SIZES | ({} if scaled else {"feed_forward_proj": "gated-gelu"})
    if name == "T5":
        options["tie_word_embeddings"] = scaled
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(
        getattr(transformers, f"{name}Config")(**options)
    )
    if kind in ("t5 untied", "mt5"):
        model.lm_head.weight = torch.nn.Parameter(torch.randn(31, 12))
    model.save_pretrained(tmp_path / "hf", max_shard_size="3KB" if kind == "mt5" else "5GB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (kind == "mt5")

    loaded = load_backbone(tmp_path / "hf")
    assert loaded.config.logits_via_embedding == scaled
    np.testing.assert_allclose(our_logits(loaded), their_logits(model), atol=1e-4)


def test_older_files_repeat_the_embedding(tmp_path: Path) -> None:
    backbone = make_backbone(TIED)
    path = to_huggingface(backbone, tmp_path / "hf")
    shared = load_file(path / "model.safetensors")["shared.weight"]
    bias = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    edit(
        path,
        encoder__embed_tokens__weight=shared,
        decoder__embed_tokens__weight=shared,
        lm_head__weight=shared,
        **{bias: np.zeros((32, 3), np.float32)},
    )
    assert from_huggingface(path).fingerprint == backbone.fingerprint
    edit(path, drop=("shared.weight", "decoder.embed_tokens.weight"))
    assert from_huggingface(path).fingerprint == backbone.fingerprint
    for copy in ("lm_head.weight", "decoder.embed_tokens.weight"):
        edit(path, **{copy: shared + 1})
        with pytest.raises(ElmError, match=rf"{copy} differs from shared\.weight.*ties"):
            from_huggingface(path)
        edit(path, drop=(copy,))


def test_a_real_config_of_transformers_4() -> None:
    config = config_from_hf(
        {  # google/t5-v1_1-small
            "architectures": ["T5ForConditionalGeneration"], "d_ff": 1024, "d_kv": 64,
            "d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0,
            "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
            "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8,
            "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False, "use_cache": True, "vocab_size": 32128,
        }
    )  # fmt: skip
    assert config == T5Config(
        vocab_size=32128, emb_dim=512, num_heads=6, head_dim=64, mlp_dim=1024,
        num_encoder_layers=8, num_decoder_layers=8,
    )  # fmt: skip


def test_options_that_older_and_newer_configs_spell_out(folder: Path) -> None:
    wanted = from_huggingface(folder).config
    spelled = {"feed_forward_proj": "gelu_new", "is_gated_act": True, "dense_act_fn": "gelu_new"}
    nothing = {"pad_token_id": None, "num_decoder_layers": 1}
    edit(folder, config=spelled | nothing)
    assert from_huggingface(folder).config == wanted
    edit(folder, config={"feed_forward_proj": "gated-gelu", "dense_act_fn": "silu"})
    assert from_huggingface(folder).config.mlp_activations == ("silu", "linear")


# In: failures


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "umt55"}, "'umt55' is not supported.*did you mean 'umt5'.*t5, mt5"),
        ({"model_type": "bert"}, "'bert' is not supported"),
        ({"d_kv": None}, "key 'd_kv' is missing"),
        ({"d_kv": "five"}, "head_dim must be a positive integer, got 'five'"),
        ({"feed_forward_proj": "gated-gelo"}, "'gated-gelo'.*did you mean 'gelu'"),
        ({"feed_forward_proj": "fancy-gelu"}, "'fancy-gelu'.*not supported"),
        ({"dropout_rate": "a"}, "config.json"),
        ({"pad_token_id": 3}, "pad_token_id is 3; only 0"),
        ({"decoder_start_token_id": 2}, "decoder_start_token_id is 2; only 0"),
        ({"is_gated_act": "yes"}, "is_gated_act is 'yes', expected true or false"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or"),
        ({"num_decoder_layers": 0}, "num_decoder_layers must be a positive integer, got 0"),
    ],
)
def test_a_wrong_config_names_the_key(folder: Path, config: Any, message: str) -> None:
    edit(folder, config=config)
    with pytest.raises(ElmError, match=message) as caught:
        load_backbone(folder)
    assert str(folder / "config.json") in str(caught.value) and "\n" not in str(caught.value)


Q = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": (Q,)}, rf"tensor {Q} \(parameter encoder/layers_1/attention/query/kernel\)"),
        ({"drop": ("lm_head.weight",)}, "tensor lm_head.weight .*logits_dense.* is missing"),
        ({"extra__bias": np.ones(3)}, r"no parameter of the config takes tensor extra\.bias"),
        ({Q: np.ones((15, 11), np.float32)}, rf"{Q} has shape \(15, 11\), expected \(15, 12\)"),
        ({"config": {"num_layers": 1, "num_decoder_layers": 1}}, r"takes tensor .* and 6 more"),
        ({"config": {"num_layers": 3}}, r"encoder\.block\.2.*is missing"),
        ({"config": {"feed_forward_proj": "relu"}}, r"DenseReluDense\.wi\.weight .*is missing"),
        ({"config": {"tie_word_embeddings": True}}, r"lm_head\.weight differs"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, change: Any, message: str) -> None:
    edit(folder, **change)
    with pytest.raises(ElmError, match=message) as caught:
        from_huggingface(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_is_refused_with_the_way_out(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        from_huggingface(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ElmError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        from_huggingface(folder)


def test_damaged_shards_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    shard_of = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({k: tensors[k] for k in tensors if shard_of[k] == shard}, folder / shard)
    index.write_text(json.dumps({"weight_map": shard_of}))
    assert from_huggingface(folder).fingerprint == make_backbone().fingerprint

    index.write_text(json.dumps({"weight_map": shard_of | {"more.weight": "part-1.safetensors"}}))
    with pytest.raises(ElmError, match=r"part-1\.safetensors: tensor more\.weight is missing"):
        from_huggingface(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../part-1.safetensors"}}))
    with pytest.raises(ElmError, match="must be a file of the same folder"):
        from_huggingface(folder)
    index.write_text("{}")
    with pytest.raises(ElmError, match="'weight_map' is missing"):
        from_huggingface(folder)
    index.write_text(json.dumps({"weight_map": shard_of}))
    (folder / "part-0.safetensors").write_bytes(b"half")
    with pytest.raises(ElmError, match=r"part-0\.safetensors: truncated"):
        from_huggingface(folder)
    (folder / "part-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-0\.safetensors"):
        from_huggingface(folder)


# The pure functions


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_the_mapping_covers_every_array_once(config: T5Config) -> None:
    backbone = make_backbone(config)
    tensors = params_to_hf(backbone.params, config)
    assert len(tensors) == len(flatten(backbone.params))
    assert all(t.flags.c_contiguous for t in tensors.values())
    assert_same_arrays(params_from_hf(tensors, config), backbone.params)
    assert config_from_hf(config_to_hf(config)) == config


def test_params_to_hf_refuses_what_does_not_fit() -> None:
    flat = flatten(make_backbone().params)
    del flat["decoder/logits_dense/kernel"]
    with pytest.raises(ElmError, match="lacks 'decoder/logits_dense/kernel'"):
        params_to_hf(unflatten(flat), CONFIG)
