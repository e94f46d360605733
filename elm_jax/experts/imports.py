"""Experts of other libraries, and exported ones of our own, into a store.

peft       adapter_config.json with 'peft_type', adapter_model.safetensors
adapters   adapter_config.json with 'config', adapter.safetensors
own        expert.json and params.safetensors, params.npz or params/ (a folder of a store)
t5x        a T5X checkpoint, or the folder of a t5x run
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.errors import ElmError, nearest
from elm_jax.experts import adapterhub, peft
from elm_jax.experts.apply import expert_shapes
from elm_jax.experts.files import open_tensors, read_json, shown
from elm_jax.experts.store import (
    ExpertInfo,
    ExpertStore,
    check_backbone,
    check_checksum,
    check_id,
)
from elm_jax.experts.tree import Tree, check_shapes, checksum, flatten, unflatten
from elm_jax.models import ExpertSpec, T5Config

FORMATS = ("peft", "adapters", "t5x", "own")
_MAX_NUMBER = 2**20
Loader = Callable[[Path, T5Config], tuple[ExpertSpec, Tree]]
_LOADERS: dict[str, Loader] = {
    "peft": peft.load_peft_expert,
    "adapters": adapterhub.load_adapters_expert,
}


def import_expert(
    store: ExpertStore,
    path: str | Path,
    name: str,
    *,
    config: T5Config,
    backbone: Mapping[str, str],
    format: str | None = None,
    tasks: Sequence[str] = (),
    loader: Loader | None = None,
) -> ExpertInfo:
    """Adds an expert from files to a store: all of it or nothing.

    Args:
      store: where it goes.
      path: its folder.
      name: id that it gets.
      config: of the backbone that it is for.
      backbone: {'name', 'fingerprint'} of that backbone. Only an expert of our own knows its
        backbone and is checked against it; of others the shapes are.
      format: 'peft', 'adapters', 'own' or 't5x'; found out when None.
      tasks: names of the tasks it was trained on; those recorded by default.
      loader: reads the folder in place of the readers here; 't5x' needs one
        (`elm_jax.t5x.experts.load_t5x_expert`).

    Returns:
      The info as written; `settings['imported']` says where the expert is from.

    Raises:
      FileNotFoundError: when the folder or one of its files is missing.
      FileExistsError: if the store already has this id.
      ElmError: for another format, files that are damaged, or an expert that ours cannot represent
        or that does not fit the backbone.
    """
    check_id(name)
    if name in store:
        raise FileExistsError(f"{store.path / name} already exists; experts are never overwritten")
    if format is None:
        format = detect_format(path)
    if format not in FORMATS:
        raise ElmError(f"unknown format {format!r}{nearest(format, FORMATS)}; one of {FORMATS}")
    folder = Path(path).resolve()
    facts: dict[str, Any] = {"format": format, "path": str(folder)}
    loader = loader or _LOADERS.get(format)
    if format == "own":
        info, params = load_own_expert(folder, config, backbone)
        info = dataclasses.replace(info, id=name, embedder=None)
    elif loader is None:
        raise ElmError("format 't5x' needs a loader: elm_jax.t5x.experts.load_t5x_expert")
    else:
        spec, params = loader(folder, config)
        facts |= _facts(folder, params)
        info = ExpertInfo(name, spec, (), (), dict(backbone))
    info = dataclasses.replace(
        info,
        tasks=tuple(tasks) or info.tasks,
        settings={**info.settings, "imported": facts},
    )
    return store.write(info, params, _instances(folder) if format == "own" else ())


def detect_format(path: str | Path) -> str:
    """Finds out what kind of files an expert is in.

    Raises:
      FileNotFoundError: when there is no such folder.
      ElmError: for a folder that holds no expert, or none that is known.
    """
    folder = Path(path)
    if not folder.exists():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise FileNotFoundError(f"{folder}: no such folder{nearest(folder.name, siblings)}")
    if not folder.is_dir():
        raise ElmError(f"{folder} is a file; an expert to import is a folder")
    config = folder / peft.CONFIG_FILE
    if config.exists():
        data = read_json(config)
        if "peft_type" in data:
            return "peft"
        if "config" in data:
            return "adapters"
        raise ElmError(f"{config}: neither 'peft_type' (PEFT) nor 'config' (adapters) is there")
    if (folder / "expert.json").exists() and any(
        (folder / name).exists() for name in ("params", "params.safetensors", "params.npz")
    ):
        return "own"
    if (
        (folder / "checkpoint").is_file()
        or (folder / "state").is_dir()
        or any(folder.glob("checkpoint_*"))
    ):
        return "t5x"
    raise ElmError(
        f"{folder} holds no expert: expected adapter_config.json (PEFT or adapters), expert.json "
        "with its params (our own), or a T5X checkpoint"
    )


def load_own_expert(
    path: str | Path, config: T5Config, backbone: Mapping[str, str]
) -> tuple[ExpertInfo, Tree]:
    """Reads a folder of `export_expert` ('safetensors' or 'npz'), or an expert's in a store.

    Args:
      path: the folder.
      config: of the backbone that the expert is for.
      backbone: {'name', 'fingerprint'} of that backbone.

    Returns:
      The recorded info, and the arrays, bits as stored.

    Raises:
      FileNotFoundError: when a file is missing.
      ElmError: for damaged files, arrays that do not fit, or an expert of another backbone.
    """
    folder = Path(path).resolve()
    where = folder / "expert.json"
    data = read_json(where)
    try:
        info = ExpertInfo.from_json(data, str(where))
        recorded = info.backbone
        if not (isinstance(recorded, Mapping) and {"name", "fingerprint"} <= recorded.keys()) or (
            not all(isinstance(value, str) for value in recorded.values())
        ):
            raise ElmError(f"{where}: 'backbone' is {shown(recorded)}, expected its name and "
                           "fingerprint")  # fmt: skip
        _check_types(info, where)
        check_backbone(info, backbone)
        wanted = expert_shapes(config.replace(scan_layers=False), info.spec)
    except (TypeError, AttributeError) as error:  # values of another type than their field's
        raise ElmError(f"{where}: {error}") from error
    if (folder / "params").is_dir():
        store = ExpertStore(folder.parent)
        check_shapes(str(folder / "params"), store.shapes(folder.name), wanted)
        return store.load(folder.name, backbone=backbone)
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(wanted).items()}
    if (folder / "params.safetensors").exists():
        arrays = _read_safetensors(folder / "params.safetensors", shapes)
    else:
        arrays = _read_npz(folder / "params.npz", shapes)
    params = unflatten(arrays)
    check_checksum(info, checksum(params), folder)
    return info, params


def _check_types(info: ExpertInfo, where: Path) -> None:
    """Checks what `ExpertInfo.from_json` takes as it is.

    Raises:
      ElmError: naming a field whose value has another type, or is out of range.
    """
    fields: dict[str, bool] = {
        "settings": isinstance(info.settings, Mapping),
        "metrics": isinstance(info.metrics, Mapping),
        "history": all(isinstance(row, Mapping) for row in info.history),
        "merged_from": info.merged_from is None or isinstance(info.merged_from, list),
        "checksum": isinstance(info.checksum, str),
    }
    fields |= {
        name: all(isinstance(text, str) for text in getattr(info, name))
        for name in ("tasks", "prompts")
    }
    for field in dataclasses.fields(info.spec):
        value, default = getattr(info.spec, field.name), field.default
        if isinstance(default, (bool, str)):
            fields[f"spec.{field.name}"] = type(value) is type(default)
        elif not isinstance(default, tuple) and value is not None:  # tuples are checked already
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            fields[f"spec.{field.name}"] = number and abs(value) <= _MAX_NUMBER
    for name, good in fields.items():
        if not good:
            owner, name = (info.spec, name[5:]) if name.startswith("spec.") else (info, name)
            raise ElmError(
                f"{where}: {name!r} is {shown(getattr(owner, name))}, which is out of range or of "
                "another type than it should be"
            )


def _instances(folder: Path) -> list[dict[str, Any]]:
    try:
        return ExpertStore(folder.parent).instances(folder.name)
    except UnicodeDecodeError as error:
        raise ElmError(f"{folder / 'instances.jsonl'}: no UTF-8 ({error})") from error


def _read_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    with open_tensors(path) as tensors:
        _check_names(path, tensors.shapes, shapes)
        return {name: tensors.read(name, shape, exact=True) for name, shape in shapes.items()}


def _read_npz(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Reads an npz file whose headers are checked before its arrays are read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_names(path, [n.removesuffix(".npy") for n in archive.namelist()], shapes)
            return {name: _read_npy(archive, name, shape) for name, shape in shapes.items()}
    except ElmError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise many types for damaged bytes
        raise ElmError(f"{path}: truncated or damaged npz file ({error})") from error


def _read_npy(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        found, _, dtype = read[version[0]](file)
        if found != shape or dtype.kind != "f" or dtype.itemsize > 8:
            raise ElmError(
                f"{archive.filename}: array {name!r} has shape {found} and dtype {dtype}, expected "
                f"{shape} and floats"
            )
    with archive.open(f"{name}.npy") as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        return array


def _check_names(
    path: Path, found: Sequence[str] | Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    for name in found:
        if name not in wanted:
            raise ElmError(f"{path}: unknown array {shown(name)}{nearest(name[:200], wanted)}")
    for name in wanted:
        if name not in found:
            raise ElmError(f"{path}: array {name!r} is missing")


def _facts(folder: Path, params: Tree) -> dict[str, Any]:
    """Returns what is worth keeping of where an expert of another library is from."""
    facts: dict[str, Any] = {}
    config = folder / peft.CONFIG_FILE
    if config.exists():
        data = read_json(config)
        base = data.get("base_model_name_or_path") or data.get("model_name")
        if isinstance(base, str):
            facts["base_model"] = base[:300]
    flat = flatten(params)
    factors = [path for path in flat if path.endswith("/lora_a")]
    empty = [path for path in factors if not flat[path].any()]
    if empty:  # see `peft`: modules without an update, in the grid of a LoraSpec
        facts["projections_without_update"] = f"{len(empty)} of {len(factors)}"
    return facts
