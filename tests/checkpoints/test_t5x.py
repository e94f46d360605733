"""T5X checkpoints: written by t5x itself, by tensorstore and msgpack alone, and by us for t5x."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax.serialization import msgpack_serialize

from elm_jax.checkpoints import Backbone, fingerprint, load_backbone, save_backbone, save_t5x
from elm_jax.checkpoints.flax_msgpack import read_msgpack
from elm_jax.checkpoints.infer import infer_config, read_gin
from elm_jax.checkpoints.t5x import LAYOUTS, open_t5x, to_t5x
from elm_jax.errors import ElmError
from elm_jax.experts.apply import backbone_shapes
from elm_jax.experts.tree import flatten, unflatten
from elm_jax.models import T5, T5Config

CONFIG = T5Config(
    vocab_size=31, emb_dim=12, num_heads=3, head_dim=5, mlp_dim=16,
    num_encoder_layers=3, num_decoder_layers=2,
)  # fmt: skip
SCALABLE = CONFIG.replace(relative_attention_per_layer=True)
TIED = CONFIG.replace(mlp_activations=("relu",), logits_via_embedding=True)
NETWORKS = {"t5": CONFIG, "scalable_t5": SCALABLE}
TOKENS = np.array([[3, 4, 1, 0, 0], [9, 8, 7, 6, 1]], np.int32)


def make_params(config: T5Config, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: rng.normal(0, 0.3, s.shape).astype(dtype), backbone_shapes(config)
    )


def make_backbone(config: T5Config, dtype: Any = np.float32) -> Backbone:
    params = make_params(config, dtype)
    return Backbone("little", config, params, fingerprint(config, params))


def assert_same_arrays(a: Any, b: Any) -> None:
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


# In the same layout, written without t5x


def write_legacy(tree: Any, folder: Path, chunks: int = 1, inline: str = "") -> Path:
    """What t5x wrote before Orbax: version 3, arrays in zarr (some in the msgpack itself)."""
    specs: dict[str, Any] = {}
    for path, array in flatten(tree).items():
        if inline and path.endswith(inline):
            specs[path] = array
            continue
        name = "target." + path.replace("/", ".")
        spec = {
            "driver": "zarr",
            "dtype": array.dtype.name,
            "kvstore": {"driver": "gfile", "path": f"{name}/"},
            "metadata": {
                "chunks": [max(1, -(-n // chunks)) for n in array.shape],
                "compressor": {"id": "gzip"},
                "shape": list(array.shape),
            },
        }
        place = {"driver": "file", "path": str(folder / name)}
        tensorstore.open({**spec, "kvstore": place}, create=True).result().write(array).result()
        specs[path] = spec
    state = {"step": np.int32(7), "param_states": {"decoder": None, "m": np.ones(3, np.float32)}}
    data = {"version": 3, "optimizer": {"target": unflatten(specs), "state": state}}
    (folder / "checkpoint").write_bytes(msgpack_serialize(data))
    return folder


def write_orbax(tree: Any, folder: Path, **options: Any) -> Path:
    """What t5x writes now: checkpoint_<step>/state."""
    state = {"step": np.int32(7), "param_states": {"v": {"x": np.ones(3, np.float32)}}}
    handler = ocp.PyTreeCheckpointHandler(**options)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder / "state", {"target": tree, "state": state})
    return folder


def as_scalable(params: Any) -> Any:
    """`scalable_t5`'s arrays, made here by hand: layers on axis 1, heads on axes of their own."""
    flat = flatten(params)
    stacked: dict[str, Any] = {}
    for path in [p for p in flat if "/layers_0/" in p]:
        stack = path.split("/")[0]
        layers = 0
        while path.replace("layers_0", f"layers_{layers}") in flat:
            layers += 1
        arrays = [flat[path.replace("layers_0", f"layers_{i}")] for i in range(layers)]
        if re.search("(query|key|value)/kernel", path):
            arrays = [a.reshape(12, 3, 5) for a in arrays]
        elif "out/kernel" in path:
            arrays = [a.reshape(3, 5, 12) for a in arrays]
        stacked[path.replace("layers_0", stack)] = np.stack(arrays, axis=1)
    rest = {path: a for path, a in flat.items() if "/layers_" not in path}
    return unflatten({**rest, **stacked})


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("layout", ["legacy", "legacy in chunks", "orbax", "orbax without ocdbt"])
def test_checkpoints_in_the_same_layout(tmp_path: Path, layout: str, network: str) -> None:
    config = NETWORKS[network]
    params = make_params(config)
    tree = as_scalable(params) if network == "scalable_t5" else params
    folder = tmp_path / "run" / "checkpoint_7"
    folder.mkdir(parents=True)
    if layout.startswith("legacy"):
        write_legacy(tree, folder, 2 if "chunks" in layout else 1, inline="norm/scale")
    else:
        write_orbax(tree, folder, use_ocdbt="without" not in layout)
    loaded = load_backbone(folder, on_host=True)
    assert (loaded.config, loaded.name, loaded.vocabulary_path) == (config, "run-7", None)
    assert_same_arrays(loaded.params, params)
    assert loaded.fingerprint == fingerprint(config, params)
    half = load_backbone(folder, dtype="bfloat16")  # another way through the code
    assert half.fingerprint == loaded.fingerprint
    wanted = params["decoder"]["layers_1"]["mlp"]["wo"]["kernel"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(half.params["decoder"]["layers_1"]["mlp"]["wo"]["kernel"], wanted)


def test_layers_on_the_first_axis(tmp_path: Path) -> None:
    """t5x's `param_scan_axis=0`."""
    params = make_params(SCALABLE)
    flat = {
        path: np.moveaxis(a, 1, 0) if re.match("(encoder/encoder|decoder/decoder)/", path) else a
        for path, a in flatten(as_scalable(params)).items()
    }
    loaded = load_backbone(write_legacy(unflatten(flat), tmp_path), on_host=True)
    assert_same_arrays(loaded.params, params)


def test_an_older_orbax_structure_file(tmp_path: Path) -> None:
    """Before `_METADATA`: names as placeholders in a msgpack file, a zarr folder for each."""
    params = make_params(TIED)
    write_orbax(params, tmp_path, use_ocdbt=False)
    (tmp_path / "state" / "_METADATA").unlink()
    names = {p: f"PLACEHOLDER://target.{p.replace('/', '.')}" for p in flatten(params)}
    data = {"target": unflatten(names), "state": {"step": 7}, "flax_mutables": None}
    (tmp_path / "state" / "checkpoint").write_bytes(msgpack_serialize(data))
    assert_same_arrays(load_backbone(tmp_path, on_host=True).params, params)


@pytest.mark.parametrize("under", ["", "params", "target"])
def test_an_orbax_pytree_of_parameters(tmp_path: Path, under: str) -> None:
    params = make_params(TIED)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", {under: params} if under else params)
    loaded = load_backbone(tmp_path / "tree", on_host=True)
    assert (loaded.config, loaded.name) == (TIED, "tree")
    assert_same_arrays(loaded.params, params)


def test_our_folder_with_orbax_arrays(tmp_path: Path) -> None:
    backbone = make_backbone(TIED, ml_dtypes.bfloat16)
    folder = save_backbone(backbone, tmp_path / "own", arrays="orbax")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "params"]
    loaded = load_backbone(folder, on_host=True)
    assert (loaded.name, loaded.config, loaded.fingerprint) == (
        "little", TIED, backbone.fingerprint
    )  # fmt: skip
    assert_same_arrays(loaded.params, backbone.params)
    with pytest.raises(ElmError, match="unknown arrays 'orbacks'.*did you mean 'orbax'"):
        save_backbone(backbone, tmp_path / "no", arrays="orbacks")


# Out and in again


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_we_write_we_read(tmp_path: Path, layout: str, network: str) -> None:
    config = NETWORKS[network].replace(mlp_activations=("silu", "linear"))
    vocabulary = tmp_path / "some.model"
    vocabulary.write_bytes(b"pieces")
    made = make_backbone(config, ml_dtypes.bfloat16)
    made = Backbone(made.name, config, made.params, made.fingerprint, vocabulary)
    path = save_t5x(made, tmp_path / "run", step=20, layout=layout)
    assert path == tmp_path / "run" / "checkpoint_20"
    loaded = load_backbone(path, on_host=True)
    assert (loaded.config, loaded.name) == (config, "run-20")  # its config.gin says silu
    assert_same_arrays(loaded.params, made.params)
    assert loaded.fingerprint == made.fingerprint
    assert loaded.vocabulary_path == path / "spiece.model"
    with pytest.raises(FileExistsError, match="checkpoint_20 exists"):
        save_t5x(made, tmp_path / "run", step=20, layout=layout)
    if network == "scalable_t5":
        target = to_t5x(made.params, config)
        assert_same_arrays(target, as_scalable(made.params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_activations": ("gelu", "linear")}, "no activation 'gelu'.*'gelu_tanh'"),
        ({"layer_norm_epsilon": 1e-5}, "no layer_norm_epsilon = 1e-05"),
        ({"relative_attention_num_buckets": 16}, "no relative_attention_num_buckets = 16"),
    ],
)
def test_what_t5x_cannot_express_is_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ElmError, match=message):
        save_t5x(make_backbone(CONFIG.replace(**changes)), tmp_path / "run")
    with pytest.raises(ElmError, match="unknown layout 'orbacks'.*did you mean 'orbax'"):
        save_t5x(make_backbone(CONFIG), tmp_path / "run", layout="orbacks")
    with pytest.raises(ElmError, match="step must be 0 or more"):
        save_t5x(make_backbone(CONFIG), tmp_path / "run", step=-1)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


# The config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A legacy checkpoint with a gated unit and no gin file."""
    return write_legacy(make_params(CONFIG), tmp_path_factory.mktemp("run"))


def test_the_activation_by_convention_or_as_said(checkpoint: Path, tmp_path: Path) -> None:
    arrays = open_t5x(checkpoint)
    assert infer_config(arrays, checkpoint) == CONFIG
    silu = CONFIG.replace(mlp_activations=("silu", "linear"))
    assert infer_config(arrays, checkpoint, {"mlp_activations": ["silu", "linear"]}) == silu
    assert infer_config(arrays, checkpoint, silu) is silu
    gin = tmp_path / "config.gin"
    gin.write_text(
        "from t5x.examples.t5 import network\nRATE = 0.05\n\n"
        "# Parameters for network.T5Config:\n"
        "network.T5Config.mlp_activations = \\\n    ('swish', 'linear')\n"
        "network.T5Config.dropout_rate = %RATE\nnetwork.T5Config.dtype = 'bfloat16'\n"
        "t5x.models.EncoderDecoderModel.module = @network.Transformer()\n"
    )
    assert infer_config(arrays, checkpoint, str(gin)) == silu.replace(dropout_rate=0.05)
    gin.write_text(
        "network.T5Config:\n  emb_dim = 12\n  mlp_activations = ('gelu', 'linear')\nX=1\n"
    )
    assert read_gin(gin) == {"emb_dim": 12, "mlp_activations": ("gelu_tanh", "linear")}
    gin.write_text("train.total_steps = 3\n")
    with pytest.raises(ElmError, match=r"config\.gin: binds no field of a T5Config"):
        infer_config(arrays, checkpoint, str(gin))
    with pytest.raises(FileNotFoundError, match=r"none\.gin"):
        infer_config(arrays, checkpoint, "none.gin")
    with pytest.raises(ElmError, match="unknown size 't5_2_0_small'"):
        infer_config(arrays, checkpoint, "t5_2_0_small")
    with pytest.raises(ElmError, match="'mlp_activation'.*did you mean 'mlp_activations'"):
        infer_config(arrays, checkpoint, {"mlp_activation": 3})


def test_a_config_that_does_not_fit_names_the_place(checkpoint: Path) -> None:
    with pytest.raises(ElmError, match=r"kernel' has shape \(12, 15\), expected \(12, 10\)"):
        load_backbone(checkpoint, config={"head_dim": 2, "num_heads": 5})
    with pytest.raises(ElmError, match="vocab_size is 32,128 in the config, but there are"):
        load_backbone(checkpoint, config="t5_1_1_small")
    with pytest.raises(ElmError, match="num_encoder_layers is 999 in the config"):
        load_backbone(checkpoint, config={"num_encoder_layers": 999})


def test_a_feed_forward_block_that_nobody_published(tmp_path: Path) -> None:
    config = CONFIG.replace(mlp_activations=("silu", "linear", "linear"))
    path = write_legacy(make_params(config), tmp_path)
    with pytest.raises(ElmError, match="name its activations"):
        load_backbone(path)
    loaded = load_backbone(path, config={"mlp_activations": config.mlp_activations})
    assert loaded.config == config


# Damage


def test_damaged_checkpoints_name_the_file(tmp_path: Path) -> None:
    folder = write_legacy(make_params(CONFIG), tmp_path)
    chunk = folder / "target.encoder.layers_0.mlp.wo.kernel" / "0.0"
    content = chunk.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\0" * 40):
        chunk.write_bytes(damaged)
        with pytest.raises(
            ElmError, match=r"mlp/wo/kernel is missing or damaged .*wo\.kernel/0\.0"
        ):
            load_backbone(folder)
    chunk.unlink()
    with pytest.raises(ElmError, match="mlp/wo/kernel has 0 of its 1 chunks"):
        load_backbone(folder)
    chunk.write_bytes(content)
    (chunk.parent / ".zarray").write_text("{")
    with pytest.raises(ElmError, match=r"mlp/wo/kernel is missing or damaged .*\.zarray"):
        load_backbone(folder)
    (chunk.parent / ".zarray").unlink()
    chunk.unlink()
    chunk.parent.rmdir()
    with pytest.raises(FileNotFoundError, match=r"target\.encoder\.layers_0\.mlp\.wo\.kernel"):
        load_backbone(folder)


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    folder = write_legacy(make_params(CONFIG), tmp_path)
    metadata = folder / "target.token_embedder.embedding" / ".zarray"
    data = json.loads(metadata.read_text())
    metadata.write_text(json.dumps(data | {"shape": [2**34, 12], "chunks": [2**34, 12]}))
    with pytest.raises(ElmError, match=r"its arrays claim [\d,]+ bytes, but its files have"):
        load_backbone(folder)
    metadata.write_text(json.dumps(data | {"chunks": [2**40, 12]}))
    with pytest.raises(ElmError, match=r"shape \(31, 12\) has chunks of shape \(1099511627776, 12"):
        load_backbone(folder)


def test_a_msgpack_file_from_a_stranger(tmp_path: Path) -> None:
    folder = write_legacy(make_params(CONFIG), tmp_path)
    file = folder / "checkpoint"
    good = file.read_bytes()
    for damaged in (good[:-9], b"", b"\xc1", b"\x93\x01\x02\x03", b"\xdf\xff\xff\xff\xff"):
        file.write_bytes(damaged)
        with pytest.raises(ElmError, match="checkpoint: (truncated or damaged|expected a) msgpack"):
            load_backbone(folder)
    spec = {"driver": "zarr", "metadata": {}}
    for name in ("../secret", "/etc", "a/b", "..", "", 3, None):
        inside = {"version": 3, "optimizer": {"target": {"a": {**spec, "kvstore": {"path": name}}}}}
        file.write_bytes(msgpack_serialize(inside))
        with pytest.raises(ElmError, match="must be a folder of the checkpoint"):
            load_backbone(folder)
    file.write_bytes(b'model_checkpoint_path: "model.ckpt-0"')
    with pytest.raises(ElmError, match="a checkpoint of TensorFlow"):
        load_backbone(folder)
    file.write_bytes(msgpack_serialize({"version": 3, "optimizer": {}}))
    with pytest.raises(ElmError, match="holds no parameters under 'target'"):
        load_backbone(folder)


def test_damaged_orbax_checkpoints_are_named(tmp_path: Path) -> None:
    folder = write_orbax(make_params(TIED), tmp_path / "checkpoint_7")
    named = []
    for path in sorted(folder.rglob("d/*")):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 3])
        try:
            load_backbone(folder)  # some files hold older nodes, which nothing refers to
        except ElmError as error:
            assert f"{folder}/state: array" in str(error) and "missing or damaged" in str(error)
            named.append(path.name in str(error))
        path.write_bytes(content)
    assert any(named)
    metadata = folder / "state" / "_METADATA"
    metadata.write_text('{"tree_metadata": {"a": {"key_metadata": [1]}}}')
    with pytest.raises(ElmError, match=r"_METADATA: an entry of 'tree_metadata' lacks"):
        load_backbone(folder)
    metadata.unlink()
    with pytest.raises(FileNotFoundError, match="neither _METADATA nor checkpoint"):
        load_backbone(folder)


def test_folders_of_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json .*no checkpoint of T5X"):
        load_backbone(tmp_path)
    (tmp_path / "checkpoint_9").mkdir()
    (tmp_path / "checkpoint_10").mkdir()
    with pytest.raises(ElmError, match="name one of them, such as .*checkpoint_10"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("path", ["encoder/encoder_norm/scale", "encoder/layers_1/mlp/wo/kernel"])
def test_missing_and_extra_arrays_are_named(tmp_path: Path, path: str) -> None:
    flat = flatten(make_params(CONFIG))
    array = flat.pop(path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ElmError, match=rf"lacks '{path}'"):
        load_backbone(write_legacy(unflatten(flat), tmp_path / "a"))
    (tmp_path / "b").mkdir()
    extra = unflatten({**flat, path: array, path.replace("e", "a", 1): array})
    with pytest.raises(ElmError, match=rf"unknown array .*did you mean '{path}'"):
        load_backbone(write_legacy(extra, tmp_path / "b"))


def test_flax_msgpack_reads_what_flax_writes(tmp_path: Path) -> None:
    arrays = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(3, ml_dtypes.bfloat16),
        "i": np.int32(7),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float16),
    }
    (tmp_path / "x").write_bytes(msgpack_serialize({"a": arrays, "n": None, "s": "text", "l": [1]}))
    data = read_msgpack(tmp_path / "x")
    assert (data["n"], data["s"], data["l"], data["a"]["i"]) == (None, "text", [1], 7)
    for name in ("f", "b", "bool", "empty"):
        assert data["a"][name].dtype == arrays[name].dtype
        np.testing.assert_array_equal(data["a"][name], arrays[name])
    (tmp_path / "x").write_bytes(msgpack_serialize({"c": 1 + 2j}))
    with pytest.raises(ElmError, match="extension type 2"):
        read_msgpack(tmp_path / "x")


# Against t5x itself


@pytest.fixture(scope="module")
def t5x() -> Any:
    """t5x's modules, where it is installed."""
    reason = "t5x is not installed (it is not on PyPI; see the extra elm_jax[t5x])"
    pytest.importorskip("t5x.checkpoints", reason=reason)
    import t5x.adafactor
    import t5x.checkpoints
    import t5x.examples.scalable_t5.network
    import t5x.examples.t5.network
    import t5x.optimizers
    import t5x.partitioning
    import t5x.train_state

    return t5x


def t5x_model(t5x: Any, network: str) -> tuple[Any, Any]:
    """Returns t5x's module and its variables, layer norms and biases random, too."""
    config = NETWORKS[network]
    module = getattr(t5x.examples, network).network
    fields = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers")
    model = module.Transformer(
        module.T5Config(
            **{name: getattr(config, name) for name in fields},
            num_decoder_layers=config.num_decoder_layers,
            mlp_activations=("gelu", "linear"),
        )
    )
    variables = jax.jit(lambda key: model.init(key, TOKENS, TOKENS, TOKENS, enable_dropout=False))(
        jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), variables["params"]
    )
    return model, {**variables, "params": params}


def t5x_state(t5x: Any, variables: Any) -> Any:
    rules = t5x.adafactor.standard_logical_factor_rules()
    if any("layers" in str(names) for names in jax.tree.leaves(variables["params_axes"])):
        rules = {**rules, "layers": t5x.adafactor.FactorDim.NONE}
    optimizer = t5x.adafactor.Adafactor(1e-3, logical_factor_rules=rules)
    return t5x.train_state.FlaxOptimTrainState.create(optimizer, variables)


def t5x_checkpointer(t5x: Any, layout: str, state: Any, folder: Path) -> Any:
    partitioner = t5x.partitioning.PjitPartitioner(num_partitions=1)
    module = t5x.checkpoints
    if layout == "legacy":
        return module.Checkpointer(state, partitioner, str(folder))
    return module.OrbaxCheckpointManagerInterface(
        str(folder), state, partitioner, save_dtype=np.float32
    )


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_t5x_writes_we_read_and_run(
    t5x: Any, tmp_path: Path, layout: str, network: str
) -> None:
    model, variables = t5x_model(t5x, network)
    state = t5x_state(t5x, variables)
    checkpointer = t5x_checkpointer(t5x, layout, state, tmp_path)
    checkpointer.save(state)
    if layout == "orbax":
        checkpointer.wait_until_finished()
    loaded = load_backbone(tmp_path / "checkpoint_0")
    assert loaded.config == NETWORKS[network]
    assert_same_arrays(to_t5x(jax.tree.map(np.asarray, loaded.params), loaded.config),
                       variables["params"])  # fmt: skip

    def theirs(params: Any) -> Any:
        return model.apply({"params": params}, TOKENS, TOKENS, TOKENS, enable_dropout=False)

    def ours(params: Any) -> Any:
        return T5(loaded.config).apply({"params": params}, TOKENS, TOKENS)

    wanted = np.asarray(jax.jit(theirs)(variables["params"]))
    assert wanted.std() > 0.1
    seen = TOKENS > 0  # t5x masks the decoder's own padding, as Hugging Face's models do not
    np.testing.assert_allclose(
        np.asarray(jax.jit(ours)(loaded.params))[seen], wanted[seen], atol=1e-4
    )


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_t5x_restores_what_we_write(t5x: Any, tmp_path: Path, layout: str, network: str) -> None:
    backbone = make_backbone(NETWORKS[network])
    path = save_t5x(backbone, tmp_path, step=20, layout=layout)
    _, variables = t5x_model(t5x, network)
    state = t5x.train_state.InferenceState.create(variables)
    checkpointer = t5x_checkpointer(t5x, layout, state, tmp_path)
    for where in ({"path": str(path)}, {"step": 20}):
        restored = checkpointer.restore(**where)
        assert int(restored.step) == 20
        wanted = to_t5x(backbone.params, backbone.config)
        assert_same_arrays(jax.tree.map(np.asarray, restored.params), wanted)
    # A training run starts from it with the optimizer's state from scratch.
    training = t5x_state(t5x, variables)
    checkpointer = t5x_checkpointer(t5x, layout, training, tmp_path)
    started = checkpointer.restore(step=20, fallback_state=training.state_dict())
    assert_same_arrays(jax.tree.map(np.asarray, started.params), wanted)
