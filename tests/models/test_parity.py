"""Our T5 against PyTorch's (transformers): same weights, same numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.checkpoints.huggingface import config_from_hf, params_from_hf
from elm_jax.models import T5
from elm_jax.models.layers import relative_position_bucket

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = dict(vocab_size=61, d_model=20, d_kv=6, d_ff=28, num_layers=2, num_heads=3)
VARIANTS: dict[str, dict[str, Any]] = {
    "v1.0 relu tied": dict(feed_forward_proj="relu"),
    "v1.1 gated-gelu untied": dict(
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, d_model=24, num_heads=5, d_kv=7,
        num_layers=3, num_decoder_layers=2,
    ),
    "gated-gelu tied": dict(feed_forward_proj="gated-gelu", num_heads=1, d_kv=8, num_layers=1),
    "gelu tied": dict(feed_forward_proj="gelu", num_layers=1, num_decoder_layers=3),
    "gated-silu untied": dict(
        feed_forward_proj="gated-silu", tie_word_embeddings=False, num_heads=7, d_kv=2
    ),
    "gelu_new untied": dict(feed_forward_proj="gelu_new", tie_word_embeddings=False, d_ff=9),
    "relu 4 layers, near buckets": dict(
        num_layers=4, relative_attention_num_buckets=8, relative_attention_max_distance=20,
        layer_norm_epsilon=1e-3,
    ),
    "mt5": dict(model_type="mt5", feed_forward_proj="gated-gelu", d_model=16, num_heads=6, d_kv=4),
}  # fmt: skip


def make_torch_model(variant: dict[str, Any], seed: int = 0) -> Any:
    """Returns a random Hugging Face model in evaluation mode."""
    options = BASE | variant
    mt5 = options.pop("model_type", "t5") == "mt5"
    untied = mt5 or options.get("tie_word_embeddings") is False
    config = (transformers.MT5Config if mt5 else transformers.T5Config)(**options)
    torch.manual_seed(seed)
    name = "MT5ForConditionalGeneration" if mt5 else "T5ForConditionalGeneration"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        if untied:  # transformers 5 ties every fresh model; a loaded one keeps its own weights
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """Returns the model's tensors, the repeated ones once."""
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", VARIANTS)
def test_same_numbers_as_pytorch(name: str) -> None:
    model = make_torch_model(VARIANTS[name])
    config = config_from_hf(model.config.to_dict())
    params = params_from_hf(tensors_of(model), config)

    rng = np.random.default_rng(0)
    inputs = rng.integers(2, config.vocab_size, (3, 40)).astype(np.int32)
    inputs[0, 25:] = inputs[1, 3:] = 0
    targets = rng.integers(2, config.vocab_size, (3, 30)).astype(np.int32)
    targets[:, 0] = targets[2, 4:] = 0

    ids = torch.tensor(inputs).long()
    with torch.no_grad():
        theirs = model(
            input_ids=ids, attention_mask=(ids > 0).long(),
            decoder_input_ids=torch.tensor(targets).long(),
        )  # fmt: skip

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        encoded = T5(config).apply({"params": params}, inputs, method="encode")
        return encoded, T5(config).apply(
            {"params": params}, encoded, inputs, targets, method="decode"
        )

    encoded, logits = run(params)

    np.testing.assert_allclose(encoded, theirs.encoder_last_hidden_state.numpy(), atol=1e-4)
    np.testing.assert_allclose(logits, theirs.logits.numpy(), atol=1e-4)
    assert theirs.logits.numpy().std() > 0.1  # else the tolerance would say nothing


def test_the_output_layers_of_the_variants() -> None:
    tied = {n: config_from_hf(make_torch_model(v).config.to_dict()).logits_via_embedding
            for n, v in VARIANTS.items()}  # fmt: skip
    assert {n for n in tied if not tied[n]} == {
        "v1.1 gated-gelu untied", "gated-silu untied", "gelu_new untied", "mt5"
    }  # fmt: skip


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (16, 50), (32, 1000)])
def test_relative_position_buckets(bidirectional: bool, buckets: int, distance: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    positions = np.arange(-1500, 1501, dtype=np.int32)
    ours = relative_position_bucket(
        jnp.asarray(positions),
        bidirectional=bidirectional, num_buckets=buckets, max_distance=distance,
    )  # fmt: skip
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(positions), bidirectional, buckets, distance
    )
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert len(np.unique(ours)) == (buckets - 1 if bidirectional else buckets)
