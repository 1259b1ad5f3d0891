"""Stopped at any step and gone on with, on any mesh, a run ends as if nothing had been; another input is refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from data.pipeline import build_stream
from data.sources import texts_of
from data.tasks import Domain
from data.tokenizer import byte_tokenizer, train_tokenizer
from models.sharding import make_mesh
from tests.test_train import ROOT, batches_of, config_of, domain, one_cpu, params_of, run  # noqa: F401  fixtures
from train import loop, stage, upkeep
from train.checkpoint import Checkpoints
from train.log import read_metrics
from train.recipe import load_materials

EVERY = {"train.steps": 7, "train.checkpoint_every_steps": 1, "train.keep_checkpoints": 100}
EVERY["data.batch_size"] = 8  # rows, over 8 devices at most
EVERY["data.mixture"] = {"domain": 0.1, "instructions": 0.9}
ROWS = 25  # of the task, that are no longer than a row


@pytest.fixture(scope="module")
def straight(domain, tmp_path_factory):  # noqa: F811
  """A run of 7 steps with a checkpoint after each: a run that was stopped after any of them starts from a part of it.

  It reads the task's rows more than once, so that it goes over an epoch's edge.
  """
  workdir = tmp_path_factory.mktemp("straight") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    done = run(config_of(domain, **EVERY), workdir)
  return workdir, done


def stopped_after(step: int, straight, folder: Path) -> Path:
  """Returns a copy of the run as it stood after a step, its log one record further."""
  workdir = Path(shutil.copytree(straight[0], folder / "run"))
  for later in upkeep.steps(workdir / "checkpoints"):
    if later > step:
      shutil.rmtree(workdir / "checkpoints" / str(later))
  return workdir


def edge_of(straight) -> int:
  """Returns the step in which the task was read to its end for the first time."""
  with Checkpoints(straight[0]) as reader:
    read = [reader.restore_run(step)["counts"]["instructions"]["examples"] for step in range(1, 8)]
  assert read[0] <= ROWS < read[-1], read
  return next(step for step, count in enumerate(read, 1) if count > ROWS)


@pytest.mark.parametrize("where", ["save step + 1", "epoch edge", "last step"])
def test_resumed_at_any_step_it_is_the_same_run(domain, straight, tmp_path, one_cpu, capsys, where):  # noqa: F811
  edge = edge_of(straight) - 1
  step = {"save step + 1": 5, "epoch edge": edge, "last step": 7}[where]
  workdir = stopped_after(step, straight, tmp_path)
  again = run(config_of(domain, **EVERY), workdir)
  out = capsys.readouterr().out
  assert ("7 of 7 steps are done" in out) == (step == 7) and f"going on from step {step}" in out
  assert all((a == b).all() for a, b in zip(params_of(again), params_of(straight[1]), strict=True))
  assert batches_of(workdir) == batches_of(straight[0]) and len(read_metrics(workdir)) == 7
  assert again.record["counts"] == straight[1].record["counts"]
  for one, other in zip(read_metrics(workdir), read_metrics(straight[0]), strict=True):
    assert all(one[key] == other[key] for key in ("step", "loss", "learning_rate", "gradient_norm"))


@pytest.mark.slow
def test_on_8_devices_then_4_then_8(domain, straight, tmp_path, monkeypatch):  # noqa: F811
  """The batches are the same ones; the sums of gradients are taken in another order, and no more than that differs."""
  workdir = stopped_after(2, straight, tmp_path)
  for devices, steps in ((8, 4), (4, 6), (8, 7)):
    sizes = {"data": -1, "fsdp": 4 if devices == 8 else 2}
    monkeypatch.setattr(loop, "make_mesh", lambda _, n=devices, sizes=sizes: make_mesh(sizes, jax.devices()[:n]))
    seen = []
    write = loop.Log.write

    def until(log, step, *rest, steps=steps, write=write, seen=seen):
      write(log, step, *rest)
      seen.append(step)
      if step == steps and steps < 7:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(loop.Log, "write", until)
      try:
        done = run(config_of(domain, **EVERY), workdir)
      except KeyboardInterrupt:
        assert steps < 7
    assert seen[-1] == steps
  assert batches_of(workdir) == batches_of(straight[0])
  for a, b in zip(params_of(done), params_of(straight[1]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


# What is not the same run.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"seed": 1}, "seed: 0 then, 1 now"),
    ({"data.batch_size": 2}, "data.batch_size: 8 then, 2 now"),
    ({"data.decoder_length": 120}, "data.decoder_length: 128 then, 120 now"),
    ({"data.mixture": {"domain": 0.4, "instructions": 0.6}}, r"data.mixture.domain: 0.1 then, 0.4 now"),
    ({"data.packing": False}, "data.packing: True then, False now"),
    ({"optimizer.learning_rate": 0.5}, "optimizer.learning_rate: .* then, 0.5 now"),
  ],
)
def test_another_setting_is_refused_with_the_difference(domain, straight, one_cpu, changes, message):  # noqa: F811
  with pytest.raises(ValueError, match=message):
    run(config_of(domain, **{**EVERY, **changes}), straight[0])


def test_another_tokenizer_or_file_is_refused_with_the_difference(domain, straight, tmp_path, one_cpu):  # noqa: F811
  config = config_of(domain, **EVERY)
  materials = load_materials(config, tmp_path)
  fingerprint = build_stream(config, materials.tokenizer, materials.domain, None, {}).fingerprint()
  with Checkpoints(straight[0]) as reader:
    then = reader.restore_run(7)["fingerprint"]
  stage.check_same_input(then, fingerprint, straight[0])
  train_tokenizer(["some text of another kind"] * 20, 400, 100).save(str(tmp_path / "tokenizer"))
  with config.unlocked():
    config.tokenizer.path = str(tmp_path / "tokenizer")
  with pytest.raises(ValueError, match=r"tokenizer: .* then, .* now"):
    run(config.lock(), stopped_after(7, straight, tmp_path / "a"))
  other = tmp_path / "ward"
  shutil.copytree(domain, other)
  file = next(other.glob("instructions/train.*"))
  file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))  # one letter
  with pytest.raises(ValueError, match=r"source.instructions: .* then, .* now"):
    run(config_of(other, **EVERY), stopped_after(7, straight, tmp_path / "b"))


def test_a_dataset_without_a_supervised_token_is_refused(tmp_path):
  """Every answer is longer than a row, or there is no text: nothing would be learned."""
  config = config_of(tmp_path, **{"data.mixture": {"domain": 1.0}})
  empty = Domain("d", texts_of([]), texts_of([]), {})
  with pytest.raises(ValueError, match="the text 'domain' has no tokens"):
    build_stream(config, byte_tokenizer(), empty, None, {})


# Killed for real.

CHILD = """
import sys
from pathlib import Path
import jax
from models.sharding import make_mesh
from tests.test_train import config_of, loop, run
loop.make_mesh = lambda sizes: make_mesh(sizes, jax.devices()[:1])
more = {"train.steps": int(sys.argv[3]), "train.checkpoint_every_steps": 1}
run(config_of(Path(sys.argv[1]), **more), sys.argv[2])
"""


@pytest.mark.slow
def test_killed_at_20_random_times_it_is_the_uninterrupted_run(domain, tmp_path, one_cpu):  # noqa: F811
  """A save is in flight most of the time: there is one after each step."""
  steps, kills, dice = 150, 0, random.Random(0)
  more = {"train.steps": steps, "train.checkpoint_every_steps": 1}
  done, workdir = run(config_of(domain, **more), tmp_path / "straight"), tmp_path / "killed"
  command = [sys.executable, "-c", CHILD, str(domain), str(workdir), str(steps)]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  while kills < 20:
    before = max(upkeep.steps(workdir / "checkpoints"), default=0)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 240
    while max(upkeep.steps(workdir / "checkpoints"), default=0) <= before:
      assert process.poll() is None and time.time() < deadline, process.communicate()[0]
      time.sleep(0.005)
    time.sleep(dice.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kills += 1
  assert max(upkeep.steps(workdir / "checkpoints")) < steps
  again = run(config_of(domain, **more), workdir)
  assert all((a == b).all() for a, b in zip(params_of(again), params_of(done), strict=True))
  assert batches_of(workdir) == batches_of(tmp_path / "straight")
  assert not list((workdir / "checkpoints").glob("*.damaged"))  # a kill leaves no half step behind
  assert not list((workdir / "checkpoints").glob("*tmp*"))
  assert json.dumps(again.record["counts"]) == json.dumps(done.record["counts"])
