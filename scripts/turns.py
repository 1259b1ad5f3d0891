"""Competitors, each in a process of its own, that work in turn: how fast each is beside the first, on a noisy machine.

Only one of them works at a time, and each round is a ratio of its own, so that whatever else the machine does falls on
all alike. The peak of a process's memory is its own (`VmHWM`).
"""

import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

WARM = 2  # turns before those that are timed


class Timing(NamedTuple):
  """What was measured of a competitor.

  Attributes:
    seconds: of each turn after the warm-up. cpu_seconds: of all its threads, in each of these turns; what other
      processes do touches it less.
    first_seconds: from the start of its process to the end of its first turn: imports, compilation.
    peak_bytes: of its process.
    answer: what its last turn returned.
  """

  seconds: list[float]
  cpu_seconds: list[float]
  first_seconds: float
  peak_bytes: int
  answer: Any

  @property
  def median(self) -> float:
    """Seconds of a turn."""
    return statistics.median(self.seconds)

  def speed(self, other: "Timing") -> tuple[float, float, float]:
    """Returns how many times as fast as another this is, by round: median, first and third quartile."""
    ratios = [theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return middle, low, high


def take_turns(
  makers: Mapping[str, tuple[Callable, tuple]],
  rounds: int,
  environments: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Timing]:
  """Starts the competitors one after the other, and lets each work in turn.

  Args:
    makers: name -> (maker, arguments). In the competitor's process `maker(*arguments)` returns the turn: a function
      that does the work, waits for its end, and returns something small.
    rounds: turns of each that are timed, after `WARM` that are not.
    environments: name -> what its process finds in its environment besides.

  Raises:
    RuntimeError: a competitor ended.
  """
  context, lines, processes, found = multiprocessing.get_context("spawn"), {}, [], {}
  try:
    for name, (maker, arguments) in makers.items():
      lines[name], far = context.Pipe()
      processes.append(context.Process(target=_compete, args=(maker, arguments, far), daemon=True))
      began = time.monotonic()
      _start(processes[-1], (environments or {}).get(name, {}))
      far.close()
      _ask(name, lines[name])
      found[name] = Timing([], [], time.monotonic() - began, 0, None)
      for _ in range(WARM - 1):
        _ask(name, lines[name])
    for _ in range(rounds):
      for name, line in lines.items():
        seconds, cpu_seconds, *rest = _ask(name, line)
        found[name].seconds.append(seconds)
        found[name].cpu_seconds.append(cpu_seconds)
        found[name] = found[name]._replace(peak_bytes=rest[0], answer=rest[1])
  finally:
    for process in processes:
      process.terminate()
      process.join()
  return found


def _start(process: multiprocessing.Process, environment: Mapping[str, str]) -> None:
  own = dict(os.environ)
  os.environ.update(environment)
  try:
    process.start()
  finally:
    os.environ.clear()
    os.environ.update(own)


def _ask(name: str, line: Any) -> tuple[float, float, int, Any]:
  try:
    line.send(None)
    return line.recv()
  except (EOFError, OSError) as error:
    raise RuntimeError(f"the competitor {name!r} ended; its message is above") from error


def _compete(maker: Callable, arguments: tuple, line: Any) -> None:
  turn = maker(*arguments)
  while True:
    line.recv()
    began, cpu_began = time.perf_counter(), time.process_time()
    answer = turn()
    line.send((time.perf_counter() - began, time.process_time() - cpu_began, peak(), answer))


def peak() -> int:
  """Returns the most memory that this process has had, in bytes (`ru_maxrss` begins with that of the parent)."""
  status = Path("/proc/self/status").read_text(encoding="utf-8")
  return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def table(found: Mapping[str, Timing], against: str, count: int, unit: str, flops: float = 0.0) -> str:
  """Returns what was measured as a table in Markdown.

  Args:
    found: from `take_turns`.
    against: the competitor that speeds are ratios to.
    count: units of work in a turn.
    unit: their name, such as "tokens".
    flops: of a turn; 0 = not said.
  """
  heads = ["", "speed (quartiles)", f"{unit}/s", *["model GFLOP/s"] * bool(flops), "CPU s a turn", "peak MiB"]
  heads.append("first turn after, s")
  rows = [heads, ["---"] * len(heads)]
  for name, timing in found.items():
    middle, low, high = timing.speed(found[against])
    cells = [name, f"{middle:.2f} ({low:.2f}–{high:.2f})", f"{count / timing.median:,.0f}"]
    cells += [f"{flops / timing.median / 1e9:,.0f}"] * bool(flops)
    cells.append(f"{statistics.median(timing.cpu_seconds):.2f}")
    rows.append([*cells, f"{timing.peak_bytes / 2**20:,.0f}", f"{timing.first_seconds:.0f}"])
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)
