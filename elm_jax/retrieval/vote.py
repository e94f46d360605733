"""From the nearest key of each query to one expert."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from elm_jax.errors import ElmError, nearest

RULES = ("majority", "weighted")
TIES = ("similarity", "first")


@dataclass(frozen=True)
class Candidate:
    """An expert with at least one vote: how many it got, and their mean similarity."""

    expert: str
    votes: int
    similarity: float


def majority_vote(
    nearest_ids: Sequence[str],
    scores: Sequence[float],
    *,
    rule: str = "majority",
    ties: str = "similarity",
) -> tuple[Candidate, ...]:
    """Ranks the experts by the queries whose nearest key is theirs.

    Args:
      nearest_ids: the expert id of each query's nearest key [Q].
      scores: the inner product of each query with that key [Q].
      rule: 'majority' counts queries; 'weighted' sums their inner products.
      ties: 'similarity' prefers the higher summed inner product, then the id that sorts first; sums
        are exactly rounded, so the outcome does not depend on the order of the queries. 'first'
        prefers the expert that was found first, as the authors' code does.

    Returns:
      The experts with votes, best first; the first is the one retrieved.

    Raises:
      ValueError: if there are no queries, or the lengths differ.
      ElmError: for an unknown rule.

    Source: Jang et al. 2023 (ELM), Retrieval of Experts: the expert retrieved most often. The paper
    gives no rule for ties.

    >>> majority_vote(['a', 'b', 'b', 'a'], [0.9, 0.5, 0.6, 0.1])[0]
    Candidate(expert='b', votes=2, similarity=0.55)
    >>> majority_vote(['a', 'b', 'b'], [0.9, 0.4, 0.3], rule='weighted')[0].expert
    'a'
    """
    if not nearest_ids:
        raise ValueError("a vote needs at least one query")
    for what, value, accepted in (("rule", rule, RULES), ("ties", ties, TIES)):
        if value not in accepted:
            raise ElmError(
                f"vote {what} {value!r} is unknown{nearest(value, accepted)}; "
                f"accepted: {', '.join(accepted)}"
            )
    by_expert: dict[str, list[float]] = defaultdict(list)
    for expert, score in zip(nearest_ids, scores, strict=True):
        by_expert[expert].append(score)
    found = {expert: place for place, expert in enumerate(by_expert)}

    def key(item: tuple[str, list[float]]) -> tuple[float | str, ...]:
        expert, votes = item
        total = math.fsum(votes)
        first = -len(votes) if rule == "majority" else -total
        return (first, found[expert]) if ties == "first" else (first, -total, expert)

    return tuple(
        Candidate(expert, len(votes), math.fsum(votes) / len(votes))
        for expert, votes in sorted(by_expert.items(), key=key)
    )
