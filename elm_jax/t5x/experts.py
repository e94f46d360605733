"""Experts in and out of t5x checkpoints; works without t5x.

In t5x's tree the backbone keeps its names and the expert is one more key beside them:

    target/encoder/layers_0/mlp/wi_0/kernel
    target/expert/encoder/layers_0/mlp_adapter/down_kernel

A run writes what its arrays do not say (a LoRA's alpha, an adapter's placement) to a small file,
`expert.json`, in its folder, beside `checkpoint_<step>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from elm_jax.checkpoints.orbax import open_orbax
from elm_jax.checkpoints.stored import StoredArray
from elm_jax.checkpoints.t5x import LEGACY_FILE, STATE_FOLDER, TARGET, open_t5x
from elm_jax.errors import ElmError, nearest
from elm_jax.experts.apply import check_expert
from elm_jax.experts.tree import Tree, check_shapes, flatten, unflatten
from elm_jax.models import (
    AdapterSpec,
    ExpertSpec,
    FullSpec,
    LoraSpec,
    T5Config,
    spec_from_json,
    spec_to_json,
)
from elm_jax.models.config import RUN_FIELDS
from elm_jax.models.scan import from_storage, to_storage

EXPERT = "expert"
"""The key of the expert in t5x's `params`."""
FORMAT = "elm_jax expert in t5x"
FORMAT_VERSION = 1
SIDE_FILE = "expert.json"


def join(backbone: Mapping[str, Any], expert: Tree | None) -> dict[str, Any]:
    """Returns t5x's single tree: the backbone's keys and, beside them, the expert.

    >>> join({'encoder': 1}, {'decoder': 2})
    {'encoder': 1, 'expert': {'decoder': 2}}
    """
    if EXPERT in backbone:
        raise ElmError(f"a backbone with a parameter {EXPERT!r} cannot be joined with an expert")
    return {**backbone} if expert is None else {**backbone, EXPERT: expert}


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], Tree | None]:
    """Undoes `join`.

    >>> split({'encoder': 1, 'expert': {'decoder': 2}})
    ({'encoder': 1}, {'decoder': 2})
    """
    return {k: v for k, v in params.items() if k != EXPERT}, params.get(EXPERT)


def load_t5x_expert(
    path: str | Path,
    config: T5Config,
    *,
    spec: ExpertSpec | None = None,
    backbone: Tree | None = None,
) -> tuple[ExpertSpec, Tree]:
    """Reads an expert that was trained under t5x.

    Args:
      path: a run's folder (its last checkpoint is taken), or one `checkpoint_<step>` in it, in
        t5x's Orbax or legacy layout.
      config: the backbone's.
      spec: what the expert is made of, where the run left no `expert.json`.
      backbone: needed only for a checkpoint of a plain t5x model, all of whose weights were tuned;
        the expert is then its task vector, theta_d - theta_pre (Ilharco et al. 2022).

    Returns:
      The spec, and the arrays as numpy, layer by layer as experts are stored.

    Raises:
      FileNotFoundError: if there is no such folder, or no checkpoint in it.
      ElmError: for damaged files, an expert of another backbone's size, or a spec that is not
        known or does not fit the arrays.
    """
    folder = find_checkpoint(path)
    facts = read_facts(folder)
    shapes = checkpoint_shapes(folder)
    if EXPERT not in shapes:
        if backbone is None:
            raise ElmError(
                f"{folder} holds no {EXPERT!r} among {', '.join(sorted(shapes))}: it is a plain "
                "T5X model; give its backbone to read the difference as a full expert"
            )
        if spec is not None and not isinstance(spec, FullSpec):
            raise ElmError(f"{folder} holds a plain T5X model, not an expert of {spec}")
        check_shapes(str(folder), shapes, backbone)
        tuned, before = flatten(read_arrays(folder)), flatten(backbone)
        delta = {k: np.asarray(v, np.float32) - np.asarray(before[k]) for k, v in tuned.items()}
        return FullSpec(), unflatten(delta)
    if facts is not None:
        _check_config(facts, config, folder)
        recorded = spec_from_json(dict(facts["spec"]))
        if spec is not None and spec != recorded:
            raise ElmError(f"{folder}: the run says {recorded}, not {spec}")
        spec = recorded
    if spec is None:
        spec = _spec_of_arrays(shapes[EXPERT], folder)
    trained_as = config if facts is None else T5Config.from_json(facts["config"])
    check_expert(str(folder), trained_as, spec, shapes[EXPERT])
    return spec, to_storage(read_arrays(folder, EXPERT), trained_as)


def save_t5x_expert(
    spec: ExpertSpec,
    expert: Tree,
    config: T5Config,
    folder: str | Path,
    *,
    step: int = 0,
) -> Path:
    """Writes an expert as a checkpoint that `t5x.eval` and `t5x.infer` read.

    It holds no optimizer state: to train on from it, name it to `checkpoints.ExpertInitializer`.

    Args:
      spec: what the expert is made of.
      expert: its arrays.
      config: the backbone's.
      folder: the run's folder to be; made if missing.
      step: number of the checkpoint.

    Returns:
      `<folder>/checkpoint_<step>`.

    Raises:
      ElmError: if the arrays do not fit spec and config.
      FileExistsError: if the checkpoint is there.
    """
    import orbax.checkpoint as ocp

    expert = from_storage(expert, config)
    check_expert("the expert", config, spec, expert)
    target = Path(folder).resolve() / f"checkpoint_{step}"
    if target.exists():
        raise FileExistsError(f"{target} already exists; name another folder or step")
    write_facts(folder, spec, config)
    state = {
        "target": {EXPERT: unflatten({k: np.asarray(v) for k, v in flatten(expert).items()})},
        "state": {"step": np.int32(step)},
    }
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(target / "state", state)
    return target


def write_facts(
    folder: str | Path, spec: ExpertSpec, config: T5Config, backbone: str | None = None
) -> None:
    """Writes `expert.json`: the spec, the backbone's config and where the backbone came from."""
    facts = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": spec_to_json(spec),
        "config": config.to_json(),
        "backbone": backbone,
    }
    path = epath.Path(folder) / SIDE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(facts, indent=2) + "\n")
    temporary.replace(path)


def read_facts(path: str | Path) -> dict[str, Any] | None:
    """Reads the `expert.json` of a run or of one of its checkpoints; None where there is none.

    Raises:
      ElmError: if it is damaged, or of another format.
    """
    folder = epath.Path(path)
    for file in (folder / SIDE_FILE, folder.parent / SIDE_FILE):
        if not file.exists():
            continue
        try:
            facts = json.loads(file.read_text())
        except ValueError as error:
            raise ElmError(f"{file}: broken JSON ({error})") from None
        found = facts.get("format"), facts.get("format_version")
        if found != (FORMAT, FORMAT_VERSION) or not {"spec", "config"} <= set(facts):
            raise ElmError(
                f"{file}: expected format {FORMAT!r} version {FORMAT_VERSION} with 'spec' and "
                f"'config', found {found[0]!r} version {found[1]!r}"
            )
        return facts
    return None


def is_t5x_checkpoint(path: str | Path) -> bool:
    """Whether a folder is one t5x checkpoint, Orbax or legacy."""
    folder = epath.Path(path)
    return (folder / STATE_FOLDER).is_dir() or (folder / LEGACY_FILE).is_file()


def find_checkpoint(path: str | Path) -> epath.Path:
    """Returns the checkpoint at `path`, or the last one in the run's folder `path`.

    Raises:
      FileNotFoundError: if there is none.
    """
    folder = epath.Path(path)
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise FileNotFoundError(f"{folder}: no such folder{nearest(folder.name, siblings)}")
    if is_t5x_checkpoint(folder):
        return folder.resolve()
    steps = {
        int(match[1]): child
        for child in folder.iterdir()
        if (match := re.fullmatch(r"checkpoint_(\d+)", child.name)) and is_t5x_checkpoint(child)
    }
    if not steps:
        raise FileNotFoundError(
            f"{folder} is no t5x checkpoint and holds none: neither 'state/' (Orbax) nor "
            "'checkpoint' (legacy) nor checkpoint_<step> in it"
        )
    return steps[max(steps)].resolve()


def checkpoint_shapes(path: str | Path) -> Tree:
    """Returns the parameters of a checkpoint (its `target`) as a tree of what has a `shape`.

    Raises:
      ElmError: if the files are damaged.
    """
    return unflatten(_open(Path(path)))


def read_arrays(path: str | Path, key: str | None = None) -> Tree:
    """Reads the parameters of a checkpoint, or those below one key of them, as numpy.

    Raises:
      ElmError: if the files are damaged, or there is no such key.
    """
    arrays = _open(Path(path))
    if key is not None:
        below = {k.removeprefix(f"{key}/"): v for k, v in arrays.items() if k.startswith(f"{key}/")}
        if not below:
            raise ElmError(f"{path} holds no {key!r}{nearest(key, unflatten(arrays))}")
        arrays = below
    return unflatten({name: array.read() for name, array in arrays.items()})


def _open(folder: Path) -> dict[str, StoredArray]:
    """Opens a checkpoint's parameters; an expert's layers stay as they were trained."""
    if not (folder / STATE_FOLDER).is_dir():
        return open_t5x(folder)
    arrays = open_orbax(folder / STATE_FOLDER, lambda path: path.startswith(TARGET))
    if not arrays:
        raise ElmError(f"{folder}: holds no parameters under 'target'")
    return {path.removeprefix(TARGET): array for path, array in arrays.items()}


def _check_config(facts: Mapping[str, Any], config: T5Config, folder: epath.Path) -> None:
    """Refuses an expert of a backbone of another architecture, naming the field."""
    recorded = facts["config"]
    for key, value in config.to_json().items():
        if key not in RUN_FIELDS and key in recorded and recorded[key] != value:
            raise ElmError(
                f"{folder}: its backbone has {key} {recorded[key]!r}, this one {value!r}"
            )


def _spec_of_arrays(shapes: Tree, folder: epath.Path) -> ExpertSpec:
    """Infers a spec from names and shapes where those decide it; says what is missing elsewhere."""
    flat = {path: tuple(leaf.shape) for path, leaf in flatten(shapes).items()}
    guessed: ExpertSpec
    if any(path.endswith("/lora_a") for path in flat):
        short = {"query": "q", "key": "k", "value": "v", "out": "o", "wi": "wi", "wo": "wo"}
        found = {(p.split("/")[-2].partition("_")[0], _block(p)) for p in flat}
        rank = min(shape[1] for path, shape in flat.items() if path.endswith("/lora_a"))
        guessed = LoraSpec(
            rank,
            targets=tuple(sorted({short[name] for name, _ in found if name in short})),
            blocks=tuple(sorted({block for _, block in found})),
        )
        unknown = "alpha"
    elif any(path.endswith("/down_kernel") for path in flat):
        downs = {path: shape for path, shape in flat.items() if path.endswith("/down_kernel")}
        guessed = AdapterSpec(
            min(shape[1] for shape in downs.values()),
            sublayers=tuple(sorted({p.split("/")[-2].removesuffix("_adapter") for p in downs})),
            use_bias=any(path.endswith("/up_bias") for path in flat),
            train_layer_norms=any(path.endswith("/scale_delta") for path in flat),
        )
        unknown = "placement, activation and inner_residual"
    elif any(path.endswith("token_embedder/embedding") for path in flat):
        return FullSpec()
    else:
        raise ElmError(f"{folder}: {next(iter(flat), 'nothing')!r} is of no kind of expert")
    raise ElmError(
        f"{folder} has no {SIDE_FILE} beside it, and arrays do not say {unknown}; give the spec, "
        f"by the arrays one like {guessed}"
    )


def _block(path: str) -> str:
    if "/encoder_decoder_attention/" in path:
        return "cross"
    return path.split("/")[0]
