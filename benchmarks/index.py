"""Measures when approximate search over an expert library pays, and prints JSON.

Clustered unit vectors stand for keys: one cluster an expert (100 keys), eight experts a topic. For
each number of keys: milliseconds (median) to find the nearest key of a batch of queries by NumPy
alone, by the exact index (NumPy and its exact re-scoring), by ScaNN's brute force and by the ScaNN
index; the seconds to build the last, and its recall against exact search for queries from the same
clusters. `break_even_batches` is how many batches repay its building.

Example:
  python benchmarks/index.py --sizes 1000 10000 100000
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from elm_jax.retrieval import MaxInnerProductIndex, load_embedder
from elm_jax.retrieval.embedder import FloatArray


def clustered(
    n: int, queries: int, *, dimension: int = 384, rank: int = 24, seed: int = 0
) -> tuple[FloatArray, FloatArray]:
    """Draws keys and queries of unit length from the same clusters.

    Each cluster varies mostly within `rank` directions of its own, as texts of one prompt do.

    Returns:
      Keys float32 [n, dimension] and queries float32 [queries, dimension].
    """
    rng = np.random.default_rng(seed)
    clusters = max(n // 100, 1)
    topics = rng.normal(size=(clusters // 8 + 1, dimension))
    centres = topics[np.arange(clusters) // 8] + 0.7 * rng.normal(size=(clusters, dimension))
    owners = np.concatenate([np.arange(n) % clusters, rng.integers(clusters, size=queries)])
    vectors = (centres[owners] + 0.3 * rng.normal(size=(n + queries, dimension))).astype(np.float32)
    for cluster in range(clusters):
        members = np.flatnonzero(owners == cluster)
        directions = rng.normal(size=(rank, dimension)) / rank**0.5
        vectors[members] += rng.normal(size=(len(members), rank)) @ directions
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[:n], vectors[n:]


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call in milliseconds, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(times[1:]), 3)


def measure(n: int, batch: int, repeats: int) -> dict[str, Any]:
    """Measures one number of keys."""
    import scann

    keys, queries = clustered(n, 256)
    few = queries[:batch]
    exact = MaxInnerProductIndex.build(keys, exact_below=n + 1)
    start = time.perf_counter()
    approximate = MaxInnerProductIndex.build(keys, exact_below=0)
    seconds = time.perf_counter() - start
    brute = scann.scann_ops_pybind.builder(keys, 1, "dot_product").score_brute_force().build()
    truth, found = exact.search(queries, 10)[0], approximate.search(queries, 10)[0]
    ms = {
        "numpy": median_ms(lambda: (few @ keys.T).argmax(axis=1), repeats),
        "exact_index": median_ms(lambda: exact.search(few, 1), repeats),
        "scann_brute_force": median_ms(lambda: brute.search_batched(few), repeats),
        "scann_index": median_ms(lambda: approximate.search(few, 1), repeats),
    }
    gain = (ms["exact_index"] - ms["scann_index"]) / 1e3
    return {
        "keys": n,
        "ms_per_batch": ms,
        "scann_build_s": round(seconds, 3),
        "scann_leaves": approximate.leaves,
        "recall_at_build": dict(approximate.recall),
        "recall_at_1": float((truth[:, 0] == found[:, 0]).mean()),
        "recall_at_10": float(
            np.mean([np.isin(f, t).mean() for f, t in zip(found, truth, strict=True)])
        ),
        "break_even_batches": round(seconds / gain) if gain > 0 else None,
    }


def main() -> None:
    """Prints the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = [1_000, 3_000, 10_000, 30_000, 100_000]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, help="numbers of keys")
    parser.add_argument("--batch", type=int, default=32, help="queries of a batch")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    start = time.perf_counter()
    import scann  # noqa: F401

    report: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "batch": args.batch,
        "scann_import_s": round(time.perf_counter() - start, 3),
    }
    embedder = load_embedder()
    texts = [
        f"{i} " + "a sentence of ordinary length about this and that " * 8
        for i in range(args.batch)
    ]
    report["embed_batch_ms"] = median_ms(lambda: embedder.encode(texts), 3)
    report["sizes"] = []
    for size in args.sizes:
        print(f"{size} keys", file=sys.stderr)
        report["sizes"].append(measure(size, args.batch, args.repeats))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
