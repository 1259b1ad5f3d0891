"""Trains a tiny model again and again under random faults, and compares each run with the undisturbed one bit for bit.

`python -m scripts.soak --minutes=30 --seed=0`. Faults: SIGKILL, SIGTERM (saves, exit code 75), and SIGSTOP followed by
SIGCONT, at random times from the start of a process on. A run is survived if after all of them it has the same batches,
losses and final parameters. Processes are forked from one that has imported everything, so that faults come often.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

from scripts import flags

STEPS, EVERY = 300, 10
FAULTS = ("SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM", "SIGSTOP")


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
  output = os.open(workdir / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
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


def outcome(workdir: Path) -> tuple[str, list]:
  """Returns a finished run's checksum, and batch and loss of each step."""
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return (workdir / "checksum").read_text(), [[r["step"], r["batch"], r["loss"]] for r in records]


def disturbed(workdir: Path, cache: Path, rng: random.Random, longest: float, done: Counter) -> None:
  """Runs to the end, with a fault in each process until the last one, which is too quick for it.

  Args:
    workdir: of the run.
    cache: of tokenised text and programs.
    rng: draws faults and times.
    longest: seconds from a process' start to its fault, at most.
    done: counts faults.
  """
  while True:
    process = multiprocessing.get_context("fork").Process(target=train_once, args=(workdir, cache))
    process.start()
    process.join(rng.uniform(0.0, longest))
    fault = rng.choice(FAULTS)
    if process.exitcode is None:
      done[fault] += 1
      os.kill(process.pid, getattr(signal, fault))
      if fault == "SIGSTOP":
        time.sleep(rng.uniform(0.0, 1.0))
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    expected = {"SIGKILL": (0, -signal.SIGKILL), "SIGTERM": (0, 75, -signal.SIGTERM), "SIGSTOP": (0,)}[fault]
    if process.exitcode not in expected:
      sys.exit(f"soak: after {fault} exit code {process.exitcode}; see {workdir / 'output.txt'}")
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

  rng, done, survived, began = random.Random(values.seed), Counter(), 0, time.monotonic()
  folder = Path(tempfile.mkdtemp(prefix="soak-"))
  straight, cache = folder / "straight", folder / "cache"
  straight.mkdir()
  for _ in range(2):  # the second time with compiled programs at hand, for its duration
    shutil.rmtree(straight)
    straight.mkdir()
    start = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=train_once, args=(straight, cache))
    process.start()
    process.join()
    if process.exitcode:
      sys.exit(f"soak: the undisturbed run failed; see {straight / 'output.txt'}")
  longest, expected = time.monotonic() - start, outcome(straight)
  print(f"the undisturbed run: {longest:.1f} s, {STEPS} steps", flush=True)
  while time.monotonic() - began < 60 * values.minutes:
    workdir = folder / f"run{survived}"
    workdir.mkdir()
    disturbed(workdir, cache, rng, longest, done)
    if outcome(workdir) != expected:
      sys.exit(f"soak: {workdir} is not the undisturbed run in {straight}, after {dict(done)}")
    survived += 1
    shutil.rmtree(workdir)
    print(
      f"{survived} runs survived; {', '.join(f'{name} {count}' for name, count in sorted(done.items()))}", flush=True
    )
  shutil.rmtree(folder)


if __name__ == "__main__":
  main(sys.argv[1:])
