"""Reads the text of an optimised HLO module: operations, loops, FLOPs, bytes, collectives.

XLA's own `cost_analysis` counts a loop's body once, and its FLOPs of TPU programs are not usable; the text says all
that is needed. Written for what libtpu prints after scheduling; `tests/test_hlo.py` holds a module small enough to
check by hand.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16}  # every other type carries its width in its name: f32, s8, u4, f8e4m3fn
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_KIND = re.compile(r"\s([a-z][\w\-]*)\(")
_REFERENCE = re.compile(r"%([\w.\-]+)")


class Op(NamedTuple):
  """One instruction.

  Attributes:
    name: without `%`.
    shape: its type and layout, as printed; a tuple's in parentheses.
    kind: opcode, such as "fusion".
    operands: names.
    text: the whole line.
    root: whether it is its computation's result.
  """

  name: str
  shape: str
  kind: str
  operands: tuple[str, ...]
  text: str
  root: bool

  def called(self, attribute: str = "calls") -> str | None:
    """Returns the computation that an attribute (`calls`, `body`, `condition`, `to_apply`) names."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
    return found.group(1) if found else None

  def number(self, name: str) -> float | None:
    """Returns a number that the line has under a name in its JSON or attributes, such as `estimated_cycles`."""
    found = re.search(rf'\b{name}"?[:=]\s*"?(-?[\d.]+(?:e[+-]?\d+)?)', self.text)
    return float(found.group(1)) if found else None


class Computation:
  """A named list of operations in the order that they run in."""

  def __init__(self, ops: Sequence[Op]):
    self.ops = list(ops)

  @cached_property
  def by_name(self) -> Mapping[str, Op]:
    """Operations by name."""
    return {op.name: op for op in self.ops}

  @cached_property
  def root(self) -> Op:
    """The result."""
    return next((op for op in self.ops if op.root), self.ops[-1])

  @cached_property
  def parameters(self) -> dict[int, str]:
    """Number -> name of each parameter."""
    return {
      int(re.search(r"parameter\((\d+)\)", op.text).group(1)): op.name for op in self.ops if op.kind == "parameter"
    }

  def shape(self, name: str) -> str:
    """Returns the type of an operation, "" for an unknown one."""
    return self.by_name[name].shape if name in self.by_name else ""

  def behind(self, name: str, through: Sequence[str] = ("bitcast", "copy", "convert")) -> Op | None:
    """Follows first operands from `name` through operations that only rename or move; None where it leaves."""
    op = self.by_name.get(name)
    while op is not None and op.kind in through:
      op = self.by_name.get(op.operands[0])
    return op


class Module(NamedTuple):
  """A module.

  Attributes:
    computations: by name.
    entry: name of the one that runs.
  """

  computations: Mapping[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """Reads a module.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, list[Op]] = {}
  entry = current = None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = computations.setdefault(header.group(2), [])
      entry = header.group(2) if header.group(1) else entry
    elif current is not None and (op := _parse_op(line)):
      current.append(op)
  if entry is None:
    raise ValueError("expected the text of an HLO module, found no ENTRY computation")
  return Module({name: Computation(ops) for name, ops in computations.items() if ops}, entry)


def _parse_op(line: str) -> Op | None:
  named = _NAMED.match(line)
  kind = _KIND.search(line, named.end() - 1) if named else None
  if not kind:
    return None
  depth, end = 1, kind.end()
  while depth and end < len(line):
    depth += {"(": 1, ")": -1}.get(line[end], 0)
    end += 1
  operands = tuple(_REFERENCE.findall(line[kind.end() : end]))
  return Op(named.group(2), line[named.end() : kind.start()], kind.group(1), operands, line, bool(named.group(1)))


def arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...], bool]]:
  """Yields (type, dims, whether it lies in HBM) of each array in a printed type.

  Example:
    >>> list(arrays("(bf16[8,128]{1,0:T(8,128)(2,1)}, f32[2]{0:T(128)S(1)})"))
    [('bf16', (8, 128), True), ('f32', (2,), False)]
  """
  for kind, dims, layout in _ARRAY.findall(shape):
    # A memory space S(n) other than 0 is on the chip (vector or scalar memory).
    yield kind, tuple(map(int, dims.split(","))) if dims else (), not re.search(r"S\([1-9]", layout)


def array_bytes(shape: str, hbm_only: bool = False) -> int:
  """Returns the bytes of all arrays in a printed type, or of those that lie in HBM."""
  return sum(math.prod(dims) * _bits(kind) // 8 for kind, dims, in_hbm in arrays(shape) if in_hbm or not hbm_only)


def _bits(kind: str) -> int:
  width = re.match(r"[a-z]+(\d+)", kind)
  return _BITS.get(kind) or (int(width.group(1)) if width else 0)  # "token" and "opaque" have none


def dims_of(shape: str) -> tuple[int, ...]:
  """Returns the dims of the first array in a printed type."""
  return next(arrays(shape))[1]


def matrix_flops(module: Module, name: str) -> int:
  """Returns the FLOPs of the matrix products in a computation and in the fusions it calls, each once."""
  found, computation = 0, module.computations[name]
  for op in computation.ops:
    if op.kind == "fusion":
      found += matrix_flops(module, op.called())
    else:
      found += op_flops(computation, op)
  return found


def op_flops(computation: Computation, op: Op) -> int:
  """Returns the FLOPs of a `dot` or `convolution` (the form in which TPU programs have products); 0 for others."""
  if op.kind == "dot":
    left = dims_of(computation.shape(op.operands[0]))
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.text).group(1)
    summed = math.prod(left[int(dim)] for dim in contracted.split(",") if dim)
    return 2 * math.prod(dims_of(op.shape)) * summed
  if op.kind == "convolution":
    return _convolution_flops(op, *(dims_of(computation.shape(name)) for name in op.operands[:2]))
  return 0


def _convolution_flops(op: Op, left: Sequence[int], right: Sequence[int]) -> int:
  """Counts multiplications with padding and holes left out: batched products are convolutions with many of these."""
  left_names, right_names, out_names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.text).groups()
  out = dims_of(op.shape)
  spatial = [name for name in out_names if name.isdigit()]
  printed = re.search(r"window=\{([^}]*)\}", op.text)
  window = dict(item.split("=") for item in printed.group(1).split()) if printed else {}

  def setting(name: str, default: str, axis: int) -> str:
    return window[name].split("x")[axis] if name in window else default

  flops = 2 * out[out_names.index("b")] * out[out_names.index("f")] * right[right_names.index("i")]
  for name in spatial:
    axis = int(name)
    stride, hole, dilation = (int(setting(key, "1", axis)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(setting("pad", "0_0", axis).split("_")[0])
    steps = np.arange(out[out_names.index(name)])[:, None] * stride
    place = steps + np.arange(right[right_names.index(name)])[None, :] * dilation - before
    last = (left[left_names.index(name)] - 1) * hole
    flops *= int(np.sum((place >= 0) & (place <= last) & (place % hole == 0)))
  return flops


def moved_bytes(module: Module, computation: Computation, op: Op) -> int:
  """Returns the HBM bytes that an operation reads and writes.

  What lies in on-chip memory is free; of an operand that is only sliced, the slices count; an array that is updated in
  place costs the update.
  """
  inner = module.computations[op.called()] if op.kind == "fusion" else Computation([op._replace(root=True)])
  results = inner.root.operands if inner.root.kind == "tuple" else (inner.root.name,)
  updates = {}  # name of the updated array within `inner` -> bytes of the update
  written = array_bytes(op.shape, hbm_only=True)
  shapes = inner if op.kind == "fusion" else computation
  for result in results:
    update = inner.behind(result)
    if update is not None and update.kind == "dynamic-update-slice":
      target, size = update.operands[0], array_bytes(shapes.shape(update.operands[1]))
      root = inner.behind(target, ("bitcast",))
      updates[root.name if root else target] = size
      written -= max(array_bytes(inner.shape(result), hbm_only=True) - size, 0)
  names = inner.parameters if op.kind == "fusion" else dict(enumerate(op.operands))
  read = 0
  for number, operand in enumerate(op.operands):
    size = array_bytes(computation.shape(operand), hbm_only=True)
    if size and names.get(number) not in updates:
      read += min(size, _read_of(inner, names.get(number, ""), size))
  return max(written, 0) + read


def _read_of(inner: Computation, name: str, size: int) -> int:
  aliases = {name}
  for op in inner.ops:
    if op.kind == "bitcast" and op.operands and op.operands[0] in aliases:
      aliases.add(op.name)
  users = [op for op in inner.ops if aliases & set(op.operands) and op.kind != "bitcast"]
  if users and all(op.kind in ("dynamic-slice", "slice", "gather") for op in users):
    return sum(array_bytes(op.shape) for op in users)
  return size


def trip_count(module: Module, caller: Computation, loop: Op) -> int | None:
  """Returns how often a `while` runs its body; None where the text does not say."""
  if known := re.search(r'known_trip_count"?[:=]\s*\{"?n"?:"?(\d+)', loop.text):
    return int(known.group(1))
  condition, body = (module.computations[loop.called(part)] for part in ("condition", "body"))
  compare = next((op for op in condition.ops if op.kind == "compare"), None)
  if compare is None or "direction=L" not in compare.text:
    return None
  counter, limit = (condition.behind(name, ("copy", "bitcast")) for name in compare.operands)
  if counter is None or counter.kind != "get-tuple-element":
    return None
  index = int(counter.number("index"))
  start = _element_constant(caller, loop.operands[0], index)
  end = _constant(limit)
  if end is None and limit is not None and limit.kind == "get-tuple-element":
    end = _element_constant(caller, loop.operands[0], int(limit.number("index")))
  if end is None:
    return None
  end += "direction=LE" in compare.text
  return max(-(-(end - (start or 0)) // _step(body, index)), 0)


def _constant(op: Op | None) -> int | None:
  found = re.search(r"constant\((-?\d+)\)", op.text) if op is not None and op.kind == "constant" else None
  return int(found.group(1)) if found else None


def _element_constant(computation: Computation, name: str, index: int) -> int | None:
  made = computation.by_name.get(name)
  if made is None or made.kind != "tuple":
    return None
  return _constant(computation.behind(made.operands[index], ("copy", "bitcast")))


def _step(body: Computation, index: int) -> int:
  """Returns what a loop's body adds to its counter; 1 where it is not plain."""
  total, name = 0, body.root.operands[index] if body.root.kind == "tuple" else ""
  while (op := body.behind(name, ("copy", "bitcast"))) is not None and op.kind == "add":
    addends = {operand: _constant(body.behind(operand, ("copy", "bitcast"))) for operand in op.operands}
    total += sum(value for value in addends.values() if value is not None)
    name = next((operand for operand, value in addends.items() if value is None), "")
  return total or 1


def group_of(text: str) -> tuple[int, ...] | None:
  """Returns the first group of partitions that a collective runs over; None where it names none (then: all).

  Example:
    >>> group_of("replica_groups={{0,4},{1,5}}"), group_of("replica_groups=[2,4]<=[4,2]T(1,0)")
    ((0, 4), (0, 2, 4, 6))
    >>> group_of("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}")
    (0, 1, 2, 3)
    >>> group_of("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, use_global_device_ids=true")
    (0, 4)
  """
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return tuple(map(int, found.group(1).split(",")))
  if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
    shape, source, order = (tuple(map(int, part.split(","))) if part else None for part in found.groups())
    grid = np.arange(math.prod(source)).reshape(source)
    return tuple(grid.transpose(order or range(len(source))).reshape(shape)[0].tolist())
  axes = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
  if found := re.search(axes, text):
    named, source, order, chosen = found.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named)}
    if ":(" in chosen:  # a part of an axis
      return None
    source = tuple(map(int, source.split(","))) if source else tuple(sizes.values())
    order = tuple(map(int, order.split(","))) if order else tuple(range(len(source)))
    grid = np.arange(math.prod(source)).reshape(source).transpose(order).reshape(tuple(sizes.values()))
    chosen = re.findall(r"'([^']+)'", chosen)
    return tuple(np.ravel(grid[tuple(slice(None) if name in chosen else 0 for name in sizes)]).tolist())
  if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
    return tuple(map(int, found.groups()))
  return None
