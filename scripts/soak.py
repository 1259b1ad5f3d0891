"""Trains a tiny model again and again under random faults, and compares each run with the undisturbed one bit for bit.

`python -m scripts.soak --minutes=30 --seed=0`. Faults, at random times from the start of a process on: SIGKILL; SIGTERM
(saves, exit code 75); SIGSTOP followed by SIGCONT; a byte of the newest checkpoint that is flipped after a SIGKILL; a
full disk, where a small one may be mounted. A run is survived if after all of them it has the same batches, losses and
final parameters. Processes are forked from one that has imported everything, so that faults come often.
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
import zlib
from collections import Counter
from pathlib import Path

from scripts import flags
from train import upkeep
from train.exits import EXIT_STOPPED

STEPS, EVERY = 300, 10
FAULTS = {  # name -> how often it is drawn, and exit codes of the process that it happens to
  "SIGKILL": (3, (0, -signal.SIGKILL)),
  "SIGTERM": (1, (0, EXIT_STOPPED, -signal.SIGTERM)),  # the last: before the handler is there
  "SIGSTOP": (1, (0,)),
  "flipped byte": (2, (0, -signal.SIGKILL)),
  "full disk": (2, (0, 1)),
}
DISK = "48m"  # of the small disk; a run takes 3 MB of it


def settings() -> dict[str, object]:
  """Returns what differs from configs/pretrain.py:gpt."""
  return {
    "general": "",
    "tokenizer.path": "bytes",
    "train.steps": STEPS,
    "train.checkpoint_every_steps": EVERY,
    "train.log_every_steps": 1,
    "data.batch_size": 4,
    "data.decoder_length": 128,
    "optimizer.warmup_steps": 5,
    "cpu_devices": 1,
  }


def train_once(workdir: Path, cache: Path) -> None:
  """Runs the training in this process, as `argot train` does, and leaves a checksum of its parameters."""
  os.environ["ARGOT_CACHE"] = str(cache)
  output = os.open(said(workdir), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(output, 1), os.dup2(output, 2)
  import jax
  import numpy as np

  from configs import pretrain
  from train import exits, loop
  from train.recipe import load_materials, prepare_jax

  config = pretrain.get_config("gpt-tiny")
  with config.unlocked():
    config.update_from_flattened_dict(settings())
    config.model.overrides.update({"layers": 1, "embed_dim": 32})
    config.data.mixture = {"domain": 0.5, "tasks": 0.5}
  prepare_jax(config)
  try:
    run = loop.train(config, workdir, load_materials(config, workdir), "soak")
  except exits.Stopped as stopped:
    print(stopped, flush=True)
    os._exit(stopped.code)
  leaves = jax.tree.leaves(jax.device_get(run.params))
  (workdir / "checksum").write_text(f"{zlib.crc32(b''.join(np.asarray(leaf).tobytes() for leaf in leaves)):08x}")
  os._exit(0)


def said(workdir: Path) -> Path:
  """Returns the file of what a run prints, on another disk than the run's."""
  return workdir.parent.parent / f"{workdir.name}.txt"


def outcome(workdir: Path) -> tuple[str, list]:
  """Returns a finished run's checksum, and batch and loss of each step."""
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return (workdir / "checksum").read_text(), [[r["step"], r["batch"], r["loss"]] for r in records]


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
  """Flips a bit of the newest of several checkpoints; returns whether there are several."""
  steps = upkeep.steps(workdir / "checkpoints")
  if len(steps) < 2:
    return False
  files = [file for file in sorted((workdir / "checkpoints" / str(max(steps))).rglob("*")) if file.is_file()]
  file = rng.choice([file for file in files if file.stat().st_size])
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
    process = multiprocessing.get_context("fork").Process(target=train_once, args=(workdir, cache))
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
  try:
    soak(disk, folder / "cache", random.Random(values.seed), 60 * values.minutes, faults)
  finally:
    if small:
      subprocess.run(["umount", str(disk)], check=True)
  shutil.rmtree(folder)


def soak(disk: Path, cache: Path, rng: random.Random, seconds: float, faults: dict[str, int]) -> None:
  """Runs undisturbed, then again and again under faults, for some time."""
  straight, done, survived = disk / "straight", Counter(), 0
  for _ in range(2):  # the second time with compiled programs at hand, for its duration
    shutil.rmtree(straight, ignore_errors=True)
    straight.mkdir()
    start = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=train_once, args=(straight, cache))
    process.start()
    process.join()
    if process.exitcode:
      sys.exit(f"soak: the undisturbed run failed; see {said(straight)}")
  longest, expected, began = time.monotonic() - start, outcome(straight), time.monotonic()
  print(f"the undisturbed run: {longest:.1f} s, {STEPS} steps", flush=True)
  while time.monotonic() - began < seconds:
    workdir = disk / f"run{survived}"
    workdir.mkdir()
    disturbed(workdir, cache, rng, longest, faults, done)
    if outcome(workdir) != expected:
      sys.exit(f"soak: {workdir} is not the undisturbed run in {straight}, after {dict(done)}")
    survived += 1
    shutil.rmtree(workdir)
    struck = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    print(f"{survived} runs survived {done.total()} faults: {struck}", flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
