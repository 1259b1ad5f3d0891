"""The mesh and the one table that says how each parameter lies on it.

The mesh axes always exist; a strategy is their sizes (an axis of size 1 costs nothing):
  data: rows of the batch; parameters replicated.        fsdp: rows of the batch; parameters split.
  context: tokens of a row (for long rows); parameters replicated, keys and values gathered for attention.
  tensor: heads, mlp and vocabulary; activations split.

Axes are `AxisType.Explicit`: every array's layout is part of its type, so that a layout that does not work out fails
when the step is traced, on any machine, and optimizer state inherits its parameter's layout. Where a program is already
per-device (inside `jax.shard_map`), or no mesh is set, the helpers here do nothing.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")  # the axes that rows of a batch are split over
CONTEXT = "context"  # the axis that tokens of a row are split over, where it is larger than 1

# Parameter path -> mesh axis of each dim (stacked layers: the leading L is never split). First match wins; there is no
# catch-all, so a new parameter must be given a layout.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"embed/tokens$", ("tensor", "fsdp")),  # VD
  (r"embed/positions$", (None, "fsdp")),  # TD
  (r"relative_bias/table$", (None, "tensor", None)),  # buckets, KG
  (r"(attention|cross)/query$", ("fsdp", "tensor", None, None)),  # DKGH
  (r"(attention|cross)/(key|value)$", ("fsdp", "tensor", None)),  # DKH
  (r"(attention|cross)/out$", ("tensor", None, None, "fsdp")),  # KGHD
  (r"(attention|cross)/query_bias$", ("tensor", None, None)),  # KGH
  (r"(attention|cross)/(key|value)_bias$", ("tensor", None)),  # KH
  (r"(attention|cross)/out_bias$", (None,)),  # D
  (r"mlp/(gate|up)$", ("fsdp", "tensor")),  # DF
  (r"mlp/down$", ("tensor", "fsdp")),  # FD
  (r"mlp/up_bias$", ("tensor",)),  # F
  (r"mlp/down_bias$", (None,)),  # D
  # Adapters (models/lora.py): as their weight, which is split into the contracted dims and the others; R stays whole.
  (r"(attention|cross)/(query|key|value)/lora_a$", ("fsdp", None)),  # DR
  (r"(attention|cross)/query/lora_b$", (None, "tensor", None, None)),  # RKGH
  (r"(attention|cross)/(key|value)/lora_b$", (None, "tensor", None)),  # RKH
  (r"(attention|cross)/out/lora_a$", ("tensor", None, None, None)),  # KGHR
  (r"(attention|cross)/out/lora_b$", (None, "fsdp")),  # RD
  (r"mlp/(gate|up)/lora_a$", ("fsdp", None)),  # DR
  (r"mlp/(gate|up)/lora_b$", (None, "tensor")),  # RF
  (r"mlp/down/lora_a$", ("tensor", None)),  # FR
  (r"mlp/down/lora_b$", (None, "fsdp")),  # RD
  (r"norm/(scale|bias)$", (None,)),  # D
  (r"head/kernel$", ("fsdp", "tensor")),  # DV
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Builds the mesh.

  Args:
    sizes: axis name -> size; at most one may be -1, which takes the devices that are left. `slices`: groups of devices
      with a slower network between them, which `data` is laid over; 0 or missing = the TPU slices of the devices.
    devices: the devices to use; default all.

  Returns:
    A mesh with the axes of `AXES`, all explicit.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, an axis is unknown, or `data` is no multiple of
      the slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  unknown = set(sizes) - {*AXES, "slices"}
  if unknown:
    raise ValueError(f"mesh axes are {AXES}, got unknown {sorted(unknown)}")
  shape = [int(sizes.get(axis, 1)) for axis in AXES]
  if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
    raise ValueError(f"mesh sizes must be positive and at most one may be -1, got {dict(sizes)}")
  known = int(np.prod([size for size in shape if size != -1]))
  shape = [len(devices) // known if size == -1 else size for size in shape]
  if int(np.prod(shape)) != len(devices):
    raise ValueError(
      f"mesh {dict(zip(AXES, shape, strict=True))} needs {int(np.prod(shape))} devices, {len(devices)} are present; "
      "set config.mesh so that the sizes multiply to that (-1 fills)"
    )
  explicit = (AxisType.Explicit,) * len(AXES)
  slices = _slices(devices, int(sizes.get("slices", 0)))
  if len(slices) == 1:
    return Mesh(_laid(shape, devices), AXES, axis_types=explicit)
  if shape[0] % len(slices):
    raise ValueError(
      f"config.mesh.data is {shape[0]}, but the devices are {len(slices)} slices with a slower network between them, "
      f"which `data` is laid over: make it a multiple of {len(slices)} (the other axes then stay inside a slice)"
    )
  inner = (shape[0] // len(slices), *shape[1:])
  blocks = [_laid(inner, part) for part in slices]
  return Mesh(np.concatenate(blocks), AXES, axis_types=explicit)


def _laid(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Lays devices out by the sides of their network; a side is split between two axes only where nothing else does."""
  try:
    return mesh_utils.create_device_mesh(shape, devices)
  except NotImplementedError:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _slices(devices: Sequence[jax.Device], asked: int) -> list[list[jax.Device]]:
  """Groups devices by slice: their own, or `asked` groups of neighbouring processes."""
  own = sorted({getattr(device, "slice_index", 0) for device in devices})
  if asked in (0, len(own)):
    return [[device for device in devices if getattr(device, "slice_index", 0) == index] for index in own]
  processes = sorted({device.process_index for device in devices})
  if len(own) > 1 or asked < 0 or len(processes) % asked:
    raise ValueError(
      f"config.mesh.slices is {asked}, but the devices are {len(own)} slices of {len(processes)} processes: expected "
      "0 (what the devices say) or, for GPU nodes, a number that divides the processes"
    )
  rank, each = {index: i for i, index in enumerate(processes)}, len(processes) // asked
  return [[device for device in devices if rank[device.process_index] // each == number] for number in range(asked)]


def spec(*dims: str | tuple[str, ...] | None) -> P | None:
  """Returns the PartitionSpec for `out_sharding`, or None where layouts are not part of types here."""
  mesh = jax.sharding.get_abstract_mesh()
  explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
  return P(*dims) if explicit else None


def pin(x: jax.Array, *dims: str | tuple[str, ...] | None) -> jax.Array:
  """Lays `x` out as said (a reshard: XLA inserts the collective); does nothing where there are no explicit axes."""
  layout = spec(*dims)
  return x if layout is None else jax.sharding.reshard(x, layout)


def split_over(x: Any) -> str | None:
  """Returns the mesh axis that axis 1 of `x`, the tokens of a row, is split over: "context" or None.

  What is made of tokens takes its layout from them, so that one program text serves training on long rows and
  decoding, whose few tokens are not split.

  Args:
    x: [B,T,…], an array or its shape.
  """
  sharding = jax.typeof(x).sharding if isinstance(x, jax.Array) else getattr(x, "sharding", None)
  layout = tuple(getattr(sharding, "spec", ()))
  return CONTEXT if len(layout) > 1 and layout[1] == CONTEXT else None


def parts_of(x: Any) -> int:
  """Returns in how many parts the tokens of a row of `x` [B,T,…] lie."""
  if split_over(x) is None:
    return 1
  return (jax.typeof(x).sharding if isinstance(x, jax.Array) else x.sharding).mesh.shape[CONTEXT]


def token_spec(mesh: Mesh, shape: Sequence[int]) -> P:
  """Returns the layout of a batch's array: rows over `BATCH`, tokens of a row over `context`.

  Args:
    mesh: the mesh.
    shape: [B,T], or [B].

  Raises:
    ValueError: the tokens do not divide over `context`.
  """
  parts = mesh.shape[CONTEXT]
  if parts == 1 or len(shape) == 1:
    return P(BATCH)
  if shape[1] % parts:
    raise ValueError(
      f"rows of {shape[1]} tokens do not divide over mesh axis 'context' of size {parts}; set "
      f"config.data.decoder_length (t5: and encoder_length) to a multiple of {parts}, or another config.mesh.context"
    )
  return P(BATCH, CONTEXT)


def on_mesh(batch: dict[str, np.ndarray], whole: bool = False) -> dict[str, jax.Array]:
  """Lays rows out over the current mesh; every process passes the same global arrays.

  Args:
    batch: [B,T] or [B] each.
    whole: the tokens of a row stay together, as prompts' do, whatever the size of `context`.
  """
  mesh = jax.sharding.get_mesh()

  def place(value: np.ndarray) -> jax.Array:
    layout = P(BATCH) if whole else token_spec(mesh, value.shape)
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, layout), value.__getitem__)

  return {key: place(value) for key, value in batch.items()}


def batch_parts(mesh: Mesh | jax.sharding.AbstractMesh | None = None) -> int:
  """Returns in how many parts the rows of a batch lie on a mesh; None = the current one."""
  sizes = (mesh or jax.sharding.get_mesh()).shape
  return math.prod(sizes.get(axis, 1) for axis in BATCH)


def whole_batch(rows: int) -> int:
  """Returns `rows`, or the next number of rows that divides over the current mesh."""
  return -(-rows // batch_parts()) * batch_parts()


def fetch(x: jax.Array) -> np.ndarray:
  """Returns a global array on this host, whichever processes hold its parts; all processes must ask for it."""
  return np.asarray(jax.device_get(x)) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def platform() -> str:
  """Returns where a program that is being traced will run: "cpu", "gpu" or "tpu", of the mesh's devices if one is set.

  A mesh may hold devices of a machine that is not here (compilation ahead of time).
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return getattr(device, "platform", None) or jax.default_backend()  # jax 0.10.0 does not say it


def per_device(function: Callable[..., Any], ins: Any, outs: Any) -> Callable[..., Any]:
  """Returns `function` as a program of each device over its own parts, by `jax.shard_map`.

  Args:
    function: takes arrays; whatever it reduces over devices it reduces itself, for nothing is checked
      (`check_vma=False`: Pallas kernels do not say over which axes their results vary). Differentiate through it only
      if its specs split every floating-point argument over every mesh axis larger than 1.
    ins, outs: PartitionSpecs of arguments and results.

  Returns:
    The program; `function` itself where layouts are not part of types (no mesh, or already per-device).
  """
  if spec() is None:
    return function
  return jax.shard_map(function, in_specs=ins, out_specs=outs, check_vma=False)


def in_auto(function: Callable[..., Any], outs: Any) -> Callable[..., Any]:
  """Returns `function` with the layouts inside it left to the compiler, and results that lie as `outs` says.

  Args:
    function: takes arrays.
    outs: PartitionSpecs of its results.

  Returns:
    `function` itself where layouts are not part of types (no mesh, or already per-device).
  """
  return function if spec() is None else jax.sharding.auto_axes(function, out_sharding=outs)


def path_name(path: Sequence[Any]) -> str:
  """Returns a key path of `jax.tree_util` as `a/b/c`."""
  return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def by_path(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree by their `path_name`."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def param_specs(params: Any) -> Any:
  """Finds each parameter's layout in `RULES`.

  Args:
    params: nested dict of arrays or shapes.

  Returns:
    The same tree with a PartitionSpec at each leaf.

  Raises:
    ValueError: a path has no rule, or a rule of another rank.
  """

  def find(path: Sequence[Any], leaf: Any) -> P:
    name = path_name(path)
    for pattern, dims in RULES:
      if re.search(pattern, name):
        dims = (None,) * ("layers/" in name) + dims
        if len(dims) != len(leaf.shape):
          raise ValueError(f"sharding rule {pattern!r} has {len(dims)} dims, parameter {name} has shape {leaf.shape}")
        return P(*dims)
    raise ValueError(f"parameter {name} {leaf.shape} matches no rule in models/sharding.py RULES; add one")

  return jax.tree_util.tree_map_with_path(find, params)


def param_shardings(params: Any, mesh: Mesh) -> Any:
  """Returns a NamedSharding for each parameter.

  Args:
    params: nested dict of arrays or shapes.
    mesh: from `make_mesh`.

  Raises:
    ValueError: a dim does not divide by the mesh axis that splits it; nothing is replicated silently.
  """

  def place(path: Sequence[Any], leaf: Any, layout: P) -> NamedSharding:
    for dim, axis in enumerate(layout):
      if axis is not None and leaf.shape[dim] % mesh.shape[axis]:
        raise ValueError(
          f"parameter {path_name(path)} {leaf.shape}: dim {dim} ({leaf.shape[dim]}) does not divide by mesh axis "
          f"{axis!r} of size {mesh.shape[axis]}; choose another config.mesh.{axis}"
        )
    return NamedSharding(mesh, layout)

  return jax.tree_util.tree_map_with_path(place, params, param_specs(params))
