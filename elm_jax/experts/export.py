"""Experts as plain files for other tools: one flat array per parameter path."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

import numpy as np

from elm_jax.errors import ElmError, nearest
from elm_jax.experts.store import ExpertStore
from elm_jax.experts.tree import flatten

FORMATS = ("safetensors", "npz")


def export_expert(store: ExpertStore, name: str, output: str | Path, *, format: str) -> Path:
    """Writes an expert as `params.<format>` (keys 'a/b/c') beside a copy of its expert.json.

    Args:
      store: where the expert is.
      name: its id.
      output: folder to make; it must not exist, or be empty.
      format: 'safetensors' or 'npz'.

    Returns:
      The folder.

    Raises:
      ElmError: for an unknown format or expert, or a damaged one.
      FileExistsError: if the folder exists and holds something.
    """
    if format not in FORMATS:
        raise ElmError(f"unknown format {format!r}{nearest(format, FORMATS)}; one of {FORMATS}")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder")
    info, params = store.load(name)
    arrays = {path: np.ascontiguousarray(leaf) for path, leaf in flatten(params).items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        if format == "safetensors":
            from safetensors.numpy import save_file

            metadata = {"id": info.id, "kind": info.kind, "checksum": info.checksum}
            save_file(arrays, temporary / "params.safetensors", metadata=metadata)
        else:
            np.savez(temporary / "params.npz", allow_pickle=False, **arrays)
        (temporary / "expert.json").write_text(json.dumps(info.to_json(), indent=2) + "\n")
        if output.exists():
            output.rmdir()
        os.rename(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return output
