"""Rank classification: the log-probability of each answer choice, and the best one.

The choices of an input are laid out as a prefix tree. Its nodes are the decoder's positions: the
start token once, then each distinct beginning of a choice. One pass over the tree scores all
choices; the input is encoded once, its cross-attention keys and values are computed once, and
neither padding nor a shared beginning is decoded or projected to the vocabulary.
Shapes: B batch, C choices, U choice tokens, P tree nodes, T encoder tokens, V vocab, X experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.decoding.shapes import round_up, trim_padding
from elm_jax.errors import ElmError
from elm_jax.experts.apply import bind_variables
from elm_jax.experts.routing import route
from elm_jax.models import T5, ExpertSpec

Array = jax.Array
EOS_ID = 1
LOGITS_AT_ONCE = 2**25
"""How many logits are held at a time (128 MiB); more are made in turns."""
CPU_TOKENS_AT_ONCE = 512
"""How many tokens a CPU encodes at a time: the activations stay in its caches, a quarter faster."""


class ChoiceTree(NamedTuple):
    """The choices of B inputs as prefix trees; see `pack_choices`.

    Attributes:
      nodes: int32 [B, P], each node's token; 0 at the root and on padding.
      depths: int32 [B, P], each node's position in its sequence.
      visible: bool [B, P, P], whether the second node is the first one or above it.
      sources: int32 [B, C, U], the node whose logits score each choice token.
      targets: int32 [B, C, U], the choice tokens, 0 on padding.
    """

    nodes: np.ndarray | Array
    depths: np.ndarray | Array
    visible: np.ndarray | Array
    sources: np.ndarray | Array
    targets: np.ndarray | Array


def choice_lengths(choices: np.ndarray, *, eos_id: int = EOS_ID) -> np.ndarray:
    """Counts the tokens of each choice, its end-of-sequence token included.

    Args:
      choices: int32 [B, C, U]; each choice ends with `eos_id` and is padded with 0; a row of
        zeros is an absent choice.
      eos_id: the end-of-sequence token.

    Returns:
      int32 [B, C]; 0 for an absent choice.

    Raises:
      ElmError: if a choice has a 0 inside, or does not end with `eos_id`.

    >>> choice_lengths(np.array([[[5, 6, 1], [5, 1, 0], [0, 0, 0]]]))
    array([[3, 2, 0]], dtype=int32)
    """
    choices = np.asarray(choices)
    if choices.ndim != 3 or not np.issubdtype(choices.dtype, np.integer):
        raise ElmError(
            f"choices must be integers [B, C, U], got {choices.dtype} {list(choices.shape)}"
        )
    counts = np.count_nonzero(choices, axis=-1).astype(np.int32)
    positions = np.arange(choices.shape[-1])
    last = np.take_along_axis(choices, np.maximum(counts - 1, 0)[..., None], axis=-1)[..., 0]
    gap = ((choices != 0) != (positions < counts[..., None])).any(-1)
    wrong = gap | ((counts > 0) & (last != eos_id))
    if wrong.any():
        row, choice = np.argwhere(wrong)[0]
        raise ElmError(
            f"choice {choice} of row {row} must be tokens, then one end of sequence ({eos_id}), "
            f"then padding (0); got {choices[row, choice].tolist()}"
        )
    return counts


def _prefix_tree(choices: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns nodes [P], depths [P], visible [P, P], sources [C, U] of one input's choices."""
    nodes, depths, parents = [0], [0], [0]
    children: dict[tuple[int, int], int] = {}
    sources = np.zeros(choices.shape, np.int32)
    for choice, count in enumerate(counts):
        node = 0
        for position in range(count):
            sources[choice, position] = node
            if position + 1 < count:
                token = int(choices[choice, position])
                child = children.setdefault((node, token), len(nodes))
                if child == len(nodes):
                    nodes.append(token)
                    depths.append(position + 1)
                    parents.append(node)
                node = child
    visible = np.eye(len(nodes), dtype=bool)
    for node in range(1, len(nodes)):
        visible[node] |= visible[parents[node]]
    return np.array(nodes, np.int32), np.array(depths, np.int32), visible, sources


def pack_choices(choices: np.ndarray, *, eos_id: int = EOS_ID) -> ChoiceTree:
    """Lays the choices of each input out as a prefix tree, sizes rounded up.

    Args:
      choices: int32 [B, C, U], as in `choice_lengths`.
      eos_id: the end-of-sequence token.

    Returns:
      NumPy arrays; P is the largest number of distinct beginnings among the inputs, and U the
      longest choice, both rounded up by `round_up`.

    Raises:
      ElmError: as `choice_lengths`.

    >>> tree = pack_choices(np.array([[[5, 6, 1], [5, 7, 1]]]))
    >>> tree.nodes, tree.depths
    (array([[0, 5, 6, 7]], dtype=int32), array([[0, 1, 2, 2]], dtype=int32))
    >>> tree.sources[0]
    array([[0, 1, 2],
           [0, 1, 3]], dtype=int32)
    """
    choices = np.asarray(choices)
    counts = choice_lengths(choices, eos_id=eos_id)
    longest = int(counts.max(initial=1))
    length = round_up(longest)
    choices = choices[..., :longest].astype(np.int32)
    made: dict[bytes, tuple[np.ndarray, ...]] = {}  # most tasks give every input the same choices
    trees = []
    for row, count in zip(choices, counts, strict=True):
        key = row.tobytes()
        if key not in made:
            made[key] = _prefix_tree(row, count)
        trees.append(made[key])
    size = round_up(max((len(tree[0]) for tree in trees), default=1))
    batch, options = counts.shape
    packed = ChoiceTree(
        nodes=np.zeros((batch, size), np.int32),
        depths=np.zeros((batch, size), np.int32),
        visible=np.tile(np.eye(size, dtype=bool), (batch, 1, 1)),
        sources=np.zeros((batch, options, length), np.int32),
        targets=np.zeros((batch, options, length), np.int32),
    )
    packed.targets[..., :longest] = choices
    for b, (nodes, depths, visible, sources) in enumerate(trees):
        n = len(nodes)
        packed.nodes[b, :n] = nodes
        packed.depths[b, :n] = depths
        packed.visible[b, :n, :n] = visible
        packed.sources[b, :, :longest] = sources
    return packed


def _in_turns(fn: Callable[..., Array], at_once: int, *arrays: Array) -> Array:
    """Applies `fn` to at most `at_once` (at least 1) of the B examples at a time."""
    batch = arrays[0].shape[0]
    even = (n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= max(at_once, 1))
    turns = next(even, 1)
    if turns == 1:
        return fn(*arrays)
    # Each turn takes every n-th example, so that a batch sharded over devices stays so.
    parts = [jnp.moveaxis(x.reshape(batch // turns, turns, *x.shape[1:]), 1, 0) for x in arrays]
    done = jnp.moveaxis(jax.lax.map(lambda part: fn(*part), tuple(parts)), 0, 1)
    return done.reshape(batch, *done.shape[2:])


def tree_log_probs(
    model: T5,
    variables: Any,
    encoder_input_tokens: Array,
    tree: ChoiceTree,
    *,
    places: Array | None = None,
    form: str = "auto",
) -> Array:
    """Scores packed choices; pure, so it may be traced, vmapped and sharded along B.

    Args:
      model: the backbone with its expert's spec.
      variables: `params` and, with an adapter or LoRA, `expert`.
      encoder_input_tokens: int32 [B, T], 0 is padding.
      tree: from `pack_choices`.
      places: int32 [B], in a mixed batch, where each example's expert stands in the stack that
        `expert` then is; see `experts.routing.route`.
      form: of a mixed batch.

    Returns:
      float32 [B, C], the sum over each choice's tokens of log p(token | input, tokens before);
      -inf for an absent choice.
    """

    def bound(places: tuple[Array, ...]) -> Any:
        if not places:
            return variables
        return {**variables, "expert": route(model.config, variables["expert"], *places, form=form)}

    def encode(tokens: Array, *places: Array) -> Any:
        return model.apply(bound(places), tokens, method="encode")

    def score(hidden: Array, sources: Array, targets: Array) -> Array:
        logits: Any = model.apply(variables, hidden, method="logits")
        log_z = jax.nn.logsumexp(logits, axis=-1)
        rows = jnp.arange(hidden.shape[0])[:, None, None]
        log_p = logits[rows, sources, targets] - log_z[rows, sources]
        present = targets[..., 0] > 0
        return jnp.where(present, jnp.sum(log_p * (targets > 0), axis=-1), -jnp.inf)

    tokens = jnp.asarray(encoder_input_tokens)
    batch, length = tokens.shape
    cached = CPU_TOKENS_AT_ONCE // length if jax.default_backend() == "cpu" else batch
    routed = () if places is None else (places,)
    encoded = _in_turns(encode, cached, tokens, *routed)
    nodes = (tree.nodes, tree.depths, tree.visible)
    hidden: Any = model.apply(bound(routed), encoded, tokens, *nodes, method="decode_tree")
    held = LOGITS_AT_ONCE // (tree.nodes.shape[1] * model.config.vocab_size)
    return _in_turns(score, held, hidden, jnp.asarray(tree.sources), jnp.asarray(tree.targets))


_tree_log_probs = jax.jit(tree_log_probs, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _stacked_tree_log_probs(
    model: T5, spec: ExpertSpec, params: Any, experts: Any, tokens: Array, tree: ChoiceTree
) -> Array:
    def one(expert: Any) -> Array:
        return tree_log_probs(model, bind_variables(spec, params, expert), tokens, tree)

    return jax.vmap(one)(experts)


def prepare_choices(
    model: T5, tokens: Any, choices: np.ndarray, eos_id: int
) -> tuple[Any, ChoiceTree, np.ndarray]:
    """Returns inputs cut to a rounded length, the choices as a tree, and tokens per choice [B, C].

    Raises:
      ElmError: as `choice_log_probs`.
    """
    tree = pack_choices(choices, eos_id=eos_id)
    if len(tokens) != len(tree.targets):
        raise ElmError(f"{len(tokens)} inputs, but choices for {len(tree.targets)}")
    largest = int(np.max(tree.targets, initial=0))
    if largest >= model.config.vocab_size:
        raise ElmError(
            f"choices hold token {largest}, but the backbone's vocabulary ends at "
            f"{model.config.vocab_size - 1}"
        )
    counts = np.count_nonzero(tree.targets, axis=-1).astype(np.int32)
    return trim_padding(tokens), tree, counts


def choice_log_probs(
    model: T5,
    variables: Any,
    encoder_input_tokens: np.ndarray | Array,
    choices: np.ndarray,
    *,
    eos_id: int = EOS_ID,
) -> tuple[Array, np.ndarray]:
    """Scores each answer choice of each input; compiled once per rounded shape.

    `choices` must be concrete, as their layout is made on the host; `variables` may be traced, so
    that `jax.vmap` over a stacked `expert` works (`stacked_choice_log_probs` does it compiled).

    Args:
      model: the backbone with its expert's spec.
      variables: `params` and, with an adapter or LoRA, `expert`; see `bind_variables`.
      encoder_input_tokens: int32 [B, T], 0 is padding; a NumPy array is cut to its longest input.
      choices: int32 [B, C, U]; each choice ends with `eos_id` and is padded with 0; a row of
        zeros is an absent choice.
      eos_id: the end-of-sequence token.

    Returns:
      float32 [B, C], the sum of each choice's token log-probabilities, end of sequence included,
      -inf where absent; and int32 [B, C], its number of tokens, 0 where absent.

    Raises:
      ElmError: for a choice that is not tokens, end of sequence, padding; for a token outside the
        vocabulary; for unequal batches.

    Source: Jang et al. (2023), evaluation of the unseen tasks, after Sanh et al. (2022), section 5.
    """
    tokens, tree, counts = prepare_choices(model, encoder_input_tokens, choices, eos_id)
    return _tree_log_probs(model, variables, tokens, tree), counts


def stacked_choice_log_probs(
    model: T5,
    spec: ExpertSpec,
    params: Any,
    experts: Any,
    encoder_input_tokens: np.ndarray | Array,
    choices: np.ndarray,
    *,
    eos_id: int = EOS_ID,
) -> tuple[Array, np.ndarray]:
    """Scores the same choices with X experts at once over one backbone.

    Args:
      model: the backbone with the experts' spec.
      spec: the experts' spec.
      params: the backbone.
      experts: the stacked experts, each array [X, ...].
      encoder_input_tokens: int32 [B, T].
      choices: int32 [B, C, U].
      eos_id: the end-of-sequence token.

    Returns:
      float32 [X, B, C] and int32 [B, C], as `choice_log_probs`.

    Raises:
      ElmError: as `choice_log_probs`.
    """
    tokens, tree, counts = prepare_choices(model, encoder_input_tokens, choices, eos_id)
    return _stacked_tree_log_probs(model, spec, params, experts, tokens, tree), counts


def rank(scores: Any, counts: Any, *, mean: bool = False) -> Array:
    """Picks the best choice of each input.

    Args:
      scores: float32 [..., B, C], summed log-probabilities.
      counts: int32 [B, C], tokens per choice; 0 marks an absent choice, which never wins.
      mean: whether to compare the mean per token in place of the sum.

    Returns:
      int32 [..., B]; the first of equal choices, -1 where an input has no choice at all.

    Source: the published code of Jang et al. (2023) compares sums; that of TAGI compares means.

    >>> rank([[-2.0, -2.0, -9.0]], [[1, 2, 0]]), rank([[-2.0, -2.0, -9.0]], [[1, 2, 0]], mean=True)
    (Array([0], dtype=int32), Array([1], dtype=int32))
    """
    scores, counts = jnp.asarray(scores), jnp.asarray(counts)
    if mean:
        scores = scores / jnp.maximum(counts, 1)
    scores = jnp.maximum(scores, jnp.finfo(scores.dtype).min)  # even -inf beats an absent choice
    best = jnp.argmax(jnp.where(counts > 0, scores, -jnp.inf), axis=-1).astype(jnp.int32)
    return jnp.where((counts > 0).any(axis=-1), best, -1)
