"""`argot plan`: compiles the real training step for a TPU topology on any machine, and says what it needs.

libtpu compiles for topologies that are not there. State and batch are shapes with layouts; no array is made. What is
said of memory is the compiler's own account; what is said of time is an estimate (`train/estimate.py`).
"""

import importlib.util
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from data.tokenizer import Tokenizer, load_tokenizer
from models.sharding import AXES, CONTEXT, make_mesh
from train import loop, programs, stage
from train.chips import CHIPS, Chip
from train.compiler import temporary_bytes
from train.estimate import Estimate, Torus, estimate
from train.flops import attention_pairs, row_lengths

GIB = 2**30
_EXAMPLE = "expected CHIP:SIDExSIDE, such as v5e:16x16, v6e:4x4 or v5p:4x4x4"
# The compiler's two ways of saying it: after laying memory out, and before, where it sees no hope.
_USED = re.compile(
  r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm|\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)"
)


class Topology(NamedTuple):
  """A slice of TPUs.

  Attributes:
    name: as asked for.
    chip: what it is made of.
    devices: one a chip, not attached.
    rings: whether the ends of each side are joined.
  """

  name: str
  chip: Chip
  devices: list[jax.Device]
  rings: tuple[bool, ...]


class Vocabulary(NamedTuple):
  """Stands in for a tokenizer that the recipe has yet to train; only its size shapes the program."""

  vocab_size: int
  start_id: int = 0
  eos_id: int = 1


class Memory(NamedTuple):
  """Bytes of each chip's HBM.

  Attributes:
    params, optimizer, batch: arguments of the step.
    temporaries: activations, gradients, gathered weights, at the worst moment.
    output: beyond what is written over donated arguments.
    program: the code.
    capacity: what the chip has.
  """

  params: int
  optimizer: int
  batch: int
  temporaries: int
  output: int
  program: int
  capacity: int

  @property
  def total(self) -> int:
    """Bytes that the step takes."""
    return sum(self) - self.capacity


class Plan(NamedTuple):
  """What a compiled step needs.

  Attributes:
    topology: its name. chips: how many. mesh: axis -> size.
    architecture, size, dtype, optimizer, remat, attention: of the config.
    rows: of the global batch. tokens: positions of a step's batch, on both sides, padding included.
    parameters: how many.
    memory: of each chip.
    model_flops: of a step, all chips, by `train/flops.py`'s formula.
    peak: FLOP/s of a chip.
    estimate: of the step.
    compile_seconds: how long lowering and compiling took.
  """

  topology: str
  chips: int
  mesh: dict[str, int]
  architecture: str
  size: str
  dtype: str
  optimizer: str
  remat: str
  attention: str
  rows: int
  tokens: int
  parameters: int
  memory: Memory
  model_flops: int
  peak: float
  estimate: Estimate
  compile_seconds: float

  def mfu(self, seconds: float) -> float:
    """Returns the share of the chips' peak that the model's FLOPs take in a step of so many seconds."""
    return self.model_flops / (self.chips * self.peak * seconds)


class DoesNotFit(ValueError):
  """The compiler found no way to lay the step out in a chip's memory."""


def open_topology(name: str) -> Topology:
  """Returns the devices of a topology, which need not exist; JAX stays on the CPU from here on.

  Args:
    name: such as "v5e:16x16".

  Raises:
    ValueError: no such chip or shape, or libtpu is not installed.
  """
  chip_name, _, shape = name.partition(":")
  if chip_name not in CHIPS:
    raise ValueError(
      f"--topology={name}: {_EXAMPLE}, of the chips {', '.join(CHIPS)}; only TPU topologies can be compiled here "
      "(a GPU program needs the GPU: argot train on one step there)"
    )
  if not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
    raise ValueError(f"--topology={name}: {_EXAMPLE}")
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError("planning compiles with libtpu, which is not installed: pip install 'argot[plan]'")
  _stay_here()
  chip = CHIPS[chip_name]
  sides = [int(side) for side in shape.split("x")]
  rings = tuple(side >= chip.wraps for side in sides + [1] * (3 - len(sides)))
  try:
    devices = topologies.get_topology_desc(
      name, "tpu", wrap=rings, chip_config_name=chip.variant, chips_per_host_bounds=_host(sides)
    ).devices
  except (RuntimeError, ValueError) as error:
    raise ValueError(f"--topology={name}: {str(error).splitlines()[0]}; {_EXAMPLE}") from error
  return Topology(name, chip, list(devices), rings)


def _stay_here() -> None:
  """Keeps JAX on the CPU, and libtpu from asking for machines that are not there; what the user has set stays."""
  jax.config.update("jax_platforms", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no Google Cloud metadata server
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # beside another plan


def _host(sides: list[int]) -> tuple[int, int, int]:
  """Returns the chips of one host along each side: 2×2, or what a smaller slice has."""
  return min(sides[0], 2), min(sides[1], 2), 1


def vocabulary(config: ConfigDict) -> Tokenizer | Vocabulary:
  """Returns the config's tokenizer, or what stands for one that is still to be trained."""
  if config.tokenizer.path == "train":
    return Vocabulary(config.tokenizer.vocab_size)
  return load_tokenizer(config.tokenizer.path)


def bytes_of(tree: Any) -> int:
  """Returns the bytes that one device holds of arrays whose shapes carry a layout; the host's memory is not its own."""
  own = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != "pinned_host"]
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in own)


def plan(config: ConfigDict, topology: Topology, hlo_file: str | None = None) -> Plan:
  """Compiles the config's step for a topology.

  Args:
    config: the resolved config.
    topology: from `open_topology`.
    hlo_file: where to write the optimised program's text, or None.

  Raises:
    DoesNotFit: the step needs more memory than a chip has.
    ValueError: the config does not suit the mesh.
  """
  tokenizer = vocabulary(config)
  try:
    mesh = make_mesh(config.mesh, topology.devices)
  except NotImplementedError as error:
    raise ValueError(f"mesh {config.mesh.to_dict()} cannot be laid along the sides of {topology.name}") from error
  model = loop.build_model(config, tokenizer)
  began = time.monotonic()
  with jax.set_mesh(mesh):
    weights = stage.params_like(model, mesh)
    state, batch = loop.state_like(config, model, mesh), programs.batch_like(config, tokenizer, mesh)
    flops = loop.step_flops(config, model, mesh)
    step = programs.make_train_step(config, model, mesh, max(len(config.data.mixture), 1))
    compiled = _compiled(step.lower(state, batch), topology)
  seconds, text = time.monotonic() - began, program_text(compiled)
  if hlo_file:
    with open(hlo_file, "w", encoding="utf-8") as file:
      file.write(text)
  lengths = row_lengths(config)
  # All wait for the device that has most to do, the one with the last part of each row.
  visible, pairs = attention_pairs(model, *lengths, mesh.shape[CONTEXT])
  seen = 1.0 if lengths[0] else visible / pairs  # a T5's kernels are its cross-attention's, where every pair is seen
  torus = Torus([tuple(device.coords) for device in mesh.devices.flat], topology.rings, topology.chip.link)
  return Plan(
    topology=topology.name,
    chips=len(topology.devices),
    mesh={axis: mesh.shape[axis] for axis in AXES},
    architecture=config.architecture,
    size=config.model.size,
    dtype=model.config.dtype,
    optimizer=config.optimizer.name,
    remat=model.config.remat,
    attention=model.config.attention,
    rows=config.data.batch_size,
    tokens=config.data.batch_size * sum(lengths),
    parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights)),
    memory=_memory(compiled.memory_analysis(), state, batch, topology.chip),
    model_flops=flops,
    peak=topology.chip.peak,
    estimate=estimate(text, topology.chip, torus, seen),
    compile_seconds=seconds,
  )


def _compiled(lowered: jax.stages.Lowered, topology: Topology) -> jax.stages.Compiled:
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "memory" not in str(error):
      raise
    used = _USED.search(str(error))
    sizes = [size for size in used.groups() if size] if used else []
    needs = "needs {}iB of {}iB".format(*sizes) if sizes else f"says: {str(error).splitlines()[0]}"
    raise DoesNotFit(
      f"the step does not fit in a chip of {topology.name}: the compiler {needs}; take fewer rows "
      "(config.data.batch_size), more config.model.remat, or a larger config.mesh.fsdp"
    ) from error


def program_text(compiled: jax.stages.Compiled) -> str:
  """Returns the optimised program.

  Raises:
    ValueError: jax cannot read what libtpu wrote: a libtpu that is newer than jax writes forms that it does not know.
  """
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError as error:
    said = str(error).splitlines()[0]
    raise ValueError(
      f"the step compiles, but jax {jax.__version__} cannot read the program that this libtpu made ({said}); "
      "install a newer jax with the libtpu that comes with it: pip install -U 'argot[plan]'"
    ) from error


def _memory(stats: Any, state: Any, batch: Any, chip: Chip) -> Memory:
  return Memory(
    params=bytes_of(state["params"]) + bytes_of(state["frozen"]),
    optimizer=bytes_of(state["opt"]) + bytes_of(state["step"]),
    batch=bytes_of(batch),
    temporaries=temporary_bytes(stats, "tpu"),
    output=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    program=stats.generated_code_size_in_bytes,
    capacity=int(chip.hbm_gib * GIB),
  )
