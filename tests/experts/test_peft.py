"""LoRA experts in and out of PEFT, against PEFT itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from elm_jax.checkpoints.huggingface import config_from_hf, config_to_hf, params_to_hf
from elm_jax.errors import ElmError
from elm_jax.experts import expert_shapes, flatten, init_expert
from elm_jax.experts.apply import backbone_shapes
from elm_jax.experts.peft import load_peft_expert, peft_from_lora, peft_module, save_peft_expert
from elm_jax.models import T5, LoraSpec, T5Config, get_spec

GATED = T5Config(
    vocab_size=31, emb_dim=12, num_heads=3, head_dim=5, mlp_dim=16,
    num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip
PLAIN = GATED.replace(logits_via_embedding=True, mlp_activations=("relu",))
TOKENS = np.array([[3, 4, 1, 0, 0], [9, 8, 7, 6, 1]], np.int32)
DECODER = np.array([[0, 5, 6], [0, 9, 2]], np.int32)
EVERYTHING = ("q", "k", "v", "o", "wi", "wo")

# name -> backbone, spec
OURS = {
    "q and v": (GATED, LoraSpec(rank=3, alpha=7.5)),
    "everything, gated": (GATED, LoraSpec(rank=2, alpha=5, targets=EVERYTHING)),
    "everything, plain and tied": (PLAIN, LoraSpec(rank=4, targets=EVERYTHING)),
    "encoder": (GATED, LoraSpec(rank=2, targets=("o", "wo"), blocks=("encoder",))),
    "cross, in another order": (PLAIN, LoraSpec(rank=2, targets=("v", "q"), blocks=("cross",))),
}
# name -> backbone, options of peft.LoraConfig
THEIRS: dict[str, tuple[T5Config, dict[str, Any]]] = {
    "PEFT's default modules": (PLAIN, dict(r=4, lora_alpha=6)),
    "all linear, rank-stabilised": (
        GATED, dict(r=3, lora_alpha=4, use_rslora=True, target_modules="all-linear"),
    ),
    "one half of the gate": (
        GATED, dict(r=2, target_modules=["wi_0", "decoder.block.0.layer.1.EncDecAttention.k"]),
    ),
    "a pattern": (GATED, dict(r=2, target_modules=r"encoder\.block\.\d+\.layer\.0.*\.(q|o)")),
    "a layer": (
        GATED,
        dict(r=2, target_modules=["q", "wo"], layers_to_transform=[1], layers_pattern="block"),
    ),
    "layers without their pattern": (
        PLAIN,
        dict(
            r=2, target_modules=["v"], layers_to_transform=0,
            exclude_modules=["encoder.block.0.layer.0.SelfAttention.v"],
        ),
    ),
    "ranks and alphas of their own": (
        GATED,
        dict(
            r=2, lora_alpha=3, target_modules=["q", "k", "wi_1"],
            rank_pattern={"EncDecAttention.q": 4, r"encoder\..*\.q": 1},
            alpha_pattern={"k": 5, "decoder.block.0.layer.2.DenseReluDense.wi_1": 1.7},
        ),
    ),
    "ranks of their own, rank-stabilised": (
        PLAIN,
        dict(r=2, lora_alpha=3, use_rslora=True, target_modules=["q", "o"], rank_pattern={"q": 3}),
    ),
}  # fmt: skip


def random_tree(shapes: Any, seed: int, deviation: float = 0.3) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(0, deviation, s.shape).astype(np.float32), shapes)


def our_logits(config: T5Config, spec: LoraSpec, expert: Any) -> np.ndarray:
    variables = {"params": random_tree(backbone_shapes(config), 0), "expert": expert}
    return np.asarray(jax.jit(T5(config, spec).apply)(variables, TOKENS, DECODER))


def torch_model(config: T5Config) -> Any:
    """Returns transformers' T5 with the weights of `our_logits`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    options = config_to_hf(config)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**options)).eval()
    tensors = params_to_hf(random_tree(backbone_shapes(config), 0), config)
    if not config.logits_via_embedding:  # transformers 5 ties every fresh model
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    state = {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and config_from_hf(options) == config
    return model


def their_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(TOKENS).long(),
            attention_mask=torch.from_numpy(TOKENS > 0).long(),
            decoder_input_ids=torch.from_numpy(DECODER).long(),
        )
    return out.logits.numpy()


def assert_same_arrays(found: Any, wanted: Any) -> None:
    found, wanted = flatten(found), flatten(wanted)
    assert list(found) == list(wanted)
    for path in wanted:
        np.testing.assert_array_equal(found[path], wanted[path], err_msg=path, strict=True)


# ------------------------------------------------------------------------------------ against PEFT


@pytest.mark.parametrize("name", OURS)
def test_our_export_in_peft(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config, spec = OURS[name]
    expert = random_tree(expert_shapes(config, spec), 1)
    save_peft_expert(spec, expert, tmp_path / "lora")
    model = torch_model(config)
    bare = their_logits(model)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    found = {k for k in loaded.state_dict() if "lora_" in k}
    assert len(found) == len(flatten(expert))
    theirs = their_logits(loaded)
    assert np.abs(theirs - bare).max() > 1e-2  # the expert does something
    np.testing.assert_allclose(our_logits(config, spec, expert), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", THEIRS)
def test_what_peft_saved(name: str, tmp_path: Path) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    config, options = THEIRS[name]
    model = peft.get_peft_model(
        torch_model(config), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **options)
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    spec, expert = load_peft_expert(tmp_path, config)
    theirs = their_logits(model)
    np.testing.assert_allclose(our_logits(config, spec, expert), theirs, rtol=0, atol=1e-4)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    filled = sum(np.any(leaf) for leaf in flatten(expert).values())
    assert filled == len(stored)
    # and out again: the same function
    save_peft_expert(spec, expert, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(torch_model(config), tmp_path / "again").eval()
    np.testing.assert_allclose(their_logits(again), theirs, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------- without PEFT


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("scan", [False, True])
def test_round_trip_is_bit_equal(name: str, scan: bool, tmp_path: Path) -> None:
    config, spec = OURS[name]
    expert = random_tree(expert_shapes(config, spec), 1)
    save_peft_expert(spec, expert, tmp_path / "lora", base_model="little")
    found, arrays = load_peft_expert(tmp_path / "lora", config.replace(scan_layers=scan))
    assert_same_arrays(arrays, expert)
    assert (found.rank, found.scale) == (spec.rank, spec.scale)
    assert set(found.targets) == set(spec.targets) and set(found.blocks) == set(spec.blocks)
    save_peft_expert(found, arrays, tmp_path / "again", base_model="little")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "lora" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_what_the_folder_holds(tmp_path: Path) -> None:
    spec = LoraSpec(rank=2, alpha=8, targets=("q",), blocks=("encoder",))
    expert = random_tree(expert_shapes(PLAIN, spec), 1)
    folder = save_peft_expert(spec, expert, tmp_path / "deep/lora", base_model="little")
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    config = json.loads((folder / "adapter_config.json").read_text())
    modules = [f"encoder.block.{i}.layer.0.SelfAttention.q" for i in (0, 1)]
    assert config["target_modules"] == modules and config["base_model_name_or_path"] == "little"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 8, "LORA")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name: t.shape for name, t in tensors.items()} == {
        f"base_model.model.{module}.lora_{side}.weight": shape
        for module in modules
        for side, shape in (("A", (2, 12)), ("B", (15, 2)))
    }
    with safe_open(folder / "adapter_model.safetensors", "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save_peft_expert(spec, expert, folder)


def test_zeros_fill_the_grid_and_stay_zero(tmp_path: Path) -> None:
    """A module that the adapter lacks, and a rank, has no gradient: training leaves it alone."""
    spec = LoraSpec(rank=1, alpha=2, targets=("q",), blocks=("encoder",))
    tree = random_tree(expert_shapes(GATED, spec), 1)
    del tree["encoder"]["layers_1"]
    save_peft_expert(spec, tree, tmp_path / "lora")
    found, expert = load_peft_expert(tmp_path / "lora", GATED)
    absent = expert["encoder"]["layers_1"]["attention"]["query"]
    assert found == spec and not np.any(absent["lora_a"]) and not np.any(absent["lora_b"])
    variables = random_tree(backbone_shapes(GATED), 0)

    def loss(expert: Any) -> Any:
        logits = T5(GATED, found).apply({"params": variables, "expert": expert}, TOKENS, DECODER)
        return jax.numpy.square(logits).mean()

    gradient = jax.jit(jax.grad(loss))(expert)
    assert np.any(gradient["encoder"]["layers_0"]["attention"]["query"]["lora_a"])
    assert not any(np.any(g) for g in jax.tree.leaves(gradient["encoder"]["layers_1"]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(dtype: str, tmp_path: Path) -> None:
    spec = LoraSpec(rank=2, alpha=8, targets=("q",), blocks=("encoder",))
    expert = jax.tree.map(
        lambda x: x.astype(jax.numpy.dtype(dtype)), random_tree(expert_shapes(PLAIN, spec), 1)
    )
    folder = save_peft_expert(spec, expert, tmp_path / "lora")
    stored = load_file(folder / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {dtype}
    _, found = load_peft_expert(folder, PLAIN)
    assert_same_arrays(found, jax.tree.map(lambda x: x.astype(np.float32), expert))


def test_paths_of_every_projection() -> None:
    spec = LoraSpec(rank=1, targets=EVERYTHING)
    paths = {path.rpartition("/")[0] for path in flatten(expert_shapes(GATED, spec))}
    names = {peft_module(path).name for path in paths}
    assert len(names) == len(paths) == 2 * 7 + 11
    assert {
        "encoder.block.1.layer.1.DenseReluDense.wi_1",
        "decoder.block.0.layer.1.EncDecAttention.o",
        "decoder.block.0.layer.2.DenseReluDense.wo",
    } <= names
    for path in ("encoder/layers_0/mlp/wi_2", "encoder/layers_0/cross/query", "encoder/mlp/wi"):
        with pytest.raises(ElmError, match="no projection of a Hugging Face T5"):
            peft_module(path)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    three = GATED.replace(mlp_activations=("relu", "linear", "linear"))
    spec = LoraSpec(rank=1, targets=("wi",))
    with pytest.raises(ElmError, match="mlp/wi_2"):
        save_peft_expert(spec, random_tree(expert_shapes(three, spec), 0), tmp_path / "a")
    for kind in ("adapter", "full"):
        with pytest.raises(ElmError, match=f"no counterpart of an expert of kind '{kind}'"):
            save_peft_expert(get_spec(kind), {}, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# ----------------------------------------------------------------------------------- bad input


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spec = LoraSpec(rank=2, alpha=4, targets=("q", "v"))
    return save_peft_expert(spec, random_tree(expert_shapes(PLAIN, spec), 1), tmp_path / "lora")


def edit(folder: Path, drop: str | None = None, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    data = json.loads(path.read_text()) | changes
    data.pop(drop, None)
    path.write_text(json.dumps(data))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(folder: Path, message: str, file: str = "adapter_config.json") -> None:
    with pytest.raises(ElmError, match=message) as caught:
        load_peft_expert(folder, PLAIN)
    assert str(folder / file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "'use_dora' is True, which cannot be imported: DoRA"),
        ({"bias": "lora_only"}, "'bias' is 'lora_only'.*trains biases"),
        ({"lora_bias": True}, "'lora_bias'.*the update has a bias"),
        ({"modules_to_save": ["lm_head"]}, r"'modules_to_save' is \['lm_head'\].*whole modules"),
        ({"fan_in_fan_out": True}, "no transposed matrices"),
        ({"trainable_token_indices": [3]}, "rows of the embedding"),
        ({"target_parameters": ["a"]}, "'target_parameters'"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"a_new_option": 3}, "'a_new_option' is 3.*does not know the option"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'.*path_initial_model_for_weight"),
        ({"init_lora_weights": "olora"}, "'olora'.*frozen matrices"),
        ({"init_lora_weights": 1}, "'init_lora_weights' is 1"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA'"),
        ({"drop": "peft_type"}, "peft_type is None"),
        ({"target_modules": ["qq"]}, r"\['qq'\] match no projection.*did you mean 'q'.*has k, o"),
        ({"target_modules": []}, "match no projection"),
        ({"drop": "target_modules"}, "match no projection"),
        ({"target_modules": r"model\.layers.*"}, "match no projection"),
        ({"target_modules": ["q", "shared"]}, "take in shared, which cannot carry a LoRA"),
        ({"target_modules": ["q", "lm_head"]}, "take in lm_head"),
        ({"target_modules": ".*"}, "take in shared"),
        ({"target_modules": [1]}, "expected a list of strings"),
        ({"target_modules": "(q"}, r"'\(q' is no regular expression"),
        ({"target_modules": "(a+)+b"}, "could take for ever"),
        ({"target_modules": "(a|a)*b"}, "could take for ever"),
        ({"target_modules": ".*.*.*.*.*q"}, "could take for ever"),
        ({"target_modules": r"(?x)(a+) +"}, "could take for ever"),
        ({"rank_pattern": {"(q": 2}}, "no regular expression"),
        ({"rank_pattern": [1]}, "'rank_pattern' is .*expected a JSON object"),
        ({"rank_pattern": {"q": 3.0}}, "rank_pattern 'q' is 3.0, expected an integer"),
        ({"alpha_pattern": {"q": -1}}, "alpha_pattern 'q' is -1, expected a positive number"),
        ({"r": 0}, "'r' is 0, expected an integer from 1"),
        ({"r": True}, "'r' is True"),
        ({"r": 10**400}, "'r' is 1000"),
        ({"lora_alpha": 10**400}, "'lora_alpha' is 1000"),
        ({"lora_alpha": float("nan")}, "invalid JSON.*NaN is no number"),
        ({"lora_alpha": "8"}, "'lora_alpha' is '8'"),
        ({"lora_alpha": 1e-60}, "alpha of .* is out of range"),
        ({"use_rslora": "yes"}, "expected true or false"),
        ({"lora_dropout": 1.5}, "'lora_dropout' is 1.5, expected a number below 1"),
        ({"layers_to_transform": ["0"]}, "expected integers"),
        ({"layers_to_transform": [7]}, "match no projection"),
        ({"target_modules": "q", "layers_to_transform": [0]}, "need 'target_modules' as a list"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_represented(folder: Path, change: Any, message: str) -> None:
    edit(folder, **change)
    with pytest.raises(ElmError, match=message) as caught:
        load_peft_expert(folder, PLAIN)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def full(value: float, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, value, np.float32)


PREFIX = "base_model.model."
Q = f"{PREFIX}encoder.block.1.layer.0.SelfAttention.q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"tensor '{Q}' is missing"),
        (lambda t: t.update({Q: full(1, (3, 12))}), r"shape \(3, 12\), expected \(2, 12\)"),
        (lambda t: t.update({Q: np.ones((2, 12), np.float64)}), "dtype F64; accepted: F32"),
        (lambda t: t.update({Q: full(np.nan, (2, 12))}), "not finite"),
        (lambda t: t.update({Q.replace(".q.", ".k."): t[Q]}), "'target_modules' leave out"),
        (lambda t: t.update({Q.replace(".1.", ".2."): t[Q]}), "is of no projection .*did you mean"),
        (lambda t: t.update({PREFIX + "shared.lora_embedding_A": t[Q]}), "LoRA on an embedding"),
        (lambda t: t.update({Q.replace("lora_A.weight", "lora_magnitude_vector"): t[Q]}), "DoRA"),
        (lambda t: t.update({"../../x": t[Q]}), r"'\.\./\.\./x' is of no projection"),
        (lambda t: t.clear(), "is missing"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(folder: Path, change: Any, message: str) -> None:
    edit_tensors(folder, change)
    refused(folder, message, "adapter_model.safetensors")


def test_a_rank_beyond_all_widths(folder: Path) -> None:
    """Zeros would fill the grid: one module of an absurd rank must not ask for all of them."""
    edit(folder, r=40, target_modules=["encoder.block.1.layer.0.SelfAttention.q"])
    tensors = {Q: full(1, (40, 12)), Q.replace("_A", "_B"): full(1, (15, 40))}
    edit_tensors(folder, lambda t: (t.clear(), t.update(tensors)))
    with pytest.raises(ElmError, match="rank 40 is above the largest width, 16"):
        load_peft_expert(folder, PLAIN)


def test_missing_and_damaged_files(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    refused(folder, "truncated or damaged", weights.name)
    weights.write_bytes(b"")
    refused(folder, "truncated or damaged", weights.name)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        load_peft_expert(folder, PLAIN)
    (folder / "adapter_model.bin").write_bytes(b"x")
    refused(folder, "is a pickle, which can run code.*save_pretrained", "adapter_model.bin")
    config = folder / "adapter_config.json"
    config.write_bytes(b"[]")
    refused(folder, "expected a JSON object")
    for data in (b"{", b"[" * 99999, b"\xff", b'{"r": Infinity}'):
        config.write_bytes(data)
        refused(folder, "invalid JSON")
    config.write_bytes(b" " * (2**24 + 1))
    refused(folder, "expected at most 16,777,216")
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_peft_expert(folder, PLAIN)


def test_an_adapter_for_another_backbone(folder: Path) -> None:
    with pytest.raises(ElmError, match=r"shape \(2, 12\), expected \(2, 20\)"):
        load_peft_expert(folder, PLAIN.replace(emb_dim=20))
    with pytest.raises(ElmError, match=r"block\.2\..* is missing"):
        load_peft_expert(folder, PLAIN.replace(num_encoder_layers=3))


def test_options_that_change_nothing_are_taken(folder: Path) -> None:
    spec, expert = load_peft_expert(folder, PLAIN)
    edit(
        folder, init_lora_weights="gaussian", revision="main", peft_version="9",
        eva_config={"rho": 2}, megatron_core="megatron.core", qalora_group_size=16, another=None,
    )  # fmt: skip
    again, arrays = load_peft_expert(folder, PLAIN)
    assert again == spec
    assert_same_arrays(arrays, expert)


def test_a_fresh_lora_is_the_identity_there(tmp_path: Path) -> None:
    spec = LoraSpec(rank=2)
    config, tensors = peft_from_lora(spec, init_expert(PLAIN, spec, jax.random.key(0)))
    assert config["target_modules"] == ["q", "v"]
    assert all(t.any() == ("lora_A" in name) for name, t in tensors.items())
