"""Runs a tiny recipe again and again under random faults, and compares each run with the undisturbed one bit for bit.

`python -m scripts.soak --minutes=30 --seed=0`. Faults, at random times from the start of a process on: SIGKILL; SIGTERM
(saves, exit code 75); SIGSTOP followed by SIGCONT; a byte of the newest checkpoint that is flipped after a SIGKILL; a
full disk, where a small one may be mounted. A run is survived if after all of them every stage has the same batches,
losses, answers, and scores of every example. Processes are forked from one that has imported everything, so that faults
come often.
"""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from scripts import flags
from train import exits, upkeep
from train.log import read_metrics

STEPS = {"base": 80, "continued": 120, "multitask": 120}
FAULTS = {  # name -> how often it is drawn, and exit codes of the process that it happens to
  "SIGKILL": (3, (0, -signal.SIGKILL)),
  "SIGTERM": (1, (0, exits.EXIT_STOPPED, -signal.SIGTERM)),  # the last: before the handler is there
  "SIGSTOP": (1, (0,)),
  "flipped byte": (2, (0, -signal.SIGKILL)),
  "full disk": (2, (0, 1)),
}
DISK = "48m"  # of the small disk; a run takes 5 MB of it


def settings() -> dict[str, object]:
  """Returns what differs from configs/base.py."""
  return {
    "tokenizer.path": "bytes",
    "data.objective": "next_token",
    "data.batch_size": 4,
    "data.decoder_length": 240,
    "data.overlong": "skip",
    "train.checkpoint_every_steps": 10,
    "train.log_every_steps": 1,
    "optimizer.warmup_steps": 5,
    "evaluate.max_examples": 8,
    "evaluate.max_new_tokens": 16,
    "evaluate.corpus_tokens": 1000,
    "arms.only": "none",
    "arms.without_continued": False,
    "cpu_devices": 1,
  }


def run_once(workdir: Path, cache: Path) -> None:
  """Runs the recipe in this process, as `argot recipe` does."""
  os.environ["ARGOT_CACHE"] = str(cache)
  output = os.open(said(workdir), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(output, 1), os.dup2(output, 2)
  from configs import base
  from train.recipe import run_recipe

  config = base.get_config()
  with config.unlocked():
    config.update_from_flattened_dict(settings())
    config.model.overrides.update({"layers": 1, "embed_dim": 32})
    for name, steps in STEPS.items():
      config.stages[name].train = {"steps": steps}
    config.stages.multitask.data.mixture = {"tasks": 0.9, "domain": 0.1}
  try:
    run_recipe(config, workdir)
  except exits.Stopped as stopped:
    print(stopped, flush=True)
    os._exit(stopped.code)
  os._exit(0)


def said(workdir: Path) -> Path:
  """Returns the file of what a run prints, on another disk than the run's."""
  return workdir.parent.parent / f"{workdir.name}.txt"


def outcome(workdir: Path) -> dict[str, dict]:
  """Returns each stage's batches and losses, what was measured of it, and the scores of every example, in bytes."""
  found = {}
  for name in STEPS:
    folder = workdir / "stages" / name
    steps = [(record["step"], record["batch"], record["loss"]) for record in read_metrics(folder)]
    measured = json.loads((folder / "evaluation.json").read_text())
    with np.load(folder / "scores.npz") as scores:
      parts = {skill: scores[skill].tobytes() for skill in scores}
    found |= {f"{name}, batches and losses": dict(enumerate(steps)), f"{name}, scores": parts}
    found |= {f"{name}, {what}": measured[what] for what in ("skills", "samples")}
  return found


def difference(expected: dict[str, dict], found: dict[str, dict]) -> str:
  """Says what the first thing is in which two outcomes differ; nothing where they are the same."""
  for what, right in expected.items():
    for key in [*right, *found[what]]:
      if right.get(key) != found[what].get(key):
        return f"{what}, {key}: expected {right.get(key)!r:.200}, got {found[what].get(key)!r:.200}"
  return ""


def small_disk(folder: Path) -> bool:
  """Mounts a small file system on a folder; returns whether it may."""
  command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
  return subprocess.run(command, capture_output=True, check=False).returncode == 0


def fill(file: Path) -> None:
  """Writes a file until its disk is full."""
  try:
    with file.open("wb", buffering=0) as filler:
      while True:
        filler.write(b"x" * 2**12)
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise


def flip(workdir: Path, rng: random.Random) -> bool:
  """Flips a bit of the newest of several checkpoints of the stage that is under way; returns whether there are several.

  A stage that is done is not touched: without its last step there is nothing that the next one could start from.
  """
  under_way = [name for name in STEPS if not (workdir / "stages" / name / "evaluation.json").exists()]
  steps = upkeep.steps(workdir / "stages" / under_way[0] / "checkpoints") if under_way else []
  if len(steps) < 2:
    return False
  newest = workdir / "stages" / under_way[0] / "checkpoints" / str(max(steps))
  file = rng.choice([file for file in sorted(newest.rglob("*")) if file.is_file() and file.stat().st_size])
  content = bytearray(file.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  file.write_bytes(content)
  return True


def strike(fault: str, process: multiprocessing.Process, workdir: Path, rng: random.Random) -> bool:
  """Does a fault to a running process and waits for its end; returns whether the fault could be done."""
  filler, did = workdir.parent / "filler", True
  if fault == "full disk":
    fill(filler)
  else:
    os.kill(process.pid, getattr(signal, fault, signal.SIGKILL))
  if fault == "SIGSTOP":
    time.sleep(rng.uniform(0.0, 1.0))
    os.kill(process.pid, signal.SIGCONT)
  process.join()
  filler.unlink(missing_ok=True)
  if fault == "flipped byte" and process.exitcode:
    did = flip(workdir, rng)
  return did


def disturbed(
  workdir: Path, cache: Path, rng: random.Random, longest: float, faults: dict[str, int], done: Counter
) -> None:
  """Runs to the end, with a fault in each process until the last one, which is too quick for it.

  Args:
    workdir: of the run.
    cache: of tokenised text and programs.
    rng: draws faults and times.
    longest: seconds that the undisturbed run takes; a fault comes after a quarter of it, on average.
    faults: how often each is drawn.
    done: counts them.
  """
  while True:
    process = multiprocessing.get_context("fork").Process(target=run_once, args=(workdir, cache))
    process.start()
    process.join(rng.expovariate(4 / longest))
    (fault,) = rng.choices(list(faults), list(faults.values()))
    struck = process.exitcode is None
    if struck and strike(fault, process, workdir, rng):
      done[fault] += 1
    if process.exitcode not in (FAULTS[fault][1] if struck else (0,)):
      sys.exit(f"soak: after {fault} exit code {process.exitcode}; see {said(workdir)}")
    if process.exitcode == 0:
      return


def main(arguments: list[str]) -> None:
  """Runs the soak."""
  values = flags.new()
  flags.integer(values, "minutes", 30, "it begins no new run after them")
  flags.integer(values, "seed", 0, "of faults and times")
  values = flags.parse(values, "soak", __doc__, arguments, [])
  import train.loop
  import train.recipe  # noqa: F401  imported once, before processes are forked

  folder = Path(tempfile.mkdtemp(prefix="soak-"))
  disk = folder / "disk"
  disk.mkdir()
  small = small_disk(disk)
  if not small:
    print("a small disk may not be mounted here: no full disk is among the faults", flush=True)
  faults = {name: often for name, (often, _) in FAULTS.items() if small or name != "full disk"}
  soak(disk, folder / "cache", random.Random(values.seed), 60 * values.minutes, faults)
  if small:  # after a failure it stays, for a look at what was lost
    subprocess.run(["umount", str(disk)], check=True)
  shutil.rmtree(folder)


def soak(disk: Path, cache: Path, rng: random.Random, seconds: float, faults: dict[str, int]) -> None:
  """Runs undisturbed, then again and again under faults, for some time."""
  straight, done, survived = disk / "straight", Counter(), 0
  for _ in range(2):  # the second time with compiled programs at hand, for its duration
    shutil.rmtree(straight, ignore_errors=True)
    straight.mkdir()
    start = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=run_once, args=(straight, cache))
    process.start()
    process.join()
    if process.exitcode:
      sys.exit(f"soak: the undisturbed run failed; see {said(straight)}")
  longest, expected, began = time.monotonic() - start, outcome(straight), time.monotonic()
  print(f"the undisturbed run: {longest:.1f} s, {sum(STEPS.values())} steps", flush=True)
  while time.monotonic() - began < seconds:
    workdir = disk / f"run{survived}"
    workdir.mkdir()
    disturbed(workdir, cache, rng, longest, faults, done)
    if lost := difference(expected, outcome(workdir)):
      sys.exit(f"soak: {workdir} is not the undisturbed run in {straight}, after {dict(done)}: {lost}")
    survived += 1
    shutil.rmtree(workdir)
    struck = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    print(f"{survived} runs survived {done.total()} faults: {struck}", flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
