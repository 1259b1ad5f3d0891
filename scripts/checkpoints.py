"""Lists the checkpoints of a stage, or of every stage of a run: step, size, age, and whether they are whole.

Examples:
  argot checkpoints runs/mine
  argot checkpoints --workdir=runs/mine/stages/base --verify
  argot checkpoints runs/adapted --prune=2
  argot checkpoints runs/adapted --rollback=400
"""

import time
from pathlib import Path

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot checkpoints`."""
  if arguments and not arguments[0].startswith("-"):
    arguments = [f"--workdir={arguments[0]}", *arguments[1:]]
  values = flags.new()
  flags.string(values, "workdir", None, "a stage's folder, or a recipe's workdir; may be given without --workdir=")
  flags.boolean(values, "verify", "read every byte and compare; else names and sizes only")
  flags.integer(values, "prune", None, "keep so many of the newest whole checkpoints; delete the others")
  flags.integer(values, "rollback", None, "delete every checkpoint after this step; the next run goes on from it")
  values = flags.parse(values, "checkpoints", __doc__, arguments, ["workdir"])
  from train import upkeep

  folders = upkeep.folders_of(Path(values.workdir))
  if values.prune is not None and values.rollback is not None:
    raise ValueError("give either --prune or --rollback")
  if values.rollback is not None and len(folders) > 1:
    raise ValueError(f"--rollback is for one stage: give one of {[str(folder.parent) for folder in folders]}")
  damaged = 0
  for folder in folders:
    gone = upkeep.prune(folder, values.prune) if values.prune is not None else []
    gone += upkeep.rollback(folder, values.rollback) if values.rollback is not None else []
    for path in gone:
      print(f"deleted {path}")
    found = upkeep.look(folder, values.verify)
    best = upkeep.best_of(folder, found)
    damaged += sum(bool(step.problem) for step in found)
    print(f"{folder}: {len(found)} checkpoints")
    for step in found:
      state = step.problem or ("verified" if values.verify else "sizes are right")
      state += "; the best" if step.number == best else ""
      age = age_of(time.time() - step.created)
      print(f"  step {step.number:>8,}  {step.size / 1e6:>10,.1f} MB  {age:>9} ago  {state}")
  if values.verify and damaged:
    raise ValueError(f"{damaged} checkpoints are damaged; runs pass over them")


def age_of(seconds: float) -> str:
  """Returns a time in its largest whole unit.

  Example:
    >>> [age_of(seconds) for seconds in (5, 200, 9000, 200_000)]
    ['5 s', '3 min', '2 h', '2 days']
  """
  for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
    if seconds >= size:
      return f"{seconds / size:.0f} {unit}"
  return f"{max(seconds, 0):.0f} s"
