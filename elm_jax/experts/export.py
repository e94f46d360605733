"""Experts as files for other tools: plain arrays, adapters of other libraries, tables of numbers.

safetensors, npz   params.<format>: one array per parameter path ('a/b/c'), bits as stored
peft               a LoRA for Hugging Face PEFT
adapters           a bottleneck adapter for AdapterHub's `adapters`
csv, parquet       statistics.<format> and, of several experts, cosines.<format>
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.errors import ElmError, nearest
from elm_jax.experts.adapterhub import adapters_from_expert, write_adapters
from elm_jax.experts.files import new_folder, write_json
from elm_jax.experts.peft import peft_from_lora, write_peft
from elm_jax.experts.statistics import expert_cosines, expert_statistics
from elm_jax.experts.store import ExpertInfo, ExpertStore
from elm_jax.experts.tree import Tree, flatten

ARRAYS, LIBRARIES, TABLES = ("safetensors", "npz"), ("peft", "adapters"), ("csv", "parquet")
FORMATS = (*ARRAYS, *LIBRARIES, *TABLES)


def export_expert(
    store: ExpertStore, name: str | Sequence[str], output: str | Path, *, format: str
) -> Path:
    """Writes an expert for another tool, beside a copy of its expert.json; see the module.

    Args:
      store: where the expert is.
      name: its id; for the tables ('csv', 'parquet') also several ids.
      output: folder to make; it must not exist, or be empty.
      format: one of `FORMATS`.

    Returns:
      The folder.

    Raises:
      ElmError: for an unknown format or expert, a damaged one, one which the other library has no
        form for, or 'parquet' without pyarrow.
      FileExistsError: if the folder exists and holds something.
    """
    if format not in FORMATS:
        raise ElmError(f"unknown format {format!r}{nearest(format, FORMATS)}; one of {FORMATS}")
    names = [name] if isinstance(name, str) else list(name)
    if format in TABLES:
        return _export_tables(store, names, Path(output), format)
    if len(names) != 1:
        raise ElmError(f"format {format!r} is for one expert, got {len(names)} ids")
    with new_folder(output) as folder:
        info, params = store.load(names[0])
        if format in ARRAYS:
            _write_arrays(folder, info, params, format)
        elif format == "peft":
            write_peft(folder, *peft_from_lora(info.spec, params, base_model=info.backbone["name"]))
        else:
            write_adapters(
                folder,
                *adapters_from_expert(
                    info.spec, params, name=info.id, base_model=info.backbone["name"]
                ),
            )
        write_json(folder / "expert.json", info.to_json())
    return Path(output)


def _write_arrays(folder: Path, info: ExpertInfo, params: Tree, format: str) -> None:
    arrays = {path: np.ascontiguousarray(leaf) for path, leaf in flatten(params).items()}
    if format == "safetensors":
        from safetensors.numpy import save_file

        metadata = {"id": info.id, "kind": info.kind, "checksum": info.checksum}
        save_file(arrays, folder / "params.safetensors", metadata=metadata)
    else:
        np.savez(folder / "params.npz", allow_pickle=False, **arrays)


def _export_tables(store: ExpertStore, names: list[str], output: Path, format: str) -> Path:
    if format == "parquet":
        _pyarrow()  # before any work
    if len(set(names)) < len(names):
        raise ElmError(f"an expert is named twice: {', '.join(names)}")
    with new_folder(output) as folder:
        experts = {name: store.load(name)[1] for name in names}
        write_table(folder / f"statistics.{format}", expert_statistics(experts))
        if len(experts) > 1:
            write_table(folder / f"cosines.{format}", expert_cosines(experts))
    return output


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of equal keys as .csv (None is an empty cell) or .parquet (None is null).

    Raises:
      ElmError: for 'parquet' without pyarrow, or another suffix.
    """
    columns = list(rows[0])
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        arrow, parquet = _pyarrow()
        parquet.write_table(arrow.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        raise ElmError(f"{path}: a table is .csv or .parquet")


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ElmError(
            "format 'parquet' needs pyarrow: pip install pyarrow, or choose 'csv'"
        ) from error
    return pyarrow, pyarrow.parquet
