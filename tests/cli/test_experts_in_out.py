"""`elm-jax experts import` and `elm-jax export`, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from elm_jax.checkpoints import load_backbone
from elm_jax.cli.main import main
from elm_jax.experts import ExpertInfo, ExpertStore, expert_shapes
from elm_jax.experts.tree import flatten
from elm_jax.models import AdapterSpec, LoraSpec, T5Config

SPECS: dict[str, Any] = {
    "lora": LoraSpec(rank=2, alpha=4, targets=("q", "wi")),
    "houlsby": AdapterSpec(
        bottleneck=3, placement="sequential", sublayers=("self_attention", "mlp"),
        use_bias=True, inner_residual=True,
    ),
    "parallel": AdapterSpec(bottleneck=3),
}  # fmt: skip


def tree_of(config: T5Config, spec: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: rng.normal(size=s.shape).astype(np.float32), expert_shapes(config, spec)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.backbone(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    made = ExpertStore(tmp_path_factory.mktemp("store") / "store", create=True)
    backbone = load_backbone(model, on_host=True)
    identity = {"name": backbone.name, "fingerprint": backbone.fingerprint}
    for seed, (name, spec) in enumerate(SPECS.items()):
        params = tree_of(backbone.config, spec, seed)
        made.write(ExpertInfo(name, spec, ("rte",), ("p",), identity), params)
    return made


@pytest.mark.parametrize(
    ("name", "format", "found"),
    [
        ("lora", "peft", "peft"),
        ("houlsby", "adapters", "adapters"),
        ("parallel", "safetensors", "own"),
        ("lora", "npz", "own"),
    ],
)
def test_out_and_in(
    name: str, format: str, found: str, store: ExpertStore, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, there = tmp_path / "out", tmp_path / "there"
    arguments = ["export", str(store.path), name, "--format", format, "--output", str(out)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{out}\n"
    options = ["--store", str(there), "--id", "back", "--backbone", str(model)]
    assert main(["experts", "import", str(out), *options, "--tasks", "a", "b", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["tasks"] == ["a", "b"] and written["backbone"]["name"] == "tiny"
    assert written["settings"]["imported"]["format"] == found
    back = ExpertStore(there)
    info, params = back.load("back", backbone=written["backbone"])
    assert info.spec == SPECS[name] and info.checksum == store.info(name).checksum
    again = ["experts", "import", str(out), *options[:3], "again", *options[4:], "--format", found]
    assert main(again) == 0
    table = capsys.readouterr().out
    assert "again" in table and found in table and f"{info.parameters:,}" in table


def test_tables(store: ExpertStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(store.path), "--format", "csv", "--output", str(tmp_path / "all")]
    assert main([*arguments, "lora"]) == 0
    rows = (tmp_path / "all/statistics.csv").read_text().splitlines()
    arrays = len(flatten(store.shapes("lora")))
    assert rows[0].startswith(
        "expert,path,shape,dtype,size,l2_norm,mean_abs,max_abs,effective_rank"
    )
    assert len(rows) == 1 + arrays * 3 // 2
    arguments = ["export", str(store.path), "*", "--format", "csv", "--output", str(tmp_path / "b")]
    assert main(arguments) == 0
    pairs = {tuple(row.split(",")[1:3]) for row in (tmp_path / "b/cosines.csv").open()}
    assert pairs == {("expert_a", "expert_b"), ("houlsby", "parallel")}  # no LoRA among them
    arguments[2:3] = ["lora", "par*"]
    assert main([*arguments[:-1], str(tmp_path / "c")]) == 1
    assert "no two of lora, parallel share an array" in capsys.readouterr().err


def test_zeros_are_said(
    store: ExpertStore, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(store.path), "lora", "--format", "peft", "--output", str(out)]) == 0
    path = out / "adapter_config.json"
    data = json.loads(path.read_text())
    from safetensors.numpy import load_file, save_file

    tensors = load_file(out / "adapter_model.safetensors")
    kept = {k: v for k, v in tensors.items() if "SelfAttention.q" in k or "wi_0" in k}
    save_file(kept, out / "adapter_model.safetensors")
    modules = sorted({k.removeprefix("base_model.model.").rpartition(".lora_")[0] for k in kept})
    path.write_text(json.dumps(data | {"target_modules": modules}))
    options = ["--store", str(tmp_path / "there"), "--id", "x", "--backbone", str(model)]
    assert main(["experts", "import", str(out), *options]) == 0
    assert "2 of 6 projections have no update and hold zeros" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "STORE", "parallel", "--format", "adapters"], "'parallel' has no counterpart"),
        (["export", "STORE", "parallel", "--format", "peft"], "no counterpart of an expert of"),
        (["export", "STORE", "lora", "houlsby", "--format", "npz"], "is for one expert, got 2 ids"),
        (["export", "STORE", "x*", "--format", "csv"], "'x*' matches none of 3 experts"),
        (["export", "STORE", "lora", "--format", "csvv"], "did you mean 'csv'"),
        (["experts", "import", "STORE", "--id", "x"], "holds no expert"),
        (["experts", "import", "STORE/loar", "--id", "x"], "did you mean 'lora'"),
        (["experts", "import", "STORE/lora", "--id", "x", "--format", "owns"], "mean 'own'"),
    ],
)  # fmt: skip
def test_one_line_for_a_mistake(
    arguments: list[str], message: str, store: ExpertStore, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = [argument.replace("STORE", str(store.path)) for argument in arguments]
    if arguments[0] == "export":
        arguments += ["--output", str(tmp_path / "out")]
    else:
        arguments += ["--store", str(tmp_path / "there"), "--backbone", str(model)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
