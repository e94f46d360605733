"""How a t5x run starts, stops and goes on: backbone in, expert alone out, both together again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict, freeze, unfreeze
from t5x import utils as t5x_utils

from elm_jax.checkpoints.backbone import load_backbone
from elm_jax.errors import ElmError
from elm_jax.experts.store import ExpertStore
from elm_jax.experts.tree import Tree, check_shapes, flatten, unflatten
from elm_jax.models import ExpertSpec, T5Config, spec_from_json
from elm_jax.models.config import RUN_FIELDS
from elm_jax.models.scan import from_storage
from elm_jax.t5x import experts
from elm_jax.t5x.experts import EXPERT, is_t5x_checkpoint, split


def t5x_path(path: str) -> str | tuple[()]:
    """Returns `path` if it is a T5X checkpoint, which t5x itself reads, shard by shard.

    Any other backbone (a name, our own folder, Hugging Face's) is read by `ExpertInitializer`, and
    t5x is told that there is nothing to restore.
    """
    return path if is_t5x_checkpoint(path) else ()


class ExpertInitializer(t5x_utils.TrainStateInitializer):
    """Starts a run from a backbone that is no T5X checkpoint, and from a store's expert.

    Args:
      backbone: a T5X checkpoint (left to t5x), or what `load_backbone` takes.
      expert: None for a fresh expert; else '<store>/<id>', or a t5x run or checkpoint of one.
      **arguments: t5x's own.
    """

    def __init__(self, *, backbone: str, expert: str | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._backbone = backbone
        self._expert = expert
        self._model: Any = arguments["init_fn"].__self__

    def from_scratch(self, init_rng: jax.Array) -> Any:
        """Returns the state before the first step; t5x calls it also for what a checkpoint lacks.

        Raises:
          ElmError: if the backbone or expert is not of the model's config and spec.
        """
        given: dict[str, Any] = {}
        if not is_t5x_checkpoint(self._backbone):
            given = dict(read_backbone(self._backbone, self._model.config))
        if self._expert is not None:
            spec, arrays = _stored_expert(self._expert, self._model.config)
            if spec != self._model.spec:
                raise ElmError(f"{self._expert} is {spec}, but the model's is {self._model.spec}")
            given[EXPERT] = from_storage(arrays, self._model.config)
        state = super().from_scratch(init_rng)
        if not given:
            return state
        params = flatten(unfreeze(state.params))
        check_shapes("the model's start", given, unflatten({k: params[k] for k in flatten(given)}))
        for path, array in flatten(given).items():
            params[path] = _like(params[path], np.asarray(array))
        tree = unflatten(params)
        return state.replace_params(freeze(tree) if isinstance(state.params, FrozenDict) else tree)


@dataclasses.dataclass
class SaveExpert:
    """Saves the expert and its optimizer state, without the frozen backbone.

    A t5x `SaveStateTransformationFn`. The run's folder also gets `expert.json`.

    Attributes:
      folder: the run's.
      spec: what the expert is made of.
      config: the backbone's.
      backbone: where it came from, for the record.
      with_backbone: whether to save all of the state, as t5x does.
    """

    folder: str
    spec: ExpertSpec
    config: T5Config
    backbone: str | None = None
    with_backbone: bool = False

    def __call__(self, state_dict: Tree, parameter_infos: Tree) -> tuple[Tree, Tree]:
        """Returns both trees without the backbone."""
        if jax.process_index() == 0:
            experts.write_facts(self.folder, self.spec, self.config, self.backbone)
        if self.with_backbone:
            return state_dict, parameter_infos
        return _expert_alone(state_dict), _expert_alone(parameter_infos)


@dataclasses.dataclass
class RestoreExpert:
    """Puts the backbone back where a checkpoint holds the expert alone.

    A t5x `RestoreStateTransformationFn`, for the first start, a resumed run, eval and infer. It
    also refuses a backbone of another architecture, which t5x would notice late or not at all.

    Attributes:
      backbone: a T5X checkpoint, or what `load_backbone` takes.
      config: the model's.
      spec: of the expert that the checkpoint must hold; None takes a backbone alone too, from
        which training starts.
    """

    backbone: str
    config: T5Config
    spec: ExpertSpec | None = None

    def __call__(
        self, checkpoint: Tree, state_dict: Tree, *, is_resuming: bool = False
    ) -> dict[str, Any]:
        """Returns the state to restore.

        Args:
          checkpoint: what the checkpoint holds (t5x's placeholders).
          state_dict: what the model has (shapes).
          is_resuming: unused: what is there decides.

        Raises:
          ElmError: naming an array that the backbone lacks or has in another shape.
        """
        del is_resuming
        target = unfreeze(checkpoint["target"])
        wanted, _ = split(unfreeze(state_dict["target"]))
        held, expert = split(target)
        if expert is None and self.spec is not None:
            raise ElmError(
                f"the checkpoint holds no {EXPERT!r}, only {', '.join(sorted(target))}; set EXPERT "
                "to None to run a backbone alone"
            )
        if held:
            if expert is None:  # a backbone: the one to start from
                check_shapes(self.backbone, experts.checkpoint_shapes(self.backbone), wanted)
            return checkpoint
        backbone = read_backbone(self.backbone, self.config)
        check_shapes(self.backbone, backbone, wanted)
        # NumPy, as Orbax reshapes what is no placeholder in a way that jax arrays refuse.
        arrays = jax.tree.map(lambda a, like: np.asarray(a, like.dtype), backbone, wanted)
        return {**checkpoint, "target": {**arrays, **target}}


def read_backbone(path: str, config: T5Config) -> Tree:
    """Reads the arrays of a T5X checkpoint, or of what `load_backbone` takes, for a model.

    Raises:
      ElmError: if it cannot be read, or is of another architecture.
    """
    if is_t5x_checkpoint(path):
        return split(experts.read_arrays(path))[0]
    loaded = load_backbone(path)
    _check_config(path, loaded.config, config)
    return from_storage(dict(loaded.params), config)


def recorded_spec(path: str) -> ExpertSpec:
    """Returns what the expert of a t5x run or checkpoint is made of, as the run wrote it down.

    Raises:
      FileNotFoundError: if there is no such folder.
      ElmError: if there is no `expert.json` in it or beside it.
    """
    facts = experts.read_facts(experts.find_checkpoint(path))
    if facts is None:
        raise ElmError(f"{path} has no {experts.SIDE_FILE}, in it or beside it; set EXPERT")
    return spec_from_json(dict(facts["spec"]))


def _expert_alone(tree: Tree) -> dict[str, Any]:
    target = {key: value for key, value in tree["target"].items() if key == EXPERT}
    return {**tree, "target": target}


def _stored_expert(path: str, config: T5Config) -> tuple[ExpertSpec, Tree]:
    store, name = os.path.split(path.rstrip("/"))
    if os.path.exists(os.path.join(path, "params")):
        info, arrays = ExpertStore(store).load(name)
        return info.spec, arrays
    return experts.load_t5x_expert(path, config)


def _check_config(name: str, found: T5Config, wanted: T5Config) -> None:
    ours: Mapping[str, Any] = wanted.to_json()
    for key, value in found.to_json().items():
        if key not in RUN_FIELDS and ours[key] != value:
            raise ElmError(
                f"backbone {name!r} has {key} {value!r}, but the model's is {ours[key]!r}"
            )


def _like(place: jax.Array, array: np.ndarray) -> jax.Array:
    """Lays an array out on devices as another one is, reading only this process's parts."""
    return jax.make_array_from_callback(
        array.shape, place.sharding, lambda index: np.asarray(array[index], place.dtype)
    )
