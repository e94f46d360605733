"""Experts that are ready to run: a fixed number of places on the device, and who stands in each.

    pool = ExpertPool(backbone.config, get_spec('lora'), capacity=8, store=store)
    places = pool.places(['imdb', 'cosmos_qa', None])    # loads what is missing

The arrays keep their shapes whoever comes and goes, so a program compiled for the pool runs on.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from elm_jax.errors import ElmError, nearest
from elm_jax.experts.apply import check_expert, expert_shapes
from elm_jax.experts.routing import check_bare, check_mixable
from elm_jax.experts.store import ExpertStore
from elm_jax.experts.tree import Tree
from elm_jax.models import ExpertSpec, T5Config


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: Tree, expert: Tree, place: jax.Array) -> Tree:
    return jax.tree.map(
        lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, place, 0),
        stack,
        expert,
    )


class ExpertPool:
    """X places for experts of one spec over one backbone, for mixed batches.

    An expert is known by an id; None is the bare backbone, which takes no place. With a store,
    `places` loads what a batch asks for and, where no place is free, gives it that of the expert
    which has been out of use longest. Not safe for several threads.

    Args:
      config: the backbone's config.
      spec: what all its experts are made of: an adapter or LoRA spec.
      capacity: X.
      store: where `places` finds experts that are not loaded.
      backbone: {'name', 'fingerprint'}; experts of the store that belong to another are refused.
      sharding: where the arrays live, as of `jax.device_put`; the default device by default.

    Raises:
      ElmError: for `full` experts, a spec that adds nothing to the backbone, or a capacity below 1.
    """

    def __init__(
        self,
        config: T5Config,
        spec: ExpertSpec,
        capacity: int,
        *,
        store: ExpertStore | None = None,
        backbone: Mapping[str, str] | None = None,
        sharding: Any = None,
    ) -> None:
        check_mixable(spec)
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ElmError(f"the capacity of a pool must be a positive integer, got {capacity!r}")
        self.config, self.spec, self.capacity = config, spec, capacity
        self.store, self.backbone = store, backbone
        empty = jax.tree.map(
            lambda s: np.zeros((capacity, *s.shape), s.dtype), expert_shapes(config, spec)
        )
        self._experts = jax.device_put(empty, sharding)
        self._place: OrderedDict[str, int] = OrderedDict()  # the longest unused first
        self._free = list(reversed(range(capacity)))

    @property
    def experts(self) -> Tree:
        """The stacked experts, each array [X, ...]; read it anew after a change of the pool."""
        return self._experts

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the loaded experts, the longest unused first."""
        return tuple(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, name: object) -> bool:
        return name in self._place

    def put(self, name: str, expert: Tree) -> int:
        """Loads an expert into a free place, or over the one of this id.

        Args:
          name: its id.
          expert: its arrays (numpy or jax).

        Returns:
          Its place.

        Raises:
          ElmError: if no place is free, or the arrays are not those of the pool's spec.
        """
        check_expert(f"expert {name!r}", self.config, self.spec, expert)
        if name not in self._place and not self._free:
            raise ElmError(
                f"no place is free for expert {name!r}: the pool holds {self.capacity} "
                f"({', '.join(self.ids[:8])}{', ...' if len(self) > 8 else ''}); remove one first"
            )
        place = self._place[name] if name in self._place else self._free[-1]
        as_float = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), expert)
        self._experts = _write(self._experts, as_float, np.int32(place))
        if name not in self._place:
            self._free.pop()
        self._place[name] = place
        self._place.move_to_end(name)
        return place

    def remove(self, name: str) -> None:
        """Frees the place of an expert.

        Raises:
          ElmError: if it is not loaded, with the nearest id.
        """
        if name not in self._place:
            raise self._unknown(name, self.ids)
        self._free.append(self._place.pop(name))

    def places(self, names: Sequence[str | None]) -> np.ndarray:
        """Returns where the expert of each example stands, after loading what is missing.

        Args:
          names: an id per example; None is the bare backbone.

        Returns:
          int32 [B]; X for the bare backbone.

        Raises:
          ElmError: for an id that is neither loaded nor in the store (nothing is loaded then), for
            more different experts than the pool has places, for an expert of another spec or
            backbone, or a bare backbone that the spec does not allow.
        """
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        if len(wanted) > self.capacity:
            raise ElmError(
                f"a batch names {len(wanted)} different experts, but the pool has "
                f"{self.capacity} places"
            )
        if None in names:
            check_bare(self.spec)
        missing = [name for name in wanted if name not in self._place]
        for name in missing:
            if self.store is None or name not in self.store:
                raise self._unknown(name, [*self.ids, *(self.store.ids() if self.store else ())])
        loaded = {name: self._load(name) for name in missing}
        for name, expert in loaded.items():
            if not self._free:
                self.remove(next(other for other in self._place if other not in wanted))
            self.put(name, expert)
        for name in wanted:
            self._place.move_to_end(name)
        place: dict[str | None, int] = {None: self.capacity}
        place.update(self._place)
        return np.array([place[name] for name in names], np.int32)

    def _load(self, name: str) -> Tree:
        assert self.store is not None  # asked before
        info, expert = self.store.load(name, backbone=self.backbone)
        if info.spec != self.spec:
            raise ElmError(
                f"expert {name!r} is {info.spec}, but the pool is for {self.spec}; experts of "
                "another spec need a pool of their own"
            )
        return expert

    def _unknown(self, name: str, known: Sequence[str]) -> ElmError:
        where = f"in the pool ({len(self)} of {self.capacity} places taken)"
        if self.store is not None:
            where = f"neither {where} nor in {self.store.path}"
        else:
            where = f"not {where}"
        return ElmError(f"expert {name!r} is {where}{nearest(str(name), known)}")
