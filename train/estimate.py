"""How long a compiled TPU program may take: three estimates, read from its optimised text. Nothing is run.

Each operation is priced twice: by the cycles that the compiler itself reckoned with when it chose the program
(`estimated_cycles`), and by a roofline, FLOPs and HBM bytes against the chip's peaks. Loops count as often as they run.
Collectives go over the torus's links; those that are started early wait behind each other and are hidden by the work
between start and end, in the order of the schedule, and what is not hidden is exposed. Then, over the whole program:

  cyc   compiler's cycles + kernels + exposed collectives. Pessimistic for element-wise work.
  roof  roofline + kernels + exposed collectives. Optimistic: every operation reaches a peak.
  mid   of matrix products the slower of the two sums, of other work the faster one, its roofline at 80 % of the
        memory's bandwidth, + kernels + exposed collectives.

Not in it: latencies, the input, host transfers, other slices, contention for a chip's memory.

References:
  Williams et al. 2009 (roofline); "How to Scale Your Model" (jax-ml.github.io/scaling-book), collectives on a torus.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from train import hlo
from train.chips import Chip

KERNEL_SHARE = 0.5  # of the peak, that a Pallas attention kernel is taken to reach; the compiler has no figure for it
MEMORY_SHARE = 0.8  # of the memory's bandwidth, that element-wise work reaches in `mid`

_FREE = frozenset("parameter tuple get-tuple-element bitcast constant after-all partition-id replica-id".split())
# Copies between HBM and on-chip memory that run beside the work; their bytes are in the program's total.
_BESIDE = frozenset("copy-start slice-start copy-done slice-done".split())
_PLACEHOLDERS = frozenset("AllocateBuffer ConcatBitcast Sharding AssumeGatherIndicesInBound".split())
# Products of [queries, keys] by head dim in an attention kernel, by what its name says; forward has two.
_KERNEL_PRODUCTS = (("dkv", 5), ("dq", 3), ("", 2))
_ATTENTION_KERNEL = re.compile(r"splash|flash|mha|mqa|attention")


class Torus(NamedTuple):
  """Where a program's partitions lie.

  Attributes:
    coordinates: of each partition's chip, in the program's order.
    rings: for each side of the torus, whether its ends are joined.
    link: bytes/s of a link in one direction.
  """

  coordinates: Sequence[tuple[int, ...]]
  rings: tuple[bool, ...]
  link: float

  def seconds(self, kind: str, size: float, group: Sequence[int] | None) -> float:
    """Returns the time of one collective.

    Args:
      kind: a name in `hlo.COLLECTIVES`.
      size: bytes of the whole array: what an all-gather makes, what a reduce-scatter or all-reduce is given.
      group: the partitions of one group; None = all.
    """
    members = [self.coordinates[number] for number in group or range(len(self.coordinates))]
    if len(members) < 2:
      return 0.0
    if kind == "collective-permute":
      return size / self.link
    sides, whole = ([len(set(along)) for along in zip(*where, strict=True)] for where in (members, self.coordinates))
    # A part of a ring is a line.
    rings = [ring and side == full for ring, side, full in zip(self.rings, sides, whole, strict=True)]
    # A side that is a ring is used in both directions; one that is a line has its ends to fill through one link.
    lanes = sum(2 if ring else 1 for side, ring in zip(sides, rings, strict=True) if side > 1)
    if kind == "all-to-all":  # a quarter of a ring (a half of a line) is the mean way
      return max(side / (8 if ring else 4) for side, ring in zip(sides, rings, strict=True)) * size / self.link
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * size * (len(members) - 1) / len(members) / (lanes * self.link)


class Estimate(NamedTuple):
  """What a program's step may take on one chip, in seconds unless said otherwise.

  Attributes:
    cyc, mid, roof: of the step, see the module.
    matrix_cyc, matrix_roof: matrix products.
    other_cyc, other_roof: everything else but kernels and collectives.
    kernels: Pallas kernels.
    exposed: collectives that nothing hides.
    hidden: collectives behind other work.
    flops: of the matrix products and kernels, remat's recomputation included.
    hbm_bytes: read and written by operations.
    collectives: (kind, "exposed" or "overlapped") -> (times, bytes of the whole arrays, seconds on the links).
    unknown: what could not be priced -> how often.
  """

  cyc: float
  mid: float
  roof: float
  matrix_cyc: float
  matrix_roof: float
  other_cyc: float
  other_roof: float
  kernels: float
  exposed: float
  hidden: float
  flops: float
  hbm_bytes: float
  collectives: dict[tuple[str, str], tuple[int, float, float]]
  unknown: dict[str, int]


def estimate(text: str, chip: Chip, torus: Torus, visible: float = 1.0) -> Estimate:
  """Reads a program.

  Args:
    text: `compiled.as_text()`.
    chip: what it runs on.
    torus: where its partitions lie.
    visible: share of query-key pairs that an attention kernel works on (0.5: causal).
  """
  module = hlo.parse(text)
  total = _Reader(module, chip, torus, visible).read(module.entry)
  matrix_cyc, matrix_roof = total["matrix_cyc"], total["matrix_roof"]
  other_cyc, other_roof = total["other_cyc"], total["other_roof"]
  always = total["kernels"] + total["exposed"]
  roof = matrix_roof + other_roof + total["kernels"] * KERNEL_SHARE + total["exposed"]
  kinds = {key[1:] for key in total if key[0] == "times"}
  return Estimate(
    cyc=matrix_cyc + other_cyc + always,
    mid=max(matrix_cyc, matrix_roof) + min(other_cyc, other_roof / MEMORY_SHARE) + always,
    roof=max(roof, total["bytes"] / chip.hbm_bandwidth),
    **{key: total[key] for key in ("matrix_cyc", "matrix_roof", "other_cyc", "other_roof", "kernels", "exposed")},
    hidden=max(total["links"] - total["exposed"], 0.0),  # equal sums may differ in their last bits
    flops=total["flops"],
    hbm_bytes=total["bytes"],
    collectives={
      kind: (total["times", *kind], total["moved", *kind], total["seconds", *kind]) for kind in sorted(kinds)
    },
    unknown={key[1]: times for key, times in total.items() if key[0] == "unknown"},
  )


class _Reader:
  """Adds up computations, each once.

  A sum is a Counter: names of `Estimate` in seconds, "flops", "bytes", "links" (seconds of collectives), "time" (of the
  computation, by cycles and with waits), and pairs and triples for what is told apart by kind.
  """

  def __init__(self, module: hlo.Module, chip: Chip, torus: Torus, visible: float):
    self.module, self.chip, self.torus, self.visible = module, chip, torus, visible
    self.known: dict[str, Counter] = {}

  def read(self, name: str) -> Counter:
    """Returns the sum of a computation, in the order of its schedule."""
    if name not in self.known:
      computation, total = self.module.computations[name], Counter()
      schedule = _Schedule(total)
      for op in computation.ops:
        self._add(computation, op, total, schedule)
      total["time"] = schedule.now
      self.known[name] = total
    return self.known[name]

  def _add(self, computation: hlo.Computation, op: hlo.Op, total: Counter, schedule: "_Schedule") -> None:
    if op.kind in _FREE:
      return
    if op.kind in _BESIDE:
      total["bytes"] += hlo.array_bytes(op.shape, hbm_only=True) if op.kind.endswith("start") else 0
    elif op.kind in ("while", "call", "conditional"):
      times, inner = self._inner(computation, op, total)
      for key, value in inner.items():
        total[key] += value * times
      schedule.work(inner["time"] * times)
    elif phase := self._phase(op):
      if phase == "end":
        schedule.end(op)
      else:
        schedule.begin(op, *self._collective(computation, op), wait=phase == "whole")
    elif op.kind == "custom-call":
      schedule.work(self._kernel(computation, op, total))
    else:
      schedule.work(self._work(computation, op, total))

  def _inner(self, computation: hlo.Computation, op: hlo.Op, total: Counter) -> tuple[int, Counter]:
    """Returns how often a called computation runs, and its sum; of a conditional, the longest branch's."""
    if op.kind == "call":
      return 1, self.read(op.called("to_apply"))
    if op.kind == "conditional":
      branches = re.search(r"branch_computations=\{([^}]*)\}", op.text)
      names = re.findall(r"[\w.\-]+", branches.group(1).replace("%", "")) if branches else None
      names = names or [op.called("true_computation"), op.called("false_computation")]
      return 1, max((self.read(name) for name in names), key=lambda branch: branch["time"])
    times = hlo.trip_count(self.module, computation, op)
    if times is None:
      total["unknown", "loop whose number of rounds the text does not say (counted once)"] += 1
    return times or 1, self.read(op.called("body"))

  def _phase(self, op: hlo.Op) -> str:
    """Returns "whole", "begin" or "end" of a collective; "" for other operations.

    Work may carry a slice of a collective that another operation began (its computation then holds one, too): that
    is work.
    """
    if any(op.kind.startswith(kind) for kind in hlo.COLLECTIVES):
      return {"start": "begin", "done": "end"}.get(op.kind.rpartition("-")[2], "whole")
    if op.kind in ("async-start", "async-done") and self._held(op):
      return "begin" if op.kind == "async-start" else "end"
    if op.kind == "fusion" and "kind=kCustom" in op.text:
      if op.name.startswith("async-collective-done"):
        return "end"
      if self._held(op):
        return "begin" if op.name.startswith("async-collective") else "whole"
    return ""

  def _held(self, op: hlo.Op) -> tuple[hlo.Computation, hlo.Op] | None:
    """Returns the collective inside a fusion or an async wrapper, and the computation that it stands in."""
    name = op.called()
    while name in self.module.computations:
      inner = self.module.computations[name]
      for found in inner.ops:
        if any(found.kind.startswith(kind) for kind in hlo.COLLECTIVES):
          return inner, found
      name = next((found.called() for found in inner.ops if found.called() in self.module.computations), None)
    return None

  def _collective(self, computation: hlo.Computation, op: hlo.Op) -> tuple[str, float, float]:
    """Returns kind, bytes of the whole arrays and seconds on the links."""
    where, inner = self._held(op) or (computation, op)
    kind = next(kind for kind in hlo.COLLECTIVES if inner.kind.startswith(kind))
    given, made = sum(hlo.array_bytes(where.shape(name)) for name in inner.operands), hlo.array_bytes(inner.shape)
    if inner.kind.endswith("-start"):
      made -= given  # the result of a start holds its operands, too
    if op.kind == "fusion" and "all-reduce-scatter" in (op.called() or ""):
      kind = "reduce-scatter"
    size = made if kind == "all-gather" else given
    return kind, size, self.torus.seconds(kind, size, hlo.group_of(inner.text))

  def _work(self, computation: hlo.Computation, op: hlo.Op, total: Counter) -> float:
    called = op.called() if op.kind == "fusion" else None
    flops = hlo.matrix_flops(self.module, called) if called else hlo.op_flops(computation, op)
    moved = hlo.moved_bytes(self.module, computation, op)
    roof = max(flops / self.chip.peak, moved / self.chip.hbm_bandwidth)
    cycles = op.number("estimated_cycles")
    cyc = cycles / self.chip.clock if cycles is not None and cycles >= 0 else roof
    what = "matrix" if flops else "other"
    total.update({f"{what}_cyc": cyc, f"{what}_roof": roof, "flops": flops, "bytes": moved})
    return cyc

  def _kernel(self, computation: hlo.Computation, op: hlo.Op, total: Counter) -> float:
    """Prices a Pallas kernel as attention, by its shapes and name, or by the cost that its author gave."""
    target = re.search(r'custom_call_target="([^"]+)"', op.text)
    if target is None or target.group(1) in _PLACEHOLDERS or target.group(1).startswith("AsyncCollective"):
      return 0.0
    moved = hlo.moved_bytes(self.module, computation, op)
    flops, what = op.number("flops"), "Pallas kernel" if target.group(1) == "tpu_custom_call" else target.group(1)
    given = [array for name in op.operands for array in hlo.arrays(computation.shape(name))]
    stacks = [dims for kind, dims, _ in given if len(dims) >= 3 and kind.startswith(("f", "bf"))]  # no masks
    if len(stacks) > 1 and _ATTENTION_KERNEL.search(op.name):
      queries, keys = stacks[0], stacks[1][-2]
      products = next(count for part, count in _KERNEL_PRODUCTS if part in op.name)
      flops = products * 2 * math.prod(queries) * keys * self.visible
    if flops is None:
      total["unknown", f"{what} {op.name} (its bytes are counted, not its FLOPs)"] += 1
    flops = flops or 0.0
    seconds = max(flops / (self.chip.peak * KERNEL_SHARE), moved / self.chip.hbm_bandwidth)
    total.update({"kernels": seconds, "flops": flops, "bytes": moved})
    return seconds


class _Schedule:
  """A clock for one computation: the chip works, the links work, and an end waits for its collective."""

  def __init__(self, total: Counter):
    self.total, self.now, self.links_free = total, 0.0, 0.0
    self.pending: dict[str, tuple[float, str]] = {}

  def work(self, seconds: float) -> None:
    """The chip works."""
    self.now += seconds

  def begin(self, op: hlo.Op, kind: str, size: float, seconds: float, wait: bool) -> None:
    """A collective goes to the links behind those before it; `wait`: the chip does nothing until it is done."""
    self.links_free = max(self.now, self.links_free) + seconds
    how = "exposed" if wait else "overlapped"
    self.total.update(
      {("times", kind, how): 1, ("moved", kind, how): size, ("seconds", kind, how): seconds, "links": seconds}
    )
    if wait:
      self._wait(self.links_free)
    else:
      self.pending[op.name] = (self.links_free, op.name.partition(".")[2])

  def end(self, op: hlo.Op) -> None:
    """The chip waits for a collective that was begun; one from outside the computation is done."""
    by_operand = next((name for name in op.operands if name in self.pending), None)
    number = op.name.partition(".")[2]
    name = by_operand or next((name for name, (_, other) in self.pending.items() if other == number), None)
    if name is not None:
      self._wait(self.pending.pop(name)[0])

  def _wait(self, until: float) -> None:
    self.total["exposed"] += max(until - self.now, 0.0)
    self.now = max(until, self.now)
