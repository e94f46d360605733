"""Measures rank classification against the usual ways to do it, and prints JSON.

Random weights and tokens: inputs without padding, choices of equal length that share no beginning,
so that neither trimming nor sharing helps. Four ways, interleaved, in one process:
  ours: each input encoded once, choices as a prefix tree (elm_jax.decoding.choice_log_probs);
  ours_naive: the same model, jitted, each choice with its own copy of the input in one batch;
  torch_naive: the same in PyTorch (transformers);
  torch_once: PyTorch, encoder outputs computed once and expanded to the choices.
Scores of all four are compared; a disagreement above --tolerance is an error.

Example:
  python benchmarks/rank.py --size small --choice-tokens 2 8
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.checkpoints import Backbone, initialize, to_huggingface
from elm_jax.decoding import choice_log_probs
from elm_jax.models import T5, T5Config

SIZES = {
    "tiny": T5Config(512, 64, 4, 16, 128, 2, 2),
    "small": T5Config(32_128, 512, 6, 64, 1024, 8, 8),
    "base": T5Config(32_128, 768, 12, 64, 2048, 12, 12),
}
Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(tokens int32 [B, T], choices int32 [B, C, U]) -> float32 [B, C]."""


def jax_scorers(backbone: Backbone) -> dict[str, Scorer]:
    """Returns ours and the naive way with the same model."""
    model, variables = T5(backbone.config), {"params": backbone.params}

    @jax.jit
    def naive(variables: Any, tokens: jax.Array, choices: jax.Array) -> jax.Array:
        batch, options, length = choices.shape
        targets = choices.reshape(-1, length)
        shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        logits: Any = model.apply(variables, jnp.repeat(tokens, options, axis=0), shifted)
        log_p = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(picked * (targets > 0), axis=-1).reshape(batch, options)

    return {
        "ours": lambda t, c: np.asarray(choice_log_probs(model, variables, t, c)[0]),
        "ours_naive": lambda t, c: np.asarray(naive(variables, t, c)),
    }


def torch_scorers(backbone: Backbone, threads: int) -> dict[str, Scorer]:
    """Returns the naive way and encoding once in PyTorch, with the same weights."""
    import torch
    from transformers import T5ForConditionalGeneration

    torch.set_num_threads(threads)
    with TemporaryDirectory() as folder:
        path = to_huggingface(backbone, Path(folder) / "backbone")
        model = T5ForConditionalGeneration.from_pretrained(path).eval()

    def score(tokens: np.ndarray, choices: np.ndarray, once: bool) -> np.ndarray:
        source, options = torch.from_numpy(tokens).long(), choices.shape[1]
        targets = torch.from_numpy(choices).long().flatten(0, 1)
        repeated = source.repeat_interleave(options, dim=0)
        with torch.inference_mode():
            given: dict[str, Any] = {"input_ids": repeated}
            if once:
                encoded = model.encoder(input_ids=source, attention_mask=(source > 0).long())
                encoded.last_hidden_state = encoded.last_hidden_state.repeat_interleave(
                    options, dim=0
                )
                given = {"encoder_outputs": encoded}
            logits = model(
                **given,
                attention_mask=(repeated > 0).long(),
                decoder_input_ids=torch.nn.functional.pad(targets, (1, 0))[:, :-1],
                use_cache=False,
            ).logits
            picked = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
            return (picked * (targets > 0)).sum(-1).view(-1, options).numpy()

    return {
        "torch_naive": lambda t, c: score(t, c, once=False),
        "torch_once": lambda t, c: score(t, c, once=True),
    }


def draw(
    vocab: int, batch: int, length: int, options: int, choice_tokens: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draws inputs [B, T] and choices [B, C, U] that end with 1."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, vocab, (batch, length)).astype(np.int32)
    choices = rng.integers(2, vocab, (batch, options, choice_tokens)).astype(np.int32)
    # Choices of one input differ from the first token on, so that trees share the root only.
    firsts = (choices[:, :1, 0] - 2 + np.arange(options)) % (vocab - 2) + 2
    choices[:, :, 0] = firsts
    choices[:, :, -1] = 1
    return tokens, choices


def measure(
    scorers: dict[str, Scorer], tokens: np.ndarray, choices: np.ndarray, repeats: int
) -> dict[str, Any]:
    """Times the scorers in turns, after one call of each to compile and to compare scores."""
    scores, first = {}, {}
    for name, scorer in scorers.items():
        start = time.perf_counter()
        scores[name] = scorer(tokens, choices)
        first[name] = round(time.perf_counter() - start, 2)
    times: dict[str, list[float]] = {name: [] for name in scorers}
    for repeat in range(repeats):
        print(f"  repeat {repeat + 1} of {repeats}", file=sys.stderr)
        for name, scorer in scorers.items():
            start = time.perf_counter()
            scorer(tokens, choices)
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    best = {name: min(t) for name, t in times.items()}
    others = [name for name in scorers if name != "ours"]
    return {
        "choice_tokens": choices.shape[-1],
        "first_call_s": first,
        "examples_per_s": {n: round(len(tokens) / t, 2) for n, t in median.items()},
        "examples_per_s_best": {n: round(len(tokens) / t, 2) for n, t in best.items()},
        "times_faster_than": {n: round(median[n] / median["ours"], 2) for n in others},
        "times_faster_than_best": {n: round(best[n] / best["ours"], 2) for n in others},
        "max_abs_diff": {n: float(np.abs(scores[n] - scores["ours"]).max()) for n in others},
    }


def main() -> None:
    """Prints the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument(
        "--choice-tokens",
        type=int,
        nargs="+",
        default=[2, 8],
        help="tokens of a choice, end of sequence included",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=1e-2, help="of a summed log-probability")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    args = parser.parse_args()
    config = SIZES[args.size]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    backbone = initialize(config, seed=0)
    scorers = jax_scorers(backbone)
    if not args.no_torch:
        scorers |= torch_scorers(backbone, threads or 1)
    report: dict[str, Any] = {
        "size": args.size,
        "batch": args.batch,
        "input_tokens": args.input_tokens,
        "choices": args.choices,
        "threads": threads,
        "backend": jax.default_backend(),
        "repeats": args.repeats,
        "load_average": [round(os.getloadavg()[0], 1)],
        "results": [],
    }
    for choice_tokens in args.choice_tokens:
        print(f"choices of {choice_tokens} tokens", file=sys.stderr)
        shape = (args.batch, args.input_tokens, args.choices, choice_tokens)
        tokens, choices = draw(config.vocab_size, *shape)
        report["results"].append(measure(scorers, tokens, choices, args.repeats))
    report["load_average"].append(round(os.getloadavg()[0], 1))
    print(json.dumps(report, indent=2))
    worst = max(d for r in report["results"] for d in r["max_abs_diff"].values())
    if not worst <= args.tolerance:
        sys.exit(f"scores differ by {worst}, more than --tolerance {args.tolerance}")


if __name__ == "__main__":
    main()
