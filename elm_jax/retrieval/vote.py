"""From the nearest key of each query to one expert."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """An expert with at least one vote: how many it got, and their mean similarity."""

    expert: str
    votes: int
    similarity: float


def majority_vote(nearest_ids: Sequence[str], scores: Sequence[float]) -> tuple[Candidate, ...]:
    """Ranks the experts by the number of queries whose nearest key is theirs.

    Ties go to the higher summed similarity, then to the expert id that sorts first. Sums are
    exactly rounded, so the outcome does not depend on the order of the queries.

    Args:
      nearest_ids: the expert id of each query's nearest key [Q].
      scores: the inner product of each query with that key [Q].

    Returns:
      The experts with votes, best first; the first is the one retrieved.

    Raises:
      ValueError: if there are no queries, or the lengths differ.

    Source: Jang et al. 2023 (ELM), Retrieval of Experts: the expert retrieved most often. The paper
    gives no rule for ties; the authors' code takes the expert that was retrieved first.

    >>> majority_vote(['a', 'b', 'b', 'a'], [0.9, 0.5, 0.6, 0.1])[0]
    Candidate(expert='b', votes=2, similarity=0.55)
    """
    if not nearest_ids:
        raise ValueError("a vote needs at least one query")
    by_expert: dict[str, list[float]] = defaultdict(list)
    for expert, score in zip(nearest_ids, scores, strict=True):
        by_expert[expert].append(score)
    ranked = sorted(
        by_expert.items(), key=lambda item: (-len(item[1]), -math.fsum(item[1]), item[0])
    )
    return tuple(
        Candidate(expert, len(votes), math.fsum(votes) / len(votes)) for expert, votes in ranked
    )
