"""Metrics of generated text, each in [0, 1] per example."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any


@functools.cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(prediction: str, targets: Sequence[str]) -> float:
    """Returns the best ROUGE-L F1 over the accepted targets (rouge-score, with stemmer).

    >>> round(rouge_l('the cats sat', ['a dog', 'the cat sat down']), 3)
    0.857
    """
    return max(_rouge().score(target, prediction)["rougeL"].fmeasure for target in targets)


def exact_match(prediction: str, targets: Sequence[str]) -> float:
    """Returns 1.0 if the prediction is one of the accepted targets, ends stripped, else 0.0.

    >>> exact_match(' yes', ['no', 'yes'])
    1.0
    """
    return float(prediction.strip() in {target.strip() for target in targets})
