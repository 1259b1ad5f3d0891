"""The steps in a `checkpoints` folder: which are whole, who may write, and what a user does with them by hand.

Knows files only, no arrays; `train/checkpoint.py` reads and writes those.
"""

import datetime
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import filelock

from train import manifest

LOCK, HOLDER = "lock", "running.json"
ASIDE = ".damaged"  # ends the name of a step's folder that was set aside
MEASURED = ("evaluation.json", "calibration.json", "scores.npz")  # of the last step; wrong after a rollback


class Step(NamedTuple):
  """A step's folder.

  Attributes:
    number: steps done.
    folder: where.
    size: bytes.
    created: when, in seconds since 1970.
    problem: in words; "" = none.
  """

  number: int
  folder: Path
  size: int
  created: float
  problem: str


def steps(folder: Path) -> list[int]:
  """Returns the steps that have a folder, oldest first; a save that was cut short has none."""
  if not folder.is_dir():
    return []
  return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir())


@contextmanager
def lock(folder: Path) -> Iterator[None]:
  """Keeps a folder for this process; the system takes the lock back when the process ends, however it ends.

  Raises:
    ValueError: another process has it.
  """
  folder.mkdir(parents=True, exist_ok=True)
  held, holder = filelock.FileLock(folder / LOCK, timeout=0, thread_local=False), folder / HOLDER
  try:
    held.acquire()
  except filelock.Timeout:
    about = holder.read_text(encoding="utf-8").strip() if holder.exists() else "unknown"
    raise ValueError(
      f"another run writes to {folder} ({about}); wait for it, stop it, or take another --workdir"
    ) from None
  try:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    holder.write_text(json.dumps(about) + "\n", encoding="utf-8")
    yield
  finally:
    holder.unlink(missing_ok=True)
    held.release()


def newest_whole(folder: Path, known: set[int] = frozenset()) -> tuple[int | None, dict[int, str]]:
  """Finds the newest step whose files are those that were written.

  Args:
    folder: of the steps.
    known: steps that were looked at before, and were whole.

  Returns:
    The step, None where the folder has none; and what is wrong with each newer one.

  Raises:
    ValueError: there are steps, and none is whole; or a newer Argot wrote the newest.
  """
  damaged: dict[int, str] = {}
  for step in reversed(steps(folder)):
    wrong = "" if step in known else manifest.problem(folder / str(step))
    if not wrong:
      return step, damaged
    damaged[step] = wrong
  if damaged:
    lines = "\n  ".join(f"step {step}: {wrong}" for step, wrong in damaged.items())
    raise ValueError(
      f"no checkpoint in {folder} is whole:\n  {lines}\n"
      "Put them back from a copy, or delete that folder to start the stage from its beginning."
    )
  return None, damaged


def set_aside(folder: Path, step: int) -> None:
  """Renames a step's folder, so that it counts no longer and can still be looked at."""
  target = folder / f"{step}{ASIDE}"
  shutil.rmtree(target, ignore_errors=True)
  os.replace(folder / str(step), target)


def folders_of(path: Path) -> list[Path]:
  """Returns the `checkpoints` folders of a stage, or of every stage of a recipe's workdir.

  Raises:
    FileNotFoundError: there is none.
  """
  found = [path / "checkpoints"] if (path / "checkpoints").is_dir() else sorted(path.glob("stages/*/checkpoints"))
  if not found:
    raise FileNotFoundError(f"no checkpoints in {path}: expected checkpoints/ or stages/NAME/checkpoints/")
  return found


def look(folder: Path, whole: bool, strict: bool = False) -> list[Step]:
  """Describes every step of a folder, and what was set aside.

  Args:
    folder: of the steps.
    whole: reads every byte.
    strict: raises at a step of which it cannot be said whether it is whole.
  """
  found = []
  for step in steps(folder):
    try:
      wrong = (manifest.damage if strict else manifest.problem)(folder / str(step), whole)
    except manifest.NewerFormat as error:
      if strict:
        raise
      wrong = str(error)
    found.append(_described(step, folder / str(step), wrong))
  for entry in sorted(folder.glob(f"*{ASIDE}")):
    name = entry.name.removesuffix(ASIDE)
    if name.isdecimal():
      found.append(_described(int(name), entry, "set aside: it was damaged"))
  return found


def _described(step: int, folder: Path, wrong: str) -> Step:
  size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
  return Step(step, folder, size, folder.stat().st_mtime, wrong)


def best_of(folder: Path, found: Sequence[Step] | None = None) -> int | None:
  """Returns the best step that the newest whole one's record names, see train/validation.py; None: it names none.

  Args:
    folder: of the steps.
    found: what `look` found there, so that no file is read twice; None: it is looked for.
  """
  try:
    newest = newest_whole(folder)[0] if found is None else [step.number for step in found if not step.problem][-1]
    record = json.loads((folder / str(newest) / "run" / "metadata").read_text(encoding="utf-8"))
    return int(record["best"]["step"])
  except (OSError, ValueError, LookupError, TypeError):
    return None


def prune(folder: Path, keep: int) -> list[Path]:
  """Deletes all but the newest `keep` whole steps and the best one; damaged ones, too.

  What only cannot be read, or was written by a newer Argot, is not damaged: then nothing is deleted.

  Returns:
    The folders that were deleted.

  Raises:
    ValueError: `keep` is below 1, no step is whole, a newer Argot wrote one, or a run writes to the folder.
    OSError: a step cannot be read.
  """
  if keep < 1:
    raise ValueError(f"--prune={keep}: keep at least 1 checkpoint")
  with lock(folder):
    found = look(folder, whole=True, strict=True)
    whole = [step.folder for step in found if not step.problem]
    if not whole:
      raise ValueError(f"no checkpoint in {folder} is whole; nothing was deleted")
    kept = [*whole[-keep:], folder / str(best_of(folder, found))]
    gone = [step.folder for step in found if step.folder not in kept or step.problem]
    for path in gone:
      shutil.rmtree(path)
  return gone


def rollback(folder: Path, step: int) -> list[Path]:
  """Deletes every newer step, and what was measured of the last one; the next run goes on from `step`.

  Returns:
    What was deleted.

  Raises:
    ValueError: there is no such step, it is damaged, or a run writes to the folder.
  """
  with lock(folder):
    if step not in steps(folder):
      raise ValueError(f"{folder} has no step {step}; it has {steps(folder)}")
    if wrong := manifest.problem(folder / str(step)):
      raise ValueError(f"step {step} in {folder} is damaged ({wrong}); nothing was deleted")
    gone = [found.folder for found in look(folder, whole=False) if found.number > step]
    gone += [folder.parent / name for name in MEASURED if (folder.parent / name).exists()]
    for path in reversed(gone):  # the newest step last: a rollback that is cut short can be repeated
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  return gone
