"""The families of T5 against transformers: numbers, tensors, tokens, from folder to folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from elm_jax.checkpoints import Backbone, load_backbone, save_backbone, save_huggingface
from elm_jax.data.vocabulary import ByteVocabulary, Vocabulary, load_vocabulary
from elm_jax.errors import ElmError
from elm_jax.models import T5
from elm_jax.training.experts import backbone_vocabulary

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIGURATIONS = 6
FAMILIES: dict[str, dict[str, Any]] = {
    # What the published config.json of each says, sizes apart.
    "T5 1.0": {"choices": {"feed_forward_proj": ("relu", "gelu")}, "tied": (True,)},
    "T5 1.1, LM-adapt, T0, FLAN-T5": {
        "choices": {"feed_forward_proj": ("gated-gelu", "gated-silu")},
        "tied": (False, False, True),
    },
    "mT5": {
        "choices": {"feed_forward_proj": ("gated-gelu",)},
        "tied": (False, True),
        "kind": "MT5",
    },
    "umT5": {
        "choices": {"feed_forward_proj": ("gated-gelu", "relu")},
        "tied": (True,),
        "kind": "UMT5",
    },
    "ByT5": {
        "choices": {"feed_forward_proj": ("gated-gelu",), "tokenizer_class": ("ByT5Tokenizer",)},
        "tied": (False,),
        "sizes": {"vocab_size": 384, "num_decoder_layers": 1},
    },
}


def random_model(family: str, number: int) -> Any:
    """Returns a random model of a family: odd heads, widths that do not divide each other."""
    facts = FAMILIES[family]
    rng = np.random.default_rng([number, len(family)])
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    options = {
        "vocab_size": int(rng.integers(40, 70)),
        "d_model": int(rng.integers(9, 24)),
        "num_heads": pick(1, 3, 5, 7),
        "d_kv": int(rng.integers(2, 8)),
        "d_ff": int(rng.integers(8, 30)),
        "num_layers": (1, 2, 1, 3, 1, 4)[number],
        "num_decoder_layers": (1, 1, 3, 1, 4, 2)[number],
        "relative_attention_num_buckets": pick(32, 8),
        "relative_attention_max_distance": pick(128, 20),
        **facts.get("sizes", {}),
        **{key: pick(*values) for key, values in facts["choices"].items()},
    }
    tied = facts["tied"][number % len(facts["tied"])]
    kind = facts.get("kind", "T5")
    if kind == "T5":
        options["tie_word_embeddings"] = tied
    torch.manual_seed(number)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        if not tied:  # transformers 5 ties every fresh model; a loaded one keeps its own weights
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def batch(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, vocab_size, (3, 24)).astype(np.int32)
    targets = rng.integers(2, vocab_size, (3, 11)).astype(np.int32)
    inputs[0, 15:] = inputs[1, 3:] = 0
    targets[:, 0] = targets[2, 4:] = 0
    return inputs, targets


def our_numbers(backbone: Backbone, inputs: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
    """Returns the encoder's and decoder's last hidden states and the logits."""

    @jax.jit
    def run(params: Any) -> Any:
        return T5(backbone.config).apply(
            {"params": params}, inputs, targets,
            capture_intermediates=lambda module, _: module.name in ("encoder_norm", "decoder_norm"),
        )  # fmt: skip

    logits, state = run(backbone.params)
    seen = state["intermediates"]
    hidden = [seen[stack][f"{stack}_norm"]["__call__"][0] for stack in ("encoder", "decoder")]
    return [np.asarray(x) for x in (*hidden, logits)]


def their_numbers(model: Any, inputs: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
    ids = torch.tensor(inputs).long()
    with torch.no_grad():
        out = model(
            input_ids=ids, attention_mask=(ids > 0).long(),
            decoder_input_ids=torch.tensor(targets).long(), output_hidden_states=True,
        )  # fmt: skip
    hidden = out.encoder_last_hidden_state, out.decoder_hidden_states[-1]
    return [x.numpy() for x in (*hidden, out.logits)]


@pytest.mark.parametrize("number", range(CONFIGURATIONS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_and_back(tmp_path: Path, family: str, number: int) -> None:
    model = random_model(family, number)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_backbone(tmp_path / "theirs")

    inputs, targets = batch(loaded.config.vocab_size)
    theirs = their_numbers(model, inputs, targets)
    for ours, wanted in zip(our_numbers(loaded, inputs, targets), theirs, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-4)
        assert wanted.std() > 0.1  # else the tolerance would say nothing

    written = save_huggingface(loaded, tmp_path / "ours")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(written / "model.safetensors")
    if family == "mT5" and "lm_head.weight" not in before:  # unscaled, so written as a layer
        np.testing.assert_array_equal(after.pop("lm_head.weight"), after["shared.weight"])
    if family.startswith("T5 1.1") and "lm_head.weight" not in before:
        assert loaded.config.logits_via_embedding
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    if number == 0:  # what transformers loads of ours is the same model
        kind = "UMT5" if family == "umT5" else "T5"
        again, info = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(
            written, output_loading_info=True
        )
        assert not any(info.values()), info
        for ours, wanted in zip(their_numbers(again.eval(), inputs, targets), theirs, strict=True):
            np.testing.assert_array_equal(ours, wanted)


def test_an_output_layer_of_its_own_as_googles_umt5_has(tmp_path: Path) -> None:
    model = random_model("umT5", 0)
    model.save_pretrained(tmp_path / "umt5")
    config = tmp_path / "umt5" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    weights = load_file(tmp_path / "umt5" / "model.safetensors")
    weights["lm_head.weight"] = np.flip(weights["shared.weight"]).copy()
    save_file(weights, tmp_path / "umt5" / "model.safetensors", {"format": "pt"})
    loaded = load_backbone(tmp_path / "umt5")
    inputs, targets = batch(loaded.config.vocab_size)
    theirs = type(model).from_pretrained(tmp_path / "umt5").eval()
    scale = theirs.config.d_model**-0.5 if theirs.config.tie_word_embeddings else 1.0
    wanted = their_numbers(theirs, inputs, targets)[-1] / scale  # transformers 5 ties every umT5
    np.testing.assert_allclose(our_numbers(loaded, inputs, targets)[-1], wanted, atol=1e-4)
    again = load_file(save_huggingface(loaded, tmp_path / "ours") / "model.safetensors")
    assert again.keys() == weights.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_round_trip_keeps_the_dtype(tmp_path: Path, dtype: str) -> None:
    model = random_model("T5 1.0", 0).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    loaded = load_backbone(tmp_path / "theirs")
    written = load_file(save_huggingface(loaded, tmp_path / "ours") / "model.safetensors")
    shards = [load_file(path) for path in (tmp_path / "theirs").glob("*.safetensors")]
    before = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert written.keys() == before.keys() and len(shards) > 1
    for name, tensor in before.items():
        assert str(tensor.dtype) == str(written[name].dtype) == dtype
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


# Tokens

TEXTS = (
    "Mr. Knightley, a sensible man about seven or eight-and-thirty.",
    "Ünïcode: ½ ﬁne “quotes” — 日本語 … №7",
    "A <extra_id_0> of <extra_id_1> and <extra_id_99> .",
)


def with_tokenizer(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return folder


def test_ids_are_the_tokenizers_sentinels_included(tmp_path: Path, shared_data: Path) -> None:
    folder = with_tokenizer(tmp_path / "t5", random_model("T5 1.1, LM-adapt, T0, FLAN-T5", 0))
    shutil.copy(shared_data / "vocab/t5_32k/spiece.model", folder)
    theirs = transformers.T5Tokenizer.from_pretrained(str(folder))
    backbone = load_backbone(folder)
    assert backbone.vocabulary_path == folder / "spiece.model"
    ours = load_vocabulary(backbone.vocabulary_path)
    assert ours.vocab_size == len(theirs) == 32100
    names = [f"<extra_id_{i}>" for i in range(100)]
    assert [ours.sentinel(i) for i in range(100)] == theirs.convert_tokens_to_ids(names)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    # 32,100 ids are more than this model's rows.
    rows = backbone.config.vocab_size
    with pytest.raises(ElmError, match=rf"has 32100 ids, but backbone 't5' has {rows} embeddings"):
        backbone_vocabulary(backbone)


def test_bytes_are_byt5s(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "byt5", random_model("ByT5", 0))
    theirs = transformers.ByT5Tokenizer()
    backbone = load_backbone(folder)
    assert backbone.vocabulary_path == folder / "config.json"  # which names the tokenizer
    theirs.save_pretrained(folder)
    backbone = load_backbone(folder)
    assert backbone.vocabulary_path == folder / "tokenizer_config.json"
    ours = backbone_vocabulary(backbone)
    assert isinstance(ours, ByteVocabulary)
    assert ours.vocab_size == len(theirs) == 384
    names = [f"<extra_id_{i}>" for i in range(125)]
    assert [ours.sentinel(i) for i in range(125)] == theirs.convert_tokens_to_ids(names)
    for text in (*TEXTS, "", "tab\tand\nline", "<extra_id_125> <extra_id_01>", "a<extra_id_7>b"):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids
        if "extra" not in text:
            assert ours.decode([*ids, 1, 5]) == text
    assert ours.decode([100, 260, 0, 300 - 41, 1000]) == "a<extra_id_1><extra_id_0>"
    assert ours.encode_all(TEXTS) == [ours.encode(text) for text in TEXTS]
    with pytest.raises(ElmError, match="has 125 sentinels, no <extra_id_125>"):
        ours.sentinel(125)
    # It goes along, in our folders and Hugging Face's.
    for save, name in ((save_backbone, "ours"), (save_huggingface, "hf")):
        again = load_backbone(save(backbone, tmp_path / name))
        assert again.vocabulary_path == tmp_path / name / "tokenizer_config.json"
        assert load_vocabulary(again.vocabulary_path).vocab_size == 384
    tokenizer = transformers.ByT5Tokenizer.from_pretrained(str(tmp_path / "hf"))
    assert len(tokenizer) == 384 and tokenizer("é").input_ids == [198, 172, 1]


def test_a_model_with_sentinels_of_its_own_gets_no_more(tmp_path: Path, shared_data: Path) -> None:
    """As mT5's has."""
    plain = Vocabulary(shared_data / "vocab/t5_32k/spiece.model")
    own = tmp_path / "spiece.model"
    own.write_bytes(plain._processor.serialized_model_proto())
    assert load_vocabulary(plain.path).vocab_size == load_vocabulary(own).vocab_size == 32100
    assert load_vocabulary(own).sentinel(0) == 32099


def test_vocabulary_files_that_are_neither(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    with pytest.raises(FileNotFoundError, match="tokenizer_config"):
        load_vocabulary(path)
    for text, message in (
        ("{", "invalid JSON"),
        ("[]", "does not name the tokenizer_class"),
        (json.dumps({"tokenizer_class": "T5Tokenizer"}), "does not name the tokenizer_class"),
        (json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": "x"}), "extra_ids is 'x'"),
    ):
        path.write_text(text)
        with pytest.raises(ElmError, match=message):
            load_vocabulary(path)
