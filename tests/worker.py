"""A process of a job on loopback, for tests: `python -m tests.worker COUNT RANK PORT DOMAIN WORKDIR SETTINGS FAULT`.

FAULT is "" or KIND:BATCH:RANK: what happens where that process makes that batch, counted from 1.
"""

import json
import os
import sys
import time
from pathlib import Path

import jax

SLOW_STEP = 0.05  # seconds, so that a test can act between two steps


def main(count: int, rank: int, port: str, domain: str, workdir: str, more: dict, fault: str) -> None:
  """Trains as `argot train` does, with a fault at its place."""
  if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, rank, heartbeat_timeout_seconds=60)
  from scripts import __main__ as argot
  from tests.test_train import config_of, loop, run

  config = config_of(Path(domain), **more)
  with config.unlocked():
    config.mesh.data = -1
  kind, batch, where = fault.split(":") if fault else ("", "0", "-1")
  seen, checksum = 0, loop.checksum_of

  def make(arrays: dict) -> int:
    nonlocal seen
    seen += 1
    time.sleep(SLOW_STEP)
    if rank == int(where) and seen == int(batch):
      if kind == "raise":
        raise RuntimeError("this loader is broken")
      stall_here() if kind == "stall" else None
    return checksum(arrays)

  loop.checksum_of = make
  argot.VERBS["test"] = lambda arguments: run(config, workdir)
  sys.argv = ["argot", "test"]
  argot.main()


def stall_here() -> None:
  """Never ends, like a file system that does not answer."""
  while True:
    time.sleep(1)


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6], json.loads(sys.argv[6]), sys.argv[7])
