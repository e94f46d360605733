"""A mixed batch: every example has an expert of its own, out of a stack of X loaded ones.

    expert = route(config, stack, places)       # places int32 [B]: whose expert is whose
    T5(config, spec).apply({'params': backbone, 'expert': expert}, inputs, targets)

What `route` returns is an `expert` collection like any other, so whatever runs a model on a batch
runs it on a mixed one. The backbone's products stay one product over the whole batch; those of the
experts are batched over examples or over groups of examples that share an expert. Only shapes are
compiled: another choice of experts, or another expert in a place of the stack, compiles nothing.
Shapes: B batch, X experts stacked, G groups, S examples at most in a group.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.errors import ElmError, nearest
from elm_jax.experts.tree import Tree, flatten, unflatten
from elm_jax.models import AdapterSpec, ExpertSpec, FullSpec, T5Config
from elm_jax.models.scan import from_storage

Array = jax.Array
FORMS = ("auto", "gathered", "grouped")
"""How the experts' products are laid out; all give equal results. See `choose_form`."""
GATHERED_BYTES = 2**27
"""Most bytes that the gathered experts of a batch may take before `auto` groups examples."""


class Groups(NamedTuple):
    """The examples of a batch in groups that share an expert; see `group_examples`.

    Attributes:
      experts: int32 [G], the place of each group's expert; X for a group without examples.
      rows: int32 [G * S], which example stands in each place of the groups; B where none does.
      places: int32 [B], where each example stands.
    """

    experts: Array
    rows: Array
    places: Array


def check_mixable(spec: ExpertSpec | None) -> None:
    """Refuses experts that a mixed batch cannot hold.

    Raises:
      ElmError: for `full` experts, and for none.
    """
    if spec is None:
        raise ElmError("a mixed batch needs the spec of its experts, got None")
    if isinstance(spec, FullSpec):
        raise ElmError(
            "a mixed batch cannot hold `full` experts: each is a whole backbone, so nothing is "
            "left to share; evaluate them one after the other, or train adapters or LoRA"
        )


def check_bare(spec: ExpertSpec) -> None:
    """Refuses the bare backbone beside experts of a kind of which none is the identity.

    Raises:
      ElmError: for sequential adapters without an inner residual.
    """
    if isinstance(spec, AdapterSpec) and spec.placement == "sequential" and not spec.inner_residual:
        raise ElmError(
            "the bare backbone (None) cannot stand beside sequential adapters without "
            "inner_residual: all that a sublayer passes on goes through its adapter, and no "
            "adapter of that kind is the identity; run those examples without experts"
        )


def check_form(form: str) -> None:
    """Refuses an unknown form.

    Raises:
      ElmError: naming the accepted ones.
    """
    if form not in FORMS:
        raise ElmError(
            f"form must be one of {', '.join(FORMS)}, got {form!r}{nearest(str(form), FORMS)}"
        )


def group_size(batch: int, experts: int) -> int:
    """Returns S, the size of the groups of a batch: as many examples as experts have on average.

    >>> group_size(32, 8), group_size(3, 8)
    (4, 1)
    """
    return max(1, batch // experts)


def group_examples(places: Array, experts: int, size: int) -> Groups:
    """Sorts the examples of a batch by expert and cuts them into groups of one expert each.

    The number of groups depends on shapes alone: as many as the unluckiest batch needs.

    Args:
      places: int32 [B], each example's place in the stack; X is the bare backbone.
      experts: X.
      size: S, examples at most in a group.

    >>> groups = group_examples(jnp.array([1, 0, 1, 1]), experts=2, size=2)
    >>> groups.experts.tolist(), groups.rows.tolist(), groups.places.tolist()
    ([0, 1, 1], [1, 4, 0, 2, 3, 4], [2, 0, 3, 4])
    """
    batch, kinds = len(places), experts + 1
    count = (batch + min(kinds, batch) * (size - 1)) // size
    examples = jnp.bincount(places, length=kinds)
    groups = -(-examples // size)
    order = jnp.argsort(places, stable=True)
    owner = places[order]
    rank = jnp.arange(batch) - (jnp.cumsum(examples) - examples)[owner]
    group = (jnp.cumsum(groups) - groups)[owner] + rank // size
    place = group * size + rank % size
    return Groups(
        jnp.full(count, experts, jnp.int32).at[group].set(owner.astype(jnp.int32)),
        jnp.full(count * size, batch, jnp.int32).at[place].set(order.astype(jnp.int32)),
        jnp.zeros(batch, jnp.int32).at[order].set(place.astype(jnp.int32)),
    )


def choose_form(batch: int, experts: int, size: int) -> str:
    """Returns the form that `auto` stands for.

    'gathered' copies each example's expert out of the stack and batches products over examples;
    'grouped' sorts the examples by expert and copies an expert once per group of `group_size`
    examples, at the price of places that stay empty. Grouping pays where a batch is large beside
    its experts and these are large: then the copies, B of them, cost more memory and bandwidth
    than the products. `benchmarks/mixed_batch.py --forms gathered grouped` measures both: at the
    shape of T5-small on a CPU with 2 cores, LoRA of rank 8 (8 experts, B 32, 38 MB) took 1.01
    times as long as one expert gathered and 1.05 grouped, adapters of 64 (4 experts, B 64, 201 MB)
    1.10 and 1.02, generating. A third form, all experts side by side in one product behind a mask,
    was slower than both on long inputs, and no faster in generation.

    Args:
      batch: B.
      experts: X.
      size: bytes of one expert.

    >>> choose_form(32, 8, size=2**20), choose_form(256, 8, size=2**24)
    ('gathered', 'grouped')
    """
    crowded = batch >= 4 * experts
    return "grouped" if crowded and batch * size > GATHERED_BYTES else "gathered"


def route(
    config: T5Config, experts: Tree, places: Array | np.ndarray, *, form: str = "auto"
) -> Tree:
    """Gives every example of a batch its expert; pure, so it may be traced.

    Args:
      config: the backbone's config.
      experts: the stacked experts of one adapter or LoRA spec, each array [X, ...], per layer as
        they are stored.
      places: int32 [B], each example's place in the stack; X, one past the end, is the bare
        backbone.
      form: one of `FORMS`.

    Returns:
      The `expert` collection of a mixed batch, in the layout that the model reads. Gathered, its
      arrays are [B, ...]. Grouped, those of LoRA and adapters are [G, ...], and 'rows' and
      'places' beside them say which example is in which group; see `group_examples`.

    Raises:
      ElmError: for an unknown form.
    """
    check_form(form)
    places, arrays = jnp.asarray(places), flatten(experts)
    stacked = next(iter(arrays.values())).shape[0]
    if form == "auto":
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays.values()) // stacked
        form = choose_form(len(places), stacked, size)
    # One past the end reads zeros: no update, which is the bare backbone.
    take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)
    if form == "gathered":
        routed: dict[str, Any] = {k: take(leaf, places) for k, leaf in arrays.items()}
        return from_storage(unflatten(routed), config)
    groups = group_examples(places, stacked, group_size(len(places), stacked))
    routed = {}
    for path, leaf in arrays.items():
        module, _, name = path.rpartition("/")
        if name == "scale_delta":  # a vector, not worth moving the activations for
            routed[path] = take(leaf, places)
            continue
        routed[path] = take(leaf, groups.experts)
        routed[f"{module}/rows"] = groups.rows
        routed[f"{module}/places"] = groups.places
    return from_storage(unflatten(routed), config)


def check_places(places: Any, batch: int, experts: int, spec: ExpertSpec) -> np.ndarray:
    """Checks which expert each example is given.

    Args:
      places: int [B], in [0, X]; X is the bare backbone.
      batch: B.
      experts: X.
      spec: what the experts are made of.

    Returns:
      int32 [B].

    Raises:
      ElmError: for another length, a place outside of the stack, or a bare backbone that the spec
        does not allow.
    """
    check_mixable(spec)
    array = np.asarray(places)
    if array.shape != (batch,) or not np.issubdtype(array.dtype, np.integer):
        raise ElmError(
            f"a mixed batch of {batch} examples needs places int [{batch}], got {array.dtype} "
            f"{list(array.shape)}"
        )
    if batch and (array.min() < 0 or array.max() > experts):
        row = int(np.flatnonzero((array < 0) | (array > experts))[0])
        raise ElmError(
            f"example {row} names place {array[row]}, but the stack has the places 0 to "
            f"{experts - 1} ({experts} is the bare backbone)"
        )
    if (array == experts).any():
        check_bare(spec)
    return array.astype(np.int32)
