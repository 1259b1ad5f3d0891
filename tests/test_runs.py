"""Runs of real processes under real faults: all of them end in time, with a code that says why, and nothing is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from scripts.supervise import supervise
from tests.test_train import ROOT, batches_of, domain, one_cpu  # noqa: F401  fixtures
from train.checkpoint import Checkpoints
from train.exits import EXIT_STOPPED, EXIT_STUCK
from train.log import read_metrics

STEPS = 24
SETTINGS = {"train.steps": STEPS}
WATCHED = {"train.watchdog_seconds": 6.0}
LIMIT = 300  # seconds for a job of a few steps on a busy machine, start included


class Job:
  """Processes of one training run on loopback, of one device each."""

  def __init__(self, domain: Path, workdir: Path, count: int, fault: str = "", **more):  # noqa: F811
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = str(free.getsockname()[1])
    flags = "--xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    arguments = [port, str(domain), str(workdir), json.dumps(SETTINGS | more), fault]
    self.workdir, self.outputs = workdir, {}
    self.processes = [
      subprocess.Popen(
        [sys.executable, "-m", "tests.worker", str(count), str(rank), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
      )
      for rank in range(count)
    ]

  def __enter__(self) -> "Job":
    return self

  def __exit__(self, *_: object) -> None:
    for process in self.processes:
      process.kill()
    self.ended()

  def reach(self, step: int) -> None:
    """Waits until a step is recorded."""
    deadline = time.time() + LIMIT
    while not any(record["step"] >= step for record in read_metrics(self.workdir)):
      dead = [process for process in self.processes if process.poll() is not None]
      assert not dead and time.time() < deadline, dead and dead[0].communicate()[0][-3000:]
      time.sleep(0.02)

  def ended(self, *ranks: int) -> tuple[list[int], list[str]]:
    """Waits for processes (all by default); returns exit codes and outputs."""
    chosen = ranks or range(len(self.processes))
    for rank in chosen:
      if rank not in self.outputs:
        self.outputs[rank] = self.processes[rank].communicate(timeout=LIMIT)[0]
    return [self.processes[rank].returncode for rank in chosen], [self.outputs[rank] for rank in chosen]


def params_in(workdir: Path) -> list[np.ndarray]:
  """Returns the parameters of the newest checkpoint, read in this process."""
  from train import loop, stage

  with Checkpoints(workdir) as checkpoints:
    config = stage.read_config(workdir)
    mesh = loop.make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
      model = loop.build_model(config, stage.read_tokenizer(workdir))
      params = checkpoints.restore_params(checkpoints.latest(), stage.params_like(model, mesh))
  return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def finish(domain, workdir, count, **more) -> None:  # noqa: F811
  """Runs a job to its end."""
  with Job(domain, workdir, count, **more) as job:
    codes, outputs = job.ended()
  assert codes == [0] * count, outputs[0][-3000:]
  assert len(batches_of(workdir)) == STEPS


@pytest.fixture(scope="module")
def straight(domain, tmp_path_factory):  # noqa: F811
  """Uninterrupted runs by number of processes, made when asked for."""
  made: dict[int, Path] = {}

  def of(count: int) -> Path:
    if count not in made:
      made[count] = tmp_path_factory.mktemp(f"straight{count}")
      finish(domain, made[count], count)
    return made[count]

  return of


def assert_same_run(workdir: Path, expected: Path) -> None:
  """Same batches, same records, same parameters, bit for bit."""
  assert batches_of(workdir) == batches_of(expected)
  losses, wanted = ([record["loss"] for record in read_metrics(folder)] for folder in (workdir, expected))
  assert losses == wanted
  for a, b in zip(params_in(workdir), params_in(expected), strict=True):
    assert (a == b).all()


def test_an_error_in_one_process_ends_the_other(domain, tmp_path):  # noqa: F811
  with Job(domain, tmp_path / "run", 2, "raise:9:1") as job:
    codes, outputs = job.ended()
  assert all(codes) and codes[1] == 1, outputs
  assert "this loader is broken" in outputs[1] and "process 1 ends here" in outputs[1]


@pytest.mark.slow
@pytest.mark.parametrize("where", [0, 1])
def test_a_stalled_loader_ends_all_with_stacks(domain, tmp_path, where, straight):  # noqa: F811
  with Job(domain, tmp_path / "run", 2, f"stall:9:{where}", **WATCHED) as job:
    job.reach(5)
    began = time.time()
    codes, outputs = job.ended()
  assert time.time() - began < 30 and all(codes) and EXIT_STUCK in codes, outputs
  assert any("stall_here" in output for output in outputs) or codes[where] != EXIT_STUCK
  finish(domain, tmp_path / "run", 2)
  assert_same_run(tmp_path / "run", straight(2))


@pytest.mark.slow
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_process_ends_the_other(domain, tmp_path, number, where, straight):  # noqa: F811
  with Job(domain, tmp_path / "run", 2, **WATCHED) as job:
    job.reach(9)
    job.processes[where].send_signal(number)
    began = time.time()
    (code,), (output,) = job.ended(1 - where)
    seconds = time.time() - began
    if number == signal.SIGSTOP:
      assert code == EXIT_STUCK and "did not end in 6 s" in output and "Thread" in output, output[-3000:]
      job.processes[where].send_signal(signal.SIGCONT)  # what was frozen follows when it can run again
    codes, _ = job.ended()
  print(f"{number.name} of process {where}: the other ended with {code} after {seconds:.1f} s")
  assert all(codes) and seconds < 30
  finish(domain, tmp_path / "run", 2)
  assert_same_run(tmp_path / "run", straight(2))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_at_the_same_step(domain, tmp_path, number, straight):  # noqa: F811
  with Job(domain, tmp_path / "run", 2) as job:
    job.reach(9)
    job.processes[1].send_signal(number)
    codes, outputs = job.ended()
  assert codes == [EXIT_STOPPED] * 2, outputs
  reached = Checkpoints(tmp_path / "run").latest()
  assert 9 < reached < STEPS and all(f"after step {reached}, which is saved" in output for output in outputs)
  finish(domain, tmp_path / "run", 2)
  assert_same_run(tmp_path / "run", straight(2))


@pytest.mark.slow
def test_elastic_four_two_one(domain, tmp_path, straight):  # noqa: F811
  workdir = tmp_path / "run"
  for count, at in ((4, 7), (2, 15)):
    with Job(domain, workdir, count) as job:
      job.reach(at)
      for process in job.processes:
        process.kill()
  finish(domain, workdir, 1)
  assert batches_of(workdir) == batches_of(straight(4))
  losses, wanted = ([record["loss"] for record in read_metrics(folder)] for folder in (workdir, straight(4)))
  print("largest difference of a loss:", max(abs(a - b) for a, b in zip(losses, wanted, strict=True)))
  np.testing.assert_allclose(losses, wanted, rtol=1e-4)


@pytest.mark.slow
def test_killed_on_four_processes_it_is_the_uninterrupted_run(domain, tmp_path, straight):  # noqa: F811
  for at in (6, 14):
    with Job(domain, tmp_path / "run", 4) as job:
      job.reach(at)
      job.processes[at % 4].kill()
      assert all(job.ended()[0])
  finish(domain, tmp_path / "run", 4)
  assert_same_run(tmp_path / "run", straight(4))


def test_a_supervisor_starts_again_until_done_or_without_progress(tmp_path, capfd):
  script = tmp_path / "run.sh"

  def command(text: str) -> list[str]:
    script.write_text(f"cd {tmp_path}; touch runs; echo x >> runs; n=$(wc -l < runs)\n{text}\n")
    (tmp_path / "runs").unlink(missing_ok=True)
    return ["bash", str(script), f"--workdir={tmp_path}"]

  assert supervise(command("[ $n = 1 ] && exit 75; [ $n = 2 ] && kill -9 $$; exit 0"), 3, 0.01) == 0
  assert "exit code 137; starts again" in capfd.readouterr().err
  # Five failures, each after a new checkpoint, are not too many; then three without one are.
  assert supervise(command("[ $n -le 5 ] && mkdir -p checkpoints/$n; echo no disk >&2; exit 1"), 3, 0.01) == 1
  assert len((tmp_path / "runs").read_text().split()) == 7
  errors = capfd.readouterr().err
  assert "3 failures without progress" in errors and errors.count("no disk") == 8  # said again at the end
  for code in (2, 3, 65, 130):
    assert supervise(command(f"exit {code}"), 3, 0.01) == code
    assert len((tmp_path / "runs").read_text().split()) == 1


def test_a_supervisor_passes_sigterm_on_and_ends(tmp_path):
  body = "trap 'kill $p; exit 75' TERM; sleep 60 & p=$!; touch up; wait $p"  # up once there is what to kill
  command = [sys.executable, "-m", "scripts", "supervise", "--", "bash", "-c", f"cd {tmp_path}; {body}"]
  process = subprocess.Popen(command, cwd=ROOT)
  deadline = time.time() + 60
  while not (tmp_path / "up").exists():
    assert process.poll() is None and time.time() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  assert process.wait(30) == EXIT_STOPPED


def test_a_supervisor_that_is_stopped_as_it_starts_the_command_stops_it(monkeypatch):
  started = subprocess.Popen

  def start(*arguments, **settings):
    child = started(*arguments, **settings)
    os.kill(os.getpid(), signal.SIGTERM)  # there is a child, and the supervisor does not know it yet
    return child

  monkeypatch.setattr(subprocess, "Popen", start)
  began = time.monotonic()
  assert supervise(["sleep", "30"], 3, 0.01) == 128 + signal.SIGTERM
  assert time.monotonic() - began < 20
