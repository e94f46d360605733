"""`elm-jax backbone`: show and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from elm_jax.checkpoints import Backbone, fingerprint, load_backbone, save_backbone
from elm_jax.cli.main import main
from elm_jax.experts import ExpertStore
from elm_jax.experts.apply import backbone_shapes, expert_shapes
from elm_jax.experts.store import ExpertInfo
from elm_jax.models import AdapterSpec, ExpertSpec, FullSpec, LoraSpec, T5Config

CONFIG = T5Config(
    vocab_size=31, emb_dim=12, num_heads=3, head_dim=5, mlp_dim=16,
    num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip


def draw(shapes: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    params = draw(backbone_shapes(CONFIG), 0)
    return Backbone("little", CONFIG, params, fingerprint(CONFIG, params))


@pytest.fixture(scope="module")
def folder(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(backbone, tmp_path_factory.mktemp("backbones") / "little")


@pytest.fixture(scope="module")
def store(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    owner = {"name": backbone.name, "fingerprint": backbone.fingerprint}
    specs: dict[str, ExpertSpec] = {
        "full": FullSpec(),
        "lora": LoraSpec(rank=2, targets=("q",), blocks=("encoder",)),
        "adapter": AdapterSpec(bottleneck=2),
    }
    for name, spec in specs.items():
        info = ExpertInfo(id=name, spec=spec, tasks=("t",), prompts=("p",), backbone=owner)
        ExpertStore(path).write(info, draw(expert_shapes(CONFIG, spec), 1))
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("elm-jax backbone: error: ") and error.count("\n") == 1
    return error


def test_show(folder: Path, backbone: Backbone, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbone", "show", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    count = sum(array.size for array in jax.tree.leaves(backbone.params))
    assert facts == {
        "name": "little",
        "format": "own",
        "folder": str(folder),
        "parameters": count,
        "bytes": 4 * count,
        "dtypes": ["float32"],
        "fingerprint": backbone.fingerprint,
        "vocabulary": None,
        "vocabulary_ids": None,
        "config": CONFIG.to_json(),
    }
    assert main(["backbone", "show", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith(("parameters", "emb_dim"))] == [
        f"{count:,}", "12",
    ]  # fmt: skip


def test_every_format_is_read_again(folder: Path, backbone: Backbone, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    for form, kind in (("huggingface", "huggingface"), ("t5x", "t5x"), ("t5x-legacy", "t5x"),
                       ("orbax", "orbax"), ("own", "own")):  # fmt: skip
        output = tmp_path / form
        assert main(["backbone", "export", str(folder), "--format", form, "--output", str(output),
                     "--step", "3"]) == 0  # fmt: skip
        [written] = capsys.readouterr().out.splitlines()
        assert Path(written) == (output / "checkpoint_3" if kind == "t5x" else output)
        assert main(["backbone", "show", written, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["format"], facts["fingerprint"]) == (kind, backbone.fingerprint)
    assert "exists" in fails(capsys, "backbone", "export", folder, "--output", tmp_path / "own")


def test_an_expert_goes_along(folder: Path, store: Path, backbone: Backbone, tmp_path: Path,
                              capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    arguments = ["backbone", "export", str(folder), "--store", str(store), "--expert"]
    assert main([*arguments, "full", "--output", str(tmp_path / "full")]) == 0
    tensors = load_file(tmp_path / "full" / "model.safetensors")
    tau = ExpertStore(store).params("full")["token_embedder"]["embedding"]
    wanted = backbone.params["token_embedder"]["embedding"] + tau
    np.testing.assert_array_equal(tensors["shared.weight"], wanted)
    output = str(tmp_path / "lora")
    assert main([*arguments, "lora", "--format", "own", "--dtype", "bfloat16", "--output",
                 output]) == 0  # fmt: skip
    loaded = load_backbone(output)
    assert (loaded.name, loaded.config.dtype) == ("little+lora", "bfloat16")
    capsys.readouterr()
    assert "is a bottleneck adapter" in fails(capsys, *arguments, "adapter", "--output", "no")
    assert "did you mean 'lora'" in fails(capsys, *arguments, "lara", "--output", "no")
    assert "go together" in fails(capsys, *arguments[:-1], "--output", "no")
    assert not Path("no").exists()


def test_an_expert_of_another_backbone_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = draw(backbone_shapes(CONFIG), 5)
    other = Backbone("other", CONFIG, params, fingerprint(CONFIG, params))
    path = save_backbone(other, tmp_path / "other")
    error = fails(capsys, "backbone", "export", path, "--store", store, "--expert", "full",
                  "--output", tmp_path / "no")  # fmt: skip
    assert "belongs to backbone 'little'" in error


def test_the_config_of_a_checkpoint_that_has_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    assert main(["backbone", "export", str(folder), "--format", "t5x", "--output", run]) == 0
    written = capsys.readouterr().out.strip()
    gin = tmp_path / "silu.gin"
    gin.write_text("network.T5Config.mlp_activations = ('silu', 'linear')\n")
    assert main(["backbone", "show", written, "--json", "--config", str(gin)]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["mlp_activations"] == ["silu", "linear"]
    assert "did you mean 't5_1_1_small'" in fails(
        capsys, "backbone", "show", written, "--config", "t5_1_1_smal"
    )
    assert "is the config; another one was given" in fails(
        capsys, "backbone", "show", folder, "--config", "t5_1_1_small"
    )
    assert "name one of them" in fails(capsys, "backbone", "show", run)
