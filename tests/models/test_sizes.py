"""The published sizes: their parameter counts, their gin files, their names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import gin
from elm_jax.errors import ElmError
from elm_jax.experts.apply import backbone_shapes
from elm_jax.experts.tree import count_parameters
from elm_jax.gin_utils import gin_folder
from elm_jax.models import T5Config
from elm_jax.models.sizes import ALIASES, SIZES, get_config

COUNTS = {
    "t5_1_0_small": 60_506_624,
    "t5_1_0_base": 222_903_552,
    "t5_1_0_large": 737_668_096,
    "t5_1_0_xl": 2_851_598_336,
    "t5_1_0_xxl": 11_307_321_344,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "mt5_small": 300_176_768,
    "mt5_base": 582_401_280,
    "mt5_large": 1_229_581_312,
    "mt5_xl": 3_742_619_648,
    "mt5_xxl": 12_921_057_280,
    "umt5_small": 306_601_984,
    "umt5_base": 592_043_520,
    "umt5_xl": 3_768_356_864,
    "umt5_xxl": 12_972_531_712,
    "byt5_small": 299_637_760,
    "byt5_base": 581_653_248,
    "byt5_large": 1_228_183_552,
    "byt5_xl": 3_737_801_728,
    "byt5_xxl": 12_906_899_328,
}
"""Parameters of the published checkpoints, the embedding of a tied output layer counted once."""
PAPERS = {  # as the papers round them, in millions
    "t5_1_0": {"small": 60, "base": 220, "large": 770, "xl": 2800, "xxl": 11000},
    "mt5": {"small": 300, "base": 580, "large": 1200, "xl": 3700, "xxl": 13000},
    "byt5": {"small": 300, "base": 582, "large": 1230, "xl": 3740, "xxl": 12900},
}


def test_every_size_is_counted() -> None:
    assert set(COUNTS) == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_published_parameter_counts(name: str) -> None:
    # Scanned layers have the same parameters and are traced in no time.
    assert count_parameters(backbone_shapes(get_config(name, scan_layers=True))) == COUNTS[name]


def test_counts_of_the_papers() -> None:
    for family, sizes in PAPERS.items():
        for size, millions in sizes.items():
            assert COUNTS[f"{family}_{size}"] / 1e6 == pytest.approx(millions, rel=0.05)


@pytest.mark.parametrize("name", SIZES)
def test_transformers_counts_as_many(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, tied = get_config(name), name.startswith("t5_1_0")
    family = "UMT5" if name.startswith("umt5") else "T5"
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForConditionalGeneration")(
            getattr(transformers, f"{family}Config")(
                vocab_size=config.vocab_size, d_model=config.emb_dim, d_kv=config.head_dim,
                d_ff=config.mlp_dim, num_heads=config.num_heads,
                num_layers=config.num_encoder_layers,
                num_decoder_layers=config.num_decoder_layers,
                feed_forward_proj="relu" if tied else "gated-gelu",
            )
        )  # fmt: skip
    names = {name for name, _ in model.named_parameters()} - {"lm_head.weight"}
    count = sum(p.numel() for n, p in model.named_parameters() if n in names)
    count += 0 if tied else config.vocab_size * config.emb_dim
    assert count == COUNTS[name]


@pytest.fixture(autouse=True)
def no_package_named_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides tests/ from gin, which takes 'models/x.gin' for a file in a package 'models'."""
    tests = Path(__file__).parents[1]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path) != tests])


def read_gin(*files: str, bindings: tuple[str, ...] = ()) -> T5Config:
    """Returns the MODEL of gin files."""
    gin.clear_config()
    gin.add_config_file_search_path(str(gin_folder()))
    gin.parse_config_files_and_bindings(list(files), list(bindings))
    return gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()


@pytest.mark.parametrize("name", SIZES)
def test_gin_files_say_the_same(name: str) -> None:
    assert read_gin(f"models/{name}.gin") == get_config(name)


def test_every_gin_file_is_a_size_or_shared() -> None:
    shared = {"elm_tiny", "t5", "t5_1_0", "t5_1_1", "mt5", "umt5", "byt5"}
    names = {path.stem for path in (gin_folder() / "models").glob("*.gin")}
    assert names == shared | set(SIZES)


def test_gin_macros_say_how_a_model_is_run() -> None:
    ways = ("SCAN_LAYERS = True", "REMAT = 'minimal'", "DTYPE = 'bfloat16'", "DROPOUT_RATE = 0.0")
    expected = get_config(
        "mt5_xl", scan_layers=True, remat="minimal", dtype="bfloat16", dropout_rate=0.0
    )
    assert read_gin("models/mt5_xl.gin", bindings=ways) == expected
    # After another model's file, nothing of that is left.
    files = ("models/elm_tiny.gin", "models/t5_1_1_xl.gin")
    assert read_gin(*files) == get_config("t5_1_1_xl")


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("t0_3b", "t5_1_1_xl"),
        ("T0pp", "t5_1_1_xxl"),
        ("flan_t5_large", "t5_1_1_large"),
        ("google/flan-t5-xxl", "t5_1_1_xxl"),
        ("google/t5-v1_1-small", "t5_1_1_small"),
        ("t5-3b", "t5_1_0_xl"),
        ("t5_1_0_11b", "t5_1_0_xxl"),
        ("lm_adapt_base", "t5_1_1_base"),
        ("google/mt5-base", "mt5_base"),
    ],
)
def test_other_names(alias: str, name: str) -> None:
    assert get_config(alias) == get_config(name)


def test_aliases_lead_to_sizes() -> None:
    assert set(ALIASES.values()) <= set(SIZES) and not set(ALIASES) & set(SIZES)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ElmError, match="unknown size 't5_1_1_xll'.*did you mean 't5_1_1_xl"):
        get_config("t5_1_1_xll")
    with pytest.raises(ElmError, match="no field 'emb_dims'.*did you mean 'emb_dim'"):
        get_config("mt5_small", emb_dims=4)
