"""Pre-trains a backbone on a folder of texts from a gin configuration.

example:
  python -m elm_jax.pretrain --gin_file=gin/runs/pretrain.gin \\
    --gin.CORPUS=books --gin.MODEL_DIR=pretraining --gin.OUTPUT=my_backbone
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elm_jax.models import T5Config
    from elm_jax.training import MeshSpec
    from elm_jax.training.pretrain import PretrainConfig


def pretrain(
    corpus: str,
    model: T5Config,
    name: str,
    output: str,
    model_dir: str,
    run: PretrainConfig,
    initial: str | None = None,
    vocabulary: str | None = None,
    storage_dtype: str = "float32",
    mesh: MeshSpec | None = None,
) -> None:
    """Pre-trains with a progress bar; see `elm_jax.training.pretrain.pretrain`.

    Writes the numbers for a model card to `<model_dir>/facts.json`.
    """
    from elm_jax.cli.common import ProgressBar
    from elm_jax.training import make_mesh
    from elm_jax.training.pretrain import pretrain as pretrain_backbone

    bar = ProgressBar("steps")
    try:
        trained = pretrain_backbone(
            corpus,
            model,
            output,
            name=name,
            initial=initial,
            vocabulary=vocabulary,
            run=run,
            model_dir=model_dir,
            storage_dtype=storage_dtype,
            mesh=make_mesh(mesh),
            progress=lambda step, metrics: bar.update(step, max(run.steps), name, metrics),
        )
    finally:
        bar.close()
    facts = json.dumps(dict(trained.facts), indent=2)
    (Path(model_dir) / "facts.json").write_text(facts + "\n")
    print(facts)


if __name__ == "__main__":
    from elm_jax import gin_utils

    sys.exit(gin_utils.run(pretrain))
