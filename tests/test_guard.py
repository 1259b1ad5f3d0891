"""A run told to stop saves and goes on later, bit for bit; one that is stuck ends, with stacks."""

import os
import signal
import sys
import threading
import time

import pytest

from scripts import __main__ as argot
from tests.test_train import batches_of, config_of, domain, loop, one_cpu, params_of, run  # noqa: F401  fixtures
from train import guard
from train.checkpoint import Checkpoints
from train.exits import EXIT_STOPPED, EXIT_STUCK, Stopped
from train.guard import SLOW, Notice, Watchdog


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_the_run_goes_on_bit_for_bit(domain, tmp_path, one_cpu, monkeypatch, number):  # noqa: F811
  config = config_of(domain, **{"train.steps": 14, "train.checkpoint_every_steps": 100})
  straight, checksum, seen = run(config, tmp_path / "straight"), loop.checksum_of, []

  def then_signal(batch):
    seen.append(1)
    if len(seen) == 7:
      os.kill(os.getpid(), number)
    return checksum(batch)

  before = [signal.getsignal(which) for which in guard.SIGNALS]
  with monkeypatch.context() as patch:
    patch.setattr(loop, "checksum_of", then_signal)
    with pytest.raises(Stopped, match=f"stopped by {number.name} after step") as stopped:
      run(config, tmp_path / "run")
  assert stopped.value.code == EXIT_STOPPED and [signal.getsignal(which) for which in guard.SIGNALS] == before
  with Checkpoints(tmp_path / "run") as checkpoints:
    reached = checkpoints.latest()
  assert 0 < reached < 14 and f"step {reached}, which is saved" in str(stopped.value)
  resumed = run(config, tmp_path / "run")
  assert all((a == b).all() for a, b in zip(params_of(straight), params_of(resumed), strict=True))
  assert batches_of(tmp_path / "run") == batches_of(tmp_path / "straight")


def test_ctrl_c_twice_ends_at_once(monkeypatch, capfd):
  codes = []
  monkeypatch.setattr(guard.os, "_exit", codes.append)
  with Notice() as notice:
    signal.raise_signal(signal.SIGINT)
    assert notice.reached() == "SIGINT" and not codes
    signal.raise_signal(signal.SIGINT)
  assert codes == [130] and "stopped at once" in capfd.readouterr().err


def test_repeated_sigterm_is_one(monkeypatch):
  monkeypatch.setattr(guard.os, "_exit", lambda code: pytest.fail("ended"))
  with Notice() as notice:
    for _ in range(3):
      signal.raise_signal(signal.SIGTERM)
    assert notice.reached() == "SIGTERM"


def test_the_command_exits_with_the_code(monkeypatch, capsys):
  def stop(arguments):
    raise Stopped("stopped by SIGTERM after step 3")

  monkeypatch.setitem(argot.VERBS, "train", stop)
  monkeypatch.setattr(sys, "argv", ["argot", "train"])
  with pytest.raises(SystemExit) as ended:
    argot.main()
  assert ended.value.code == EXIT_STOPPED and "argot train: stopped by SIGTERM" in capsys.readouterr().err


def stuck_here(until: threading.Event) -> None:
  until.wait(30)


def test_a_step_that_takes_too_long_ends_the_process_with_stacks(capfd):
  until, codes = threading.Event(), []

  def end(code):
    codes.append(code)
    until.set()

  with Watchdog(0.2, end) as watchdog:
    watchdog.step(7)
    began = time.monotonic()
    stuck_here(until)
  assert codes == [EXIT_STUCK] and time.monotonic() - began < 5
  errors = capfd.readouterr().err
  assert "step 7 did not end in 0.2 s" in errors and "stuck_here" in errors and "_watch" in errors


def test_the_watchdog_lets_be_what_goes_on():
  codes = []
  with Watchdog(0.5, codes.append) as watchdog:
    watchdog.slow("compiling")
    time.sleep(0.8)  # less than ten times as long
    for number in range(8):
      watchdog.step(number)
      time.sleep(0.1)
  with Watchdog(0.0, codes.append) as watchdog:
    watchdog.step(1)
    time.sleep(0.2)
  assert not codes and SLOW == 10 and not [t for t in threading.enumerate() if t.name == "watchdog"]


def test_an_error_in_a_single_process_stays_an_error():
  with pytest.raises(KeyError), guard.ends_together():
    raise KeyError("x")
