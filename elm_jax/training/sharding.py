"""One mesh and one set of rules from logical to mesh axes, for backbone and expert alike.

All of it is arithmetic on shapes: with `abstract_mesh`, layouts of any size on any number of
devices are worked out without an array or a device.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from elm_jax.errors import ElmError, nearest
from elm_jax.experts.tree import Tree, flatten, unflatten

MESH_AXES = ("expert", "data", "fsdp", "tensor")
AnyMesh = Mesh | AbstractMesh

LogicalRules = tuple[tuple[str, tuple[str, ...]], ...]
RULES: LogicalRules = (
    ("experts", ("expert",)),
    ("batch", ("data", "fsdp")),
    ("embed", ("fsdp",)),
    ("vocab", ("tensor",)),
    ("mlp", ("tensor",)),
    ("joined_kv", ("tensor",)),
    ("heads", ()),
    ("relpos_buckets", ()),
    ("layers", ()),
    ("adapter", ()),
    ("rank", ()),
)
"""Logical axis -> mesh axes it is split over; an empty tuple means replicated on purpose."""
PRESETS = {
    "data_parallel": "data",
    "fsdp": "fsdp",
    "tensor_parallel": "tensor",
    "expert_parallel": "expert",
}
"""Names of meshes with one axis; `MeshSpec.parse` also takes their products, and 'single'."""
PARAMETER_AXES = ("fsdp", "tensor")
"""Mesh axes that are there to split the backbone."""


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """How many ways to split along each mesh axis, and what is split over them.

    One axis may be -1 and takes the devices that are left.

    Attributes:
      expert: the stack of experts.
      data: the batch, with the backbone replicated.
      fsdp: the batch, with the backbone sharded.
      tensor: heads, feed-forward and vocabulary.
      rules: changes of `RULES`: logical axis -> mesh axis, several, or none, such as
        {'adapter': 'tensor', 'embed': ()}.
    """

    expert: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: Mapping[str, str | Sequence[str]] | LogicalRules = ()

    def __post_init__(self) -> None:
        for name, value in self.sizes().items():
            integral = isinstance(value, int) and not isinstance(value, bool)
            if not integral or (value < 1 and value != -1):
                raise ElmError(f"mesh axis {name!r} must be a positive integer or -1, got {value}")
        free = [name for name, value in self.sizes().items() if value == -1]
        if len(free) > 1:
            raise ElmError(
                f"mesh axes {' and '.join(map(repr, free))} are both -1, but one alone can take "
                f"the devices that are left; set {free[0]}=1, say"
            )
        object.__setattr__(self, "rules", _checked_rules(self.rules))

    @classmethod
    def parse(
        cls,
        entries: str | Sequence[str],
        rules: Mapping[str, str | Sequence[str]] | LogicalRules = (),
    ) -> MeshSpec:
        """Reads a mesh as users write it.

        Args:
          entries: AXIS=N, or one of `PRESETS` with =N or (taking the devices that are left)
            without, with commas or spaces between them; or 'single'. Axes that are not named are
            1, but `data` takes what is left where no other axis does.
          rules: as the attribute.

        Raises:
          ElmError: for what is no axis, or no number.

        >>> MeshSpec.parse('fsdp=4,tensor_parallel=2') == MeshSpec(fsdp=4, tensor=2)
        True
        >>> MeshSpec.parse('fsdp') == MeshSpec(data=1, fsdp=-1)
        True
        """
        texts = [entries] if isinstance(entries, str) else entries
        parts = [part for text in texts for part in re.split(r"[,\s]+", text) if part]
        if parts == ["single"]:
            return cls(data=1, rules=rules)
        sizes: dict[str, int] = {}
        for part in parts:
            name, equals, number = part.partition("=")
            axis = PRESETS.get(name, name)
            if axis not in MESH_AXES:
                hint = nearest(name, (*MESH_AXES, *PRESETS))
                raise ElmError(
                    f"mesh {part!r}: no axis {name!r}{hint}; there are {', '.join(MESH_AXES)}, "
                    f"and the presets single, {', '.join(PRESETS)}"
                )
            if axis in sizes:
                raise ElmError(f"mesh {' '.join(parts)!r} sets the axis {axis!r} twice")
            if not equals and name not in PRESETS:
                raise ElmError(f"mesh {part!r}: expected {name}=N")
            try:
                sizes[axis] = int(number) if equals else -1
            except ValueError:
                raise ElmError(f"mesh {part!r}: {number!r} is not a whole number") from None
        if -1 in sizes.values():
            sizes.setdefault("data", 1)
        return cls(**sizes, rules=rules)

    def sizes(self) -> dict[str, int]:
        """Returns the sizes as given, -1 included, in the order of `MESH_AXES`."""
        return {name: getattr(self, name) for name in MESH_AXES}

    def fit(self, devices: int) -> dict[str, int]:
        """Returns the sizes on so many devices.

        Raises:
          ElmError: if they do not multiply to the number of devices, naming the nearest that do.
        """
        sizes = self.sizes()
        known = math.prod(size for size in sizes.values() if size != -1)
        fitted = {n: max(devices // known, 1) if s == -1 else s for n, s in sizes.items()}
        if math.prod(fitted.values()) == devices:
            return fitted
        needs = f"a multiple of {known}" if -1 in sizes.values() else str(known)
        raise ElmError(
            f"mesh {_show(sizes)} needs {needs} devices, so it does not fit {devices} devices; "
            f"nearest that does: {_show(_nearest_sizes(sizes, devices))}"
        )

    def logical_rules(self) -> LogicalRules:
        """Returns `RULES` with this spec's changes."""
        changes = cast(LogicalRules, self.rules)
        return tuple({**dict(RULES), **dict(changes)}.items())


def parse_rule(text: str) -> tuple[str, tuple[str, ...]]:
    """Reads a rule as users write it: LOGICAL=AXIS, LOGICAL=AXIS+AXIS, or LOGICAL= for none.

    >>> parse_rule('embed=fsdp+data'), parse_rule('vocab=')
    (('embed', ('fsdp', 'data')), ('vocab', ()))
    """
    name, equals, axes = text.partition("=")
    if not equals:
        raise ElmError(f"rule {text!r}: expected LOGICAL_AXIS=MESH_AXIS, such as adapter=tensor")
    return name, tuple(axis for axis in axes.split("+") if axis)


def _checked_rules(rules: Any) -> LogicalRules:
    known = dict(RULES)
    checked = []
    for name, axes in dict(rules).items():
        axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
        if name not in known:
            raise ElmError(f"rule for {name!r}: no such logical axis{nearest(str(name), known)}")
        for axis in axes:
            if axis not in MESH_AXES:
                raise ElmError(
                    f"rule for {name!r}: no mesh axis {axis!r}{nearest(str(axis), MESH_AXES)}"
                )
        checked.append((name, axes))
    return tuple(checked)


def _show(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in sizes.items())


def _nearest_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Returns the sizes that fit the devices with the smallest change of factors, in all."""

    def distance(candidate: tuple[int, ...]) -> float:
        pairs = zip(candidate, sizes.values(), strict=True)
        return sum(abs(math.log(new / old)) for new, old in pairs if old != -1)

    best: tuple[int, ...] = min(_products(devices, len(sizes)), key=distance)
    return dict(zip(sizes, best, strict=True))


def _products(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yields the ways to write a number as a product of so many factors."""
    if parts == 1:
        yield (number,)
        return
    for first in _divisors(number):
        yield from ((first, *rest) for rest in _products(number // first, parts - 1))


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def make_mesh(spec: MeshSpec | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over all (or the given) devices; one over a single device takes the first.

    Raises:
      ElmError: if the sizes do not multiply to the number of devices.
    """
    spec = spec or MeshSpec()
    if devices is None:
        alone = all(size == 1 for size in spec.sizes().values())
        devices = jax.local_devices()[:1] if alone else jax.devices()
    shape = tuple(spec.fit(len(devices)).values())
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES)


def abstract_mesh(spec: MeshSpec, devices: int | None = None) -> AbstractMesh:
    """Returns a mesh of any size without its devices, to work out layouts.

    Args:
      spec: the mesh.
      devices: how many there would be; by default the product of the sizes, -1 taken as 1.

    Raises:
      ElmError: if the sizes do not multiply to the number of devices.
    """
    if devices is None:
        devices = math.prod(size for size in spec.sizes().values() if size != -1)
    return AbstractMesh(tuple(spec.fit(devices).values()), MESH_AXES)


def partition_spec(
    axes: Sequence[str | None], where: str = "array", rules: LogicalRules = RULES
) -> PartitionSpec:
    """Translates logical axis names to a PartitionSpec.

    Args:
      axes: a name for each axis of an array; None is replicated.
      where: names the array in messages.
      rules: logical axis -> mesh axes.

    Raises:
      ElmError: for a name without a rule, or two axes that go to one mesh axis, naming the array.

    >>> partition_spec(('embed', 'mlp')) == PartitionSpec('fsdp', 'tensor')
    True
    """
    known = dict(rules)
    entries: list[Any] = []
    taken: dict[str, str] = {}
    for name in axes:
        if name is not None and name not in known:
            raise ElmError(f"{where}: no sharding rule for axis {name!r}{nearest(name, known)}")
        mesh_axes = known[name] if name is not None else ()
        for axis in mesh_axes:
            if axis in taken:
                raise ElmError(
                    f"{where}: rules split both {taken[axis]!r} and {name!r} over the mesh axis "
                    f"{axis!r}; an array can be split over it once"
                )
            taken[axis] = str(name)
        entries.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return PartitionSpec(*entries)


def shardings(
    mesh: AnyMesh, axes: Tree, shapes: Tree, *, stacked: bool = False, rules: LogicalRules = RULES
) -> Tree:
    """Returns a NamedSharding for every array.

    Args:
      mesh: the mesh.
      axes: tree of logical axis names.
      shapes: tree of arrays or ShapeDtypeStructs, without the stack's axis.
      stacked: whether the arrays have a leading axis over X experts.
      rules: logical axis -> mesh axes.

    Raises:
      ElmError: for an array that no rule covers, or a size that its mesh axes do not divide.
    """
    names, arrays = flatten(axes), flatten(shapes)
    out = {}
    for path, array in arrays.items():
        if path not in names:
            raise ElmError(f"{path}: has no logical axis names, so no sharding rule covers it")
        logical = tuple(names[path])
        if len(logical) != len(array.shape):
            raise ElmError(f"{path}: {len(logical)} axis names for shape {tuple(array.shape)}")
        leading = ("experts",) if stacked else ()
        spec = partition_spec((*leading, *logical), path, rules)
        for size, name, entry in zip(array.shape, logical, spec[len(leading) :], strict=True):
            check_split(mesh, size, _entry(entry), f"{path}: axis {name!r}")
        out[path] = NamedSharding(mesh, spec)
    return unflatten(out)


def _entry(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def backbone_shardings(
    mesh: AnyMesh, axes: Tree, shapes: Tree, rules: LogicalRules = RULES
) -> Tree:
    """Returns the backbone's shardings, none of which replicates it by accident.

    Raises:
      ElmError: as `shardings`, or if a mesh axis that is there to split the backbone (fsdp,
        tensor) splits less than half of it.
    """
    placed = shardings(mesh, axes, shapes, rules=rules)
    arrays, specs = flatten(shapes), {k: s.spec for k, s in flatten(placed).items()}
    sizes = {path: math.prod(array.shape) for path, array in arrays.items()}
    for axis in PARAMETER_AXES:
        ways = mesh.shape[axis]
        split = sum(
            size
            for path, size in sizes.items()
            if axis in itertools.chain.from_iterable(map(_entry, specs[path]))
        )
        if ways > 1 and 2 * split < sum(sizes.values()):
            share = split / sum(sizes.values())
            raise ElmError(
                f"mesh axis {axis!r} has {ways} ways, but the rules split {share:.0%} of the "
                f"backbone over it and each device would hold the rest whole; set {axis}=1, or "
                f"give it a logical axis of the backbone, such as {_DEFAULT_USE[axis]}={axis}"
            )
    return placed


_DEFAULT_USE = {axis: next(n for n, axes in RULES if axes == (axis,)) for axis in PARAMETER_AXES}


def optimizer_shardings(
    mesh: AnyMesh, state: Any, expert: Tree, placed: Tree, rules: LogicalRules = RULES
) -> Any:
    """Lays an optimizer's state out as the expert that it belongs to.

    A moment lies as its parameter. A factored one, which lacks one of the parameter's axes, lies as
    the axes that it has; where two axes could be the missing one and would be split differently, it
    is split by expert alone. So are counts, and placeholders of one element.

    Args:
      mesh: the mesh.
      state: the stacked states' ShapeDtypeStructs, each [X, ...].
      expert: the stacked experts' ShapeDtypeStructs.
      placed: their shardings.
      rules: logical axis -> mesh axes, for the axis of experts.

    Raises:
      ElmError: for an array that is none of these, naming it.
    """
    by_expert = partition_spec(("experts",), "optimizer state", rules)
    parameters = {
        _names(path): (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(expert), jax.tree.leaves(placed), strict=True
        )
    }

    def spec_of(path: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        if math.prod(shape[1:]) == 1:
            return by_expert
        for start in range(len(path)):
            if path[start:] not in parameters:
                continue
            whole, spec = parameters[path[start:]]
            if shape == whole:
                return spec
            without = {
                (*spec[:axis], *spec[axis + 1 :])
                for axis in range(1, len(whole))
                if (*whole[:axis], *whole[axis + 1 :]) == shape
            }
            if without:
                return PartitionSpec(*without.pop()) if len(without) == 1 else by_expert
        raise ElmError(
            f"optimizer state {'/'.join(path)} of shape {shape} belongs to no array of the "
            "expert, so no sharding rule covers it"
        )

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(_names(path), tuple(leaf.shape))), state
    )


def _names(path: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def check_split(
    mesh: AnyMesh, size: int, mesh_axes: Sequence[str], what: str, *, free: bool = False
) -> None:
    """Refuses a size that its mesh axes do not divide.

    Args:
      mesh: the mesh.
      size: of the axis that is split.
      mesh_axes: what it is split over.
      what: it is the size of.
      free: whether the user may as well choose another size.

    Raises:
      ElmError: naming both numbers and the nearest that would do.
    """
    ways = math.prod(mesh.shape[axis] for axis in mesh_axes)
    if size % ways == 0:
        return
    divisors = _divisors(size)
    close = {max(d for d in divisors if d < ways), *[d for d in divisors if d > ways][:1]}
    would = f"{' or '.join(map(str, sorted(close)))} ways"
    if free:
        sizes = [s for s in (size // ways * ways, -(-size // ways) * ways) if s]
        would += f", or a size of {' or '.join(map(str, sizes))}"
    raise ElmError(
        f"{what} of size {size} cannot be split {ways} ways over mesh axes {tuple(mesh_axes)}; "
        f"nearest that would: {would}"
    )


def check_work(
    mesh: AnyMesh, experts: int, rows: int | None = None, rules: LogicalRules = RULES
) -> None:
    """Refuses a stack of experts, or a batch, that the mesh does not divide.

    Args:
      mesh: the mesh.
      experts: X.
      rows: B, of each expert's batch; None does not check it.
      rules: logical axis -> mesh axes.

    Raises:
      ElmError: naming both numbers and the nearest that would do.
    """
    known = dict(rules)
    check_split(mesh, experts, known["experts"], "a stack of experts", free=True)
    if rows is not None:
        check_split(mesh, rows, known["batch"], "a batch", free=True)


def batch_sharding(mesh: AnyMesh, rules: LogicalRules = RULES) -> NamedSharding:
    """Returns the sharding of a stacked batch [X, B, T]."""
    return NamedSharding(mesh, partition_spec(("experts", "batch"), "a batch", rules))


def stack_sharding(mesh: AnyMesh, rules: LogicalRules = RULES) -> NamedSharding:
    """Returns the sharding of one number or key for each expert, [X]."""
    return NamedSharding(mesh, partition_spec(("experts",), "a stack of experts", rules))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
