"""Runs a command until it is done: starts it again when it was stopped or failed. The command is all that follows --.

It goes by exit codes: 0 ends it; 75 (stopped, saved) starts the command again at once; 65 (unstable), 2 (bad flags), 3
(a rule of the gate is not met) and 130 (Ctrl-C twice) would come again, and end it; anything else, a kill too, starts
it again after a pause that doubles.
Progress is a new checkpoint or evaluation below the command's --workdir; after --attempts failures without any it gives
up with the command's exit code. SIGTERM and Ctrl-C are passed on, and end it after the command.

Examples:
  argot supervise -- argot train --config=configs/pretrain.py:gpt --workdir=runs/adapted
  argot supervise --attempts=5 --pause_seconds=30 -- argot recipe --config=configs/quickstart.py:t5 --workdir=runs/t5
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from scripts import flags
from train.exits import EXIT_AT_ONCE, EXIT_GATE, EXIT_STOPPED, EXIT_UNSTABLE

FINAL = (2, EXIT_GATE, EXIT_UNSTABLE, EXIT_AT_ONCE)  # exit codes; 2 is of bad flags
LONGEST_PAUSE = 600.0  # seconds
TAIL = 12  # lines of the errors' output that are said again at the end


def main(arguments: list[str]) -> None:
  """Runs `argot supervise`."""
  own, command = arguments, []
  if "--" in arguments:
    at = arguments.index("--")
    own, command = arguments[:at], arguments[at + 1 :]
  values = flags.new()
  flags.integer(values, "attempts", 4, "failures without progress after which it gives up")
  flags.integer(values, "pause_seconds", 10, "before the first new start after a failure; then twice as long")
  values = flags.parse(values, "supervise", __doc__, own, [])
  if not command:
    sys.exit("argot supervise: no command; expected: argot supervise -- argot train --config=… --workdir=…")
  sys.exit(supervise(command, values.attempts, values.pause_seconds))


def supervise(command: Sequence[str], attempts: int, pause: float) -> int:
  """Runs a command until it is done or makes no progress.

  Args:
    command: with its arguments; `--workdir=DIR` or `--workdir DIR` among them says where progress shows.
    attempts: failures without progress after which it gives up.
    pause: seconds before the first new start after a failure.

  Returns:
    The last exit code of the command; 128 + signal where one killed it.
  """
  given = [word.split("=", 1) if "=" in word else (word, after) for word, after in pairwise((*command, ""))]
  workdir = next((Path(value) for name, value in given if name == "--workdir"), None)
  if workdir is None:
    say("the command has no --workdir: progress cannot be seen, and every failure counts")
  child, stop, failures, starts, seen = Child(command), threading.Event(), 0, 0, progress(workdir)

  def pass_on(number: int, frame: object) -> None:
    stop.set()
    if number == signal.SIGTERM or not at_terminal():
      child.send(number)

  before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    while True:
      starts += 1
      code = child.run()
      now = progress(workdir)
      failures, seen = (failures + 1 if now <= seen else 1), seen | now
      if code == 0 or stop.is_set():
        say(f"{'done' if code == 0 else 'stopped'} (exit code {code}) after {starts} start{'s' * (starts > 1)}")
        return code
      if code in FINAL or (code != EXIT_STOPPED and failures >= attempts):
        why = "it would end the same way again" if code in FINAL else f"{failures} failures without progress"
        say(f"gives up: exit code {code}; {why}. Its last words:\n" + "".join(child.tail))
        return code
      if code == EXIT_STOPPED:
        failures, wait = 0, 0.0
      else:
        wait = min(pause * 2 ** (failures - 1), LONGEST_PAUSE)
      say(f"exit code {code}; starts again{f' in {wait:g} s' if wait else ''} (failures without progress: {failures})")
      stop.wait(wait)
      if stop.is_set():
        return code
  finally:
    child.send(signal.SIGTERM)
    for number, handler in before.items():
      signal.signal(number, handler)


class Child:
  """The command, started as often as needed; its errors' output is passed on, and its end kept in `tail`."""

  def __init__(self, command: Sequence[str]):
    self._command, self._process, self._sent = list(command), None, 0
    self.tail: deque[str] = deque(maxlen=TAIL)

  def run(self) -> int:
    """Runs it once; returns its exit code."""
    self.tail.clear()
    try:
      self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
      self.tail.append(f"{self._command[0]}: {error}\n")
      return 2
    if self._sent:  # while it was being started
      self.send(self._sent)
    for line in self._process.stderr:
      sys.stderr.write(line)
      sys.stderr.flush()
      self.tail.append(line)
    code = self._process.wait()
    return code if code >= 0 else 128 - code

  def send(self, number: int) -> None:
    """Sends it a signal, if it runs or is being started."""
    self._sent = number
    if self._process is not None and self._process.poll() is None:
      self._process.send_signal(number)


def at_terminal() -> bool:
  """Says whether Ctrl-C comes from a terminal, whose foreground group the command is of, too: it has it already."""
  try:
    return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
  except (OSError, ValueError, AttributeError):  # no terminal, or no input at all
    return False


def progress(workdir: Path | None) -> set[str]:
  """Returns what shows that a run got on: its committed checkpoints, and evaluations."""
  if workdir is None or not workdir.is_dir():
    return set()
  steps = (path for path in workdir.glob("**/checkpoints/*") if path.name.isdigit())
  return {str(path) for path in (*steps, *workdir.glob("**/evaluation.json"))}


def say(text: str) -> None:
  """Prints a line of the supervisor's own."""
  print(f"supervise: {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
