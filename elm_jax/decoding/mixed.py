"""Scoring and generation in which every example of a batch has an expert of its own.

    pool = ExpertPool(backbone.config, spec, capacity=8, store=store)
    places = pool.places([request.expert for request in requests])
    scores, counts = mixed_choice_log_probs(
        T5(backbone.config, spec), backbone.params, pool.experts, places, inputs, choices
    )

Results are those of each example alone with its expert. The experts are an argument like any other,
so an expert that comes or goes compiles nothing. Shapes: B batch, C choices, U choice or new
tokens, X experts stacked.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from elm_jax.decoding.config import GenerationConfig
from elm_jax.decoding.generation import generate
from elm_jax.decoding.rank import EOS_ID, ChoiceTree, prepare_choices, tree_log_probs
from elm_jax.decoding.search import Generated
from elm_jax.errors import ElmError
from elm_jax.experts.routing import check_form, check_mixable, check_places, route
from elm_jax.models import T5

Array = jax.Array


@functools.partial(jax.jit, static_argnames=("model", "form"))
def _log_probs(
    model: T5,
    params: Any,
    experts: Any,
    places: Array,
    tokens: Array,
    tree: ChoiceTree,
    form: str,
) -> Array:
    variables = {"params": params, "expert": experts}
    return tree_log_probs(model, variables, tokens, tree, places=places, form=form)


_route = jax.jit(route, static_argnames=("config", "form"))


def _check(model: T5, experts: Any, places: Any, batch: int, form: str) -> Any:
    check_form(form)
    check_mixable(model.spec)
    assert model.spec is not None  # checked before
    return check_places(places, batch, jax.tree.leaves(experts)[0].shape[0], model.spec)


def mixed_choice_log_probs(
    model: T5,
    params: Any,
    experts: Any,
    places: np.ndarray,
    encoder_input_tokens: np.ndarray | Array,
    choices: np.ndarray,
    *,
    form: str = "auto",
    eos_id: int = EOS_ID,
) -> tuple[Array, np.ndarray]:
    """Scores each answer choice of each input with that input's expert.

    Args:
      model: the backbone with the experts' spec.
      params: the backbone.
      experts: the stacked experts, each array [X, ...], such as `ExpertPool.experts`.
      places: int32 [B], each example's place in the stack, such as `ExpertPool.places`; X is the
        bare backbone.
      encoder_input_tokens: int32 [B, T], 0 is padding; a NumPy array is cut to its longest input.
      choices: int32 [B, C, U], as of `choice_log_probs`.
      form: 'auto', 'gathered' or 'grouped', equal in result; see `experts.routing.choose_form`.
      eos_id: the end-of-sequence token.

    Returns:
      float32 [B, C] and int32 [B, C], as `choice_log_probs`; `rank` picks the best.

    Raises:
      ElmError: as `choice_log_probs`; for `full` experts; for places that are not those of the
        stack, or name the bare backbone where the experts' spec does not allow it.
    """
    places = _check(model, experts, places, len(encoder_input_tokens), form)
    tokens, tree, counts = prepare_choices(model, encoder_input_tokens, choices, eos_id)
    return _log_probs(model, params, experts, places, tokens, tree, form), counts


def mixed_log_likelihood(
    model: T5,
    params: Any,
    experts: Any,
    places: np.ndarray,
    encoder_input_tokens: np.ndarray | Array,
    targets: np.ndarray,
    *,
    form: str = "auto",
    eos_id: int = EOS_ID,
) -> tuple[Array, np.ndarray]:
    """Scores one target for each input with that input's expert.

    Args:
      model: the backbone with the experts' spec.
      params: the backbone.
      experts: the stacked experts.
      places: int32 [B].
      encoder_input_tokens: int32 [B, T].
      targets: int32 [B, U]; each ends with `eos_id` and is padded with 0.
      form: as of `mixed_choice_log_probs`.
      eos_id: the end-of-sequence token.

    Returns:
      float32 [B], log p(target | input), and int32 [B], tokens per target.

    Raises:
      ElmError: as `mixed_choice_log_probs`.
    """
    targets = np.asarray(targets)
    if targets.ndim != 2:
        raise ElmError(f"targets must be int32 [B, U], got shape {list(targets.shape)}")
    scores, counts = mixed_choice_log_probs(
        model,
        params,
        experts,
        places,
        encoder_input_tokens,
        targets[:, None],
        form=form,
        eos_id=eos_id,
    )
    return scores[:, 0], counts[:, 0]


def mixed_generate(
    model: T5,
    params: Any,
    experts: Any,
    places: np.ndarray,
    encoder_input_tokens: np.ndarray | Array,
    config: GenerationConfig,
    key: Array | None = None,
    *,
    form: str = "auto",
) -> Generated:
    """Generates for each input with that input's expert: greedy, beams or drawn.

    Args:
      model: the backbone with the experts' spec.
      params: the backbone.
      experts: the stacked experts, each array [X, ...].
      places: int32 [B], each example's place in the stack; X is the bare backbone.
      encoder_input_tokens: int32 [B, T].
      config: how tokens are chosen.
      key: as in `generate`.
      form: as of `mixed_choice_log_probs`.

    Returns:
      As `generate`.

    Raises:
      ElmError: as `generate`, and for places and experts as `mixed_choice_log_probs`.
    """
    places = _check(model, experts, places, len(encoder_input_tokens), form)
    expert = _route(model.config, experts, places, form=form)
    variables = {"params": params, "expert": expert}
    return generate(model, variables, encoder_input_tokens, config, key)
