"""A plan in words and in JSON. What is estimated is called an estimate."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from train.plan import GIB, Plan

ESTIMATES = ("cyc", "mid", "roof")


def planned_steps(config: ConfigDict, plan: Plan, tokens: int) -> int:
  """Returns the steps of the run: those of the config, or as many as a budget of tokens takes (0: no budget)."""
  return -(-tokens // plan.tokens) if tokens else config.train.steps


def lines(plan: Plan, steps: int) -> Iterator[str]:
  """Yields the table that `argot plan` prints.

  Args:
    plan: the plan.
    steps: of the run.
  """
  yield (
    f"{plan.architecture} {plan.size} on {plan.topology}: {plan.chips} chips, mesh {mesh_text(plan.mesh)}; "
    f"{plan.dtype}, {plan.optimizer}, remat {plan.remat}, attention {plan.attention}"
  )
  rows = plan.rows / plan.chips
  yield f"{plan.rows:,} rows a step ({rows:g} a chip), {plan.tokens:,} tokens; {plan.parameters:,} parameters"
  yield ""
  yield from _memory_lines(plan)
  yield ""
  own, program = plan.model_flops / plan.chips, plan.estimate.flops
  yield "FLOPs of a step on each chip"
  yield f"  model      {own / 1e12:10,.2f} T   6 · matrix parameters · tokens + attention's visible pairs"
  yield f"  program    {program / 1e12:10,.2f} T   {program / own:.2f} × the model's, with what remat computes again"
  yield ""
  yield from _collective_lines(plan)
  yield ""
  yield from _time_lines(plan, steps)


def mesh_text(mesh: dict[str, int]) -> str:
  """Returns a mesh's sizes in a line.

  Example:
    >>> mesh_text({"data": 1, "fsdp": 8, "tensor": 1})
    'data 1 × fsdp 8 × tensor 1'
  """
  return " × ".join(f"{axis} {size}" for axis, size in mesh.items())


def _memory_lines(plan: Plan) -> Iterator[str]:
  memory = plan.memory
  yield f"Memory of each chip, GiB (by the compiler; the chip has {memory.capacity / GIB:g})"
  for part in ("params", "optimizer", "batch", "temporaries", "output", "program"):
    yield f"  {part:11}{getattr(memory, part) / GIB:10.3f}"
  share = memory.total / memory.capacity
  verdict = "fits" if share <= 1 else "DOES NOT FIT"
  yield f"  {'total':11}{memory.total / GIB:10.3f}   {share:.0%} of the chip: {verdict}"


def _collective_lines(plan: Plan) -> Iterator[str]:
  estimate = plan.estimate
  yield "Collectives of a step on each chip (bytes of the whole arrays; times on the links, estimated)"
  for (kind, how), (times, size, seconds) in estimate.collectives.items():
    yield f"  {kind:19}{how:11}{times:7,} ×{size / GIB:10.3f} GiB{seconds * 1e3:10.1f} ms"
  if not estimate.collectives:
    yield "  none"
  yield f"  {estimate.exposed * 1e3:.1f} ms are exposed, {estimate.hidden * 1e3:.1f} ms are behind other work"
  for what, times in estimate.unknown.items():
    yield f"  NOT PRICED, {times:g} ×: {what}"


def _time_lines(plan: Plan, steps: int) -> Iterator[str]:
  estimate = plan.estimate
  parts = f"matrix products {estimate.matrix_cyc * 1e3:,.0f} (at the peaks {estimate.matrix_roof * 1e3:,.0f})"
  parts += f", other {estimate.other_cyc * 1e3:,.0f} ({estimate.other_roof * 1e3:,.0f})"
  parts += f", kernels {estimate.kernels * 1e3:,.0f}, exposed collectives {estimate.exposed * 1e3:,.0f}"
  yield "Time: ESTIMATES, nothing ran; cyc by the compiler's cycles, roof by the chip's peaks, mid by both"
  yield f"  ms by the compiler's cycles: {parts}"
  yield f"  {'':6}{'ms a step':>12}{'MFU':>8}{'tokens/s':>14}{'days':>10}{'chip-hours':>14}"
  for name in ESTIMATES:
    found = run_of(plan, name, steps)
    yield (
      f"  {name:6}{found['step_seconds'] * 1e3:12,.1f}{found['mfu']:8.3f}{found['tokens_per_second']:14,.0f}"
      f"{found['days']:10.2f}{found['chip_hours']:14,.0f}"
    )
  yield f"  days and chip-hours: {steps:,} steps, {steps * plan.tokens:,} tokens"


def run_of(plan: Plan, name: str, steps: int) -> dict[str, float]:
  """Returns what one of the estimates means for a run.

  Args:
    plan: the plan.
    name: "cyc", "mid" or "roof".
    steps: of the run.

  Returns:
    `step_seconds`, `mfu`, `tokens_per_second`, `days`, `chip_hours`.
  """
  seconds = getattr(plan.estimate, name)
  return {
    "step_seconds": seconds,
    "mfu": plan.mfu(seconds),
    "tokens_per_second": plan.tokens / seconds,
    "days": steps * seconds / 86_400,
    "chip_hours": steps * seconds * plan.chips / 3_600,
  }


def as_dict(plan: Plan, steps: int) -> dict[str, Any]:
  """Returns a plan for JSON: seconds, bytes and FLOPs, with units in the names where they are not plain."""
  estimate = plan.estimate._asdict()
  collectives = [
    {"kind": kind, "how": how, "times": times, "bytes": size, "link_seconds": seconds}
    for (kind, how), (times, size, seconds) in estimate.pop("collectives").items()
  ]
  return {
    **plan._asdict(),
    "memory": {**plan.memory._asdict(), "total": plan.memory.total},
    "estimate": {**estimate, "collectives": collectives},
    "run": {"steps": steps, **{name: run_of(plan, name, steps) for name in ESTIMATES}},
  }
