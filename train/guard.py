"""What stands around a run: notice of its end, a watch over its steps, and an end for all processes where one fails."""

import contextlib
import faulthandler
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from train.exits import EXIT_AT_ONCE, EXIT_STUCK, Stopped

SLOW = 10  # what is not a step (compiling, restoring, saving) may take this many times as long
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Never starts anew, not even with a recipe's next stage: processes agree on a number of it.
_asked = itertools.count(1)


class Notice:
  """Notice of a run's end: SIGTERM, or Ctrl-C once, asks to save after a step; Ctrl-C twice ends the process at once.

  Several processes agree on a step through jax's preemption service, whichever of them got the signal. Signals are
  caught in the main thread only, while the context is entered.
  """

  def __init__(self) -> None:
    self._signal: str | None = None
    self._interrupts = 0
    self._before: dict[int, object] = {}
    self._together = jax.process_count() > 1

  def __enter__(self) -> "Notice":
    if threading.current_thread() is threading.main_thread():
      # With several processes jax's own handler has SIGTERM, and passes it on to all of them.
      for number in SIGNALS[1:] if self._together else SIGNALS:
        self._before[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _receive(self, number: int, frame: FrameType | None) -> None:
    self._interrupts += number == signal.SIGINT
    if self._interrupts > 1:
      os.write(2, b"\nstopped at once; the same command goes on from the last checkpoint\n")
      os._exit(EXIT_AT_ONCE)
    if self._together:
      os.kill(os.getpid(), signal.SIGTERM)
    if self._signal is None:
      self._signal = signal.Signals(number).name
      advice = "" if number == signal.SIGTERM else " (again: stops at once, without saving)"
      os.write(2, f"\n{self._signal}: saves after this step and stops{advice}\n".encode())

  def reached(self) -> str | None:
    """Returns what asked to stop after the step that was just dispatched, or None; call it once a step."""
    if not self._together:
      return self._signal
    if multihost_utils.reached_preemption_sync_point(next(_asked)):
      return self._signal or "SIGTERM"
    return None


class Watchdog:
  """Ends the process, with the stacks of all threads, where it makes no step for too long.

  A live but stuck process (a collective that another one never enters, a loader that hangs) would wait for ever. The
  time in which the process itself is stopped (SIGSTOP, a laptop that sleeps) does not count.

  Args:
    seconds: longest time for a step; 0 = no limit.
    end: called with the exit code.
  """

  def __init__(self, seconds: float, end: Callable[[int], None] = os._exit):
    if seconds < 0:
      raise ValueError(f"config.train.watchdog_seconds is {seconds}; expected seconds, or 0 for no limit")
    self._seconds, self._end = seconds, end
    self._doing, self._limit, self._waited = "", 0.0, 0.0
    self._done = threading.Event()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> "Watchdog":
    self.slow("starting")
    if self._seconds:
      self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._done.set()
    if self._thread:
      self._thread.join()

  def step(self, number: int) -> None:
    """Begins the wait for the next step."""
    self._doing, self._limit, self._waited = f"step {number}", self._seconds, 0.0

  def slow(self, doing: str) -> None:
    """Begins the wait for something that takes longer than a step.

    Args:
      doing: its name.
    """
    self._doing, self._limit, self._waited = doing, SLOW * self._seconds, 0.0

  def _watch(self) -> None:
    pause = min(self._seconds / 10, 1.0)
    while not self._done.wait(pause):
      self._waited += pause
      if self._waited > self._limit:
        where = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
        print(
          f"{where}{self._doing} did not end in {self._limit:g} s (config.train.watchdog_seconds); the stacks of all "
          f"threads follow, and this process ends with exit code {EXIT_STUCK}; the same command goes on from the last "
          "checkpoint",
          file=sys.stderr,
          flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        self._end(EXIT_STUCK)
        return


@contextlib.contextmanager
def ends_together() -> Iterator[None]:
  """Ends this process at once where an error would leave the others waiting for it in a collective.

  Works as a decorator, too. A single process, and `Stopped`, which all processes raise, are not touched.
  """
  try:
    yield
  except Stopped:
    raise
  except BaseException:
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
      raise
    traceback.print_exc()
    print(f"process {jax.process_index()} ends here, and the others with it", file=sys.stderr, flush=True)
    sys.stdout.flush()
    time.sleep(0.1)  # for whoever reads the pipes
    os._exit(1)
