"""Bottleneck adapters in and out of AdapterHub's format, against its library and by hand."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_peft import (
    DECODER,
    GATED,
    PLAIN,
    TOKENS,
    assert_same_arrays,
    our_logits,
    random_tree,
    their_logits,
    torch_model,
)

from elm_jax.checkpoints import Backbone, to_huggingface
from elm_jax.errors import ElmError
from elm_jax.experts import expert_shapes, flatten
from elm_jax.experts.adapterhub import (
    adapters_from_expert,
    load_adapters_expert,
    save_adapters_expert,
)
from elm_jax.experts.apply import backbone_shapes
from elm_jax.models import AdapterSpec, T5Config, get_spec

HOULSBY = AdapterSpec(
    bottleneck=5, placement="sequential", sublayers=("self_attention", "mlp"),
    activation="silu", use_bias=True, inner_residual=True,
)  # fmt: skip
# name -> spec of ours that has a counterpart there
OURS = {
    "houlsby": HOULSBY,
    "feed-forward": dataclasses.replace(HOULSBY, sublayers=("mlp",), activation="gelu"),
    "no-bias": dataclasses.replace(HOULSBY, use_bias=False, activation="relu", bottleneck=7),
    "attention": dataclasses.replace(
        HOULSBY, sublayers=("self_attention",), activation="gelu_tanh", bottleneck=1
    ),
}
# name -> class and options of an adapter there that has a counterpart here
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "double_seq_bn": ("DoubleSeqBnConfig", dict(reduction_factor=2)),
    "scaled": (
        "BnConfig",
        dict(mh_adapter=False, output_adapter=True, reduction_factor=5, non_linearity="gelu_new",
             scaling=1.7, residual_before_ln=False, adapter_residual_before_ln=True),
    ),
    "attention": (
        "BnConfig",
        dict(mh_adapter=True, output_adapter=False, non_linearity="gelu", dropout=0.1,
             reduction_factor={"0": 3, "default": 2.5}),
    ),
}  # fmt: skip
# name -> class, options, and why it has none
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "seq_bn": ("SeqBnConfig", {}, "original_ln_before.*Pfeiffer"),
    "par_bn": ("ParBnConfig", {}, "'is_parallel' is True.*before the layer norm, ours after"),
    "ln_after": ("DoubleSeqBnConfig", dict(ln_after=True), "'ln_after'"),
    "gate": ("DoubleSeqBnConfig", dict(use_gating=True), "'use_gating'.*gate"),
    "learned": ("DoubleSeqBnConfig", dict(scaling="learned"), "'scaling' is 'learned'"),
    "channel": ("AdapterPlusConfig", dict(stochastic_depth=0.0), "original_ln_before|scaling"),
    "compacter": ("CompacterConfig", dict(phm_dim=2, reduction_factor=2), "'phm_layer'.*Kronecker"),
    "cross": ("DoubleSeqBnConfig", dict(cross_adapter=True), "'cross_adapter'.*cross-attention"),
    "leave_out": ("DoubleSeqBnConfig", dict(leave_out=[1]), r"'leave_out' is \[1\].*every layer"),
    "inverse": ("DoubleSeqBnInvConfig", {}, "'inv_adapter' is 'nice'.*invertible"),
    "lora": ("LoRAConfig", {}, "'architecture' is 'lora'"),
    "head": ("DoubleSeqBnConfig", dict(with_head=True), "a prediction head.*with_head=False"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the library has worked on; see adapters_reference.py."""
    python = os.environ.get("ELM_JAX_ADAPTERS_PYTHON")
    if not python:
        pytest.skip(
            "`adapters` needs an older transformers than ours: pip install torch adapters in an "
            "environment of its own, and name its Python in ELM_JAX_ADAPTERS_PYTHON"
        )
    folder = tmp_path_factory.mktemp("reference")
    params = random_tree(backbone_shapes(GATED), 0)
    to_huggingface(Backbone("little", GATED, params, ""), folder / "backbone")
    save_file(
        {"input_ids": TOKENS, "attention_mask": (TOKENS > 0).astype(np.int32),
         "decoder_input_ids": DECODER},
        folder / "tokens.safetensors",
    )  # fmt: skip
    for name, spec in OURS.items():
        expert = random_tree(expert_shapes(GATED, spec), 1)
        save_adapters_expert(spec, expert, folder / "ours" / name, name=f"little.{name}")
    wanted = THEIRS | {name: case[:2] for name, case in REFUSED.items()}
    (folder / "theirs.json").write_text(json.dumps(wanted))
    program = Path(__file__).with_name("adapters_reference.py")
    done = subprocess.run([python, program, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


# ------------------------------------------------------------------------------- against `adapters`


@pytest.mark.parametrize("name", OURS)
def test_our_export_in_adapters(name: str, reference: Path) -> None:
    logits = load_file(reference / "logits.safetensors")
    theirs = logits[f"ours/{name}"]
    assert np.abs(theirs - logits["backbone"]).max() > 1e-2
    expert = random_tree(expert_shapes(GATED, OURS[name]), 1)
    np.testing.assert_allclose(our_logits(GATED, OURS[name], expert), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", THEIRS)
def test_what_adapters_saved(name: str, reference: Path) -> None:
    theirs = load_file(reference / "logits.safetensors")[f"theirs/{name}"]
    spec, expert = load_adapters_expert(reference / "theirs" / name, GATED)
    np.testing.assert_allclose(our_logits(GATED, spec, expert), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, reference: Path) -> None:
    with pytest.raises(ElmError, match=REFUSED[name][2]) as caught:
        load_adapters_expert(reference / "theirs" / name, GATED)
    assert str(reference / "theirs" / name) in str(caught.value)


@pytest.mark.parametrize("name", ["seq_bn", "par_bn"])
def test_the_refused_forms_differ_from_all_of_ours(name: str, reference: Path) -> None:
    """The same arrays in any of our forms give other numbers."""
    theirs = load_file(reference / "logits.safetensors")[f"theirs/{name}"]
    spec, expert = load_by_force(reference / "theirs" / name)
    forms = [
        dataclasses.replace(spec, placement=placement, inner_residual=inner)
        for placement, inner in (("parallel", False), ("sequential", False), ("sequential", True))
    ]
    for form in forms:
        assert np.abs(our_logits(GATED, form, expert) - theirs).max() > 1e-2


def load_by_force(folder: Path) -> tuple[AdapterSpec, Any]:
    """Reads an adapter as if it were Houlsby's."""
    copy = folder.with_name(f"{folder.name}-copy")
    copy.mkdir(exist_ok=True)
    (copy / "adapter.safetensors").write_bytes((folder / "adapter.safetensors").read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    config["config"] |= {"is_parallel": False, "original_ln_before": False}
    (copy / "adapter_config.json").write_text(json.dumps(config))
    return load_adapters_expert(copy, GATED)


# ------------------------------------------------------------------------------------- by hand


def hooked_logits(config: T5Config, folder: Path, activation: Callable[[Any], Any]) -> np.ndarray:
    """Runs transformers' T5 with y + A(y) after every sublayer that a folder has an adapter for."""
    import torch

    options = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter.safetensors")
    model = torch_model(config)

    def adapt(place: str, y: Any) -> Any:
        part = {
            key: torch.from_numpy(tensors[f"{place}.adapters.{options['name']}.{key}"])
            for key in ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight",
                        "adapter_up.bias")
        }  # fmt: skip
        h = activation(y @ part["adapter_down.0.weight"].T + part["adapter_down.0.bias"])
        return y + h @ part["adapter_up.weight"].T + part["adapter_up.bias"]

    def hook(place: str) -> Callable[..., Any]:
        def run(module: Any, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (adapt(place, output[0]), *output[1:])
            return adapt(place, output)

        return run

    for name, module in model.named_modules():
        place = name.rpartition(".")[0]
        if name.endswith((".SelfAttention", ".DenseReluDense")) and any(
            tensor.startswith(f"{place}.adapters.") for tensor in tensors
        ):
            module.register_forward_hook(hook(place))
    return their_logits(model)


@pytest.mark.parametrize("name", OURS)
def test_our_export_in_torch(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    activations = {
        "silu": torch.nn.functional.silu,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    config, spec = (PLAIN if name == "no-bias" else GATED), OURS[name]
    expert = random_tree(expert_shapes(config, spec), 1)
    save_adapters_expert(spec, expert, tmp_path / "out", name="little")
    theirs = hooked_logits(config, tmp_path / "out", activations[spec.activation])
    np.testing.assert_allclose(our_logits(config, spec, expert), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_round_trip_is_bit_equal(name: str, tmp_path: Path) -> None:
    spec = OURS[name]
    expert = random_tree(expert_shapes(GATED, spec), 1)
    save_adapters_expert(spec, expert, tmp_path / "out", name="little")
    for scan in (False, True):
        found, arrays = load_adapters_expert(tmp_path / "out", GATED.replace(scan_layers=scan))
        assert found == spec
        assert_same_arrays(arrays, expert)
    save_adapters_expert(found, arrays, tmp_path / "again", name="little")
    for file in ("adapter_config.json", "adapter.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_what_the_folder_holds(tmp_path: Path) -> None:
    spec = OURS["feed-forward"]
    expert = random_tree(expert_shapes(GATED, spec), 1)
    folder = save_adapters_expert(spec, expert, tmp_path / "out", name="a.b", base_model="little")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["name"], config["model_type"], config["hidden_size"]) == ("a_b", "t5", 12)
    options = config["config"]
    assert options["non_linearity"] == "gelu" and int(12 // options["reduction_factor"]) == 5
    assert (options["mh_adapter"], options["output_adapter"]) == (False, True)
    shapes = {name: t.shape for name, t in load_file(folder / "adapter.safetensors").items()}
    places = ("encoder.block.0.layer.1", "encoder.block.1.layer.1", "decoder.block.0.layer.2")
    parts = {"down.0.weight": (5, 12), "down.0.bias": (5,), "up.weight": (12, 5), "up.bias": (12,)}
    assert shapes == {
        f"{place}.adapters.a_b.adapter_{part}": shape
        for place in places
        for part, shape in parts.items()
    }


@pytest.mark.parametrize(("dim", "bottleneck"), [(12, 5), (512, 64), (768, 100), (1024, 7), (5, 9)])
def test_reduction_factors(dim: int, bottleneck: int) -> None:
    config = GATED.replace(emb_dim=dim, num_encoder_layers=1)
    spec = dataclasses.replace(HOULSBY, bottleneck=bottleneck)
    tree = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), expert_shapes(config, spec))
    options = adapters_from_expert(spec, tree)[0]["config"]
    assert int(dim // options["reduction_factor"]) == bottleneck


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(placement="parallel", inner_residual=False), "'parallel'.*before the layer norm"),
        (dict(inner_residual=False), "inner_residual=False.*always adds"),
        (dict(train_layer_norms=True), "train_layer_norms=True.*layer norms frozen"),
    ],
)
def test_what_cannot_be_exported(changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ElmError, match=message):
        save_adapters_expert(dataclasses.replace(HOULSBY, **changes), {}, tmp_path / "out")
    for kind in ("lora", "full"):
        with pytest.raises(ElmError, match=f"no counterpart of an expert of kind '{kind}'"):
            save_adapters_expert(get_spec(kind), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- bad input


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    expert = random_tree(expert_shapes(GATED, HOULSBY), 1)
    return save_adapters_expert(HOULSBY, expert, tmp_path / "out", name="little")


def edit(folder: Path, options: Any = None, drop: str | None = None, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    data = json.loads(path.read_text()) | changes
    data["config"] = data["config"] | (options or {}) if "config" not in changes else data["config"]
    data.pop(drop, None)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"is_parallel": True}}, REFUSED["par_bn"][2]),
        ({"options": {"original_ln_before": True}}, REFUSED["seq_bn"][2]),
        ({"options": {"original_ln_after": False}}, "residual stream would be lost"),
        ({"options": {"residual_before_ln": "post_add"}}, "'post_add'.*needs original_ln_before"),
        ({"options": {"mh_adapter": False, "output_adapter": False}}, "there is no adapter"),
        ({"options": {"scaling": "channel"}}, "'scaling' is 'channel'.*learned"),
        ({"options": {"scaling": 0}}, "'scaling' is 0, which is out of range"),
        ({"options": {"ln_before": True}}, "'ln_before' is True.*a mean and a bias"),
        ({"options": {"non_linearity": "leakyrelu"}}, "'leakyrelu', which cannot be imported"),
        ({"options": {"non_linearity": None}}, "'non_linearity' is None"),
        ({"options": {"reduction_factor": {"0": 2, "default": 6}}}, "one bottleneck in all layers"),
        ({"options": {"reduction_factor": {"0": 2}}}, "'reduction_factor' is .*positive number"),
        ({"options": {"reduction_factor": 0}}, "'reduction_factor' is 0, expected a positive"),
        ({"options": {"reduction_factor": 1.5}}, r"shape \(5,.*expected \(8,"),
        ({"options": {"new_option": [1]}}, r"'new_option' is \[1\], an option that this elm_jax"),
        ({"options": {"architecture": "union"}}, "'union', which is no bottleneck adapter"),
        ({"config": "houlsby"}, "'config' is 'houlsby', expected the adapter's options"),
        ({"name": "a.b"}, "'name' is 'a.b'"),
        ({"drop": "name"}, "'name' is None"),
        ({"name": "other"}, "has no place in the adapter.*did you mean"),
        ({"model_type": "bert"}, "'model_type' is 'bert'; accepted: t5, mt5"),
        ({"hidden_size": 13}, "'hidden_size' is 13, but the backbone's width is 12"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_represented(folder: Path, change: Any, message: str) -> None:
    edit(folder, **change)
    with pytest.raises(ElmError, match=message) as caught:
        load_adapters_expert(folder, GATED)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_do_not_fit(folder: Path) -> None:
    weights = folder / "adapter.safetensors"
    tensors = load_file(weights)
    up = "decoder.block.0.layer.2.adapters.little.adapter_up.weight"
    save_file({k: v for k, v in tensors.items() if k != up}, weights)
    with pytest.raises(ElmError, match=f"{weights}: tensor '{up}' is missing"):
        load_adapters_expert(folder, GATED)
    save_file(tensors | {"lm_head.weight": tensors[up]}, weights)
    with pytest.raises(ElmError, match=r"'lm_head\.weight' has no place in the adapter"):
        load_adapters_expert(folder, GATED)
    with pytest.raises(ElmError, match=r"has no place|is missing"):
        load_adapters_expert(folder, GATED.replace(num_encoder_layers=3))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ElmError, match="truncated or damaged"):
        load_adapters_expert(folder, GATED)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.safetensors"):
        load_adapters_expert(folder, GATED)
    (folder / "pytorch_adapter.bin").touch()
    with pytest.raises(ElmError, match="is a pickle, which can run code.*use_safetensors=True"):
        load_adapters_expert(folder, GATED)
    (folder / "pytorch_model_head.bin").touch()
    with pytest.raises(ElmError, match="a prediction head.*with_head=False"):
        load_adapters_expert(folder, GATED)


def test_what_old_and_other_files_mean(folder: Path, tmp_path: Path) -> None:
    """Without a version 'gelu' was the approximation; T5AdapterModel adds a prefix."""
    edit(folder, {"non_linearity": "gelu"}, drop="version")
    assert load_adapters_expert(folder, GATED)[0].activation == "gelu_tanh"
    edit(folder, {"non_linearity": "gelu_orig"})
    assert load_adapters_expert(folder, GATED)[0].activation == "gelu"
    _, before = load_adapters_expert(folder, GATED)
    tensors = load_file(folder / "adapter.safetensors")
    save_file({f"transformer.{k}": v for k, v in tensors.items()}, folder / "adapter.safetensors")
    edit(folder, {"scaling": 2})
    _, after = load_adapters_expert(folder, GATED)
    for path, array in flatten(before).items():
        factor = 2 if "/up_" in path else 1
        np.testing.assert_array_equal(flatten(after)[path], factor * array)
