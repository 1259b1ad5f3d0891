"""What a run says: `metrics.jsonl`, `validation.jsonl`, TensorBoard events, a terminal line with rate and time left."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.files import named, put
from train.processes import is_first

SLOW_INPUT = 0.05  # a share of waiting for input from which on the terminal says it


class Log:
  """Writes a stage's metrics; of several processes the first one does.

  Args:
    workdir: the stage's folder.
    name: the stage's name, for the terminal.
    start: steps done before this process; later records of a killed process are dropped, they will be made again.
    steps: steps of the stage.
    evaluated: the last step whose measurement on the validation split counts; later ones are dropped likewise.
  """

  def __init__(self, workdir: str | Path, name: str, start: int, steps: int, evaluated: int = 0):
    self.name, self.steps = name, steps
    self._writes = is_first()
    if not self._writes:
      return
    self._path = Path(workdir) / "metrics.jsonl"
    self._validation = self._path.with_name("validation.jsonl")
    _keep_until(self._path, start)
    _keep_until(self._validation, min(evaluated, start))
    self._file = self._path.open("a")
    # Not at the top: tensorboardX takes PyTorch with it where that is installed, 190 MiB that planning has no use of.
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    self._scalar, self._make_event = summary.scalar, Event
    # Not through SummaryWriter: its thread ends without a word where the disk is full, and then the run waits for ever.
    self._events = event_file_writer.EventsWriter(str(self._path.with_name("events")))
    again = SessionLog(status=SessionLog.START)  # readers drop what an earlier process wrote from this step on
    self._events.write_event(Event(wall_time=time.time(), step=start + 1, session_log=again))

  def write(self, step: int, metrics: Mapping[str, float | str | dict], speed: Mapping[str, float]) -> None:
    """Records a step.

    Args:
      step: steps done.
      metrics: numbers, and dicts of numbers by task; strings go to `metrics.jsonl` only, where a number that is not
        finite is null.
      speed: from `Meter.read`.
    """
    if not self._writes:
      return
    with named(self._path):
      self._file.write(json.dumps(_json_able({"step": step, **metrics, **speed})) + "\n")
      self._file.flush()
    scalars = {}
    for key, value in {**metrics, **speed}.items():
      parts = value.items() if isinstance(value, dict) else ((None, value),)
      scalars |= {f"{key}/{part}" if part else key: number for part, number in parts if not isinstance(number, str)}
    self._event(step, scalars)
    line = f"{self.name}  step {step}/{self.steps}  loss {metrics['loss']:.3f}"
    line += f"  {speed['tokens_per_second']:,.0f} tokens/s  {speed['step_ms']:,.1f} ms"
    line += f"  mfu {speed['mfu']:.3f}" if "mfu" in speed else ""
    line += f"  input {speed['data_wait']:.0%}".replace("%", " %") if speed["data_wait"] > SLOW_INPUT else ""
    print(f"{line}  {time_left((self.steps - step) * speed['step_ms'] / 1e3)}", flush=True)

  def validation(self, step: int, skills: Mapping[str, Mapping[str, Any]], best: int | None) -> None:
    """Records what a step's parameters do on the validation split.

    Args:
      step: steps done.
      skills: task -> `value` and further metrics.
      best: the best step so far, None where none is looked for.
    """
    if not self._writes:
      return
    with named(self._validation), self._validation.open("a") as file:
      file.write(json.dumps(_json_able({"step": step, "skills": skills})) + "\n")
    self._event(step, {f"validation/{name}": found["value"] for name, found in skills.items()})
    shown = "  ".join(f"{name} {found['value']:.3f}" for name, found in skills.items())
    told = "" if best is None else "  (the best so far)" if best == step else f"  (the best: step {best})"
    print(f"{self.name}  step {step}/{self.steps}  validation: {shown}{told}", flush=True)

  def _event(self, step: int, scalars: Mapping[str, float]) -> None:
    for name, value in scalars.items():
      self._events.write_event(self._make_event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))
    self._events.flush()

  def close(self) -> None:
    """Flushes and closes both files."""
    if not self._writes:
      return
    self._file.close()
    self._events.close()


def time_left(seconds: float) -> str:
  """Returns a time to wait as lines on the terminal say it.

  Example:
    >>> time_left(83.9)
    '1:23 left'
  """
  minutes, rest = divmod(int(seconds), 60)
  return f"{minutes}:{rest:02d} left"


def read_metrics(workdir: str | Path) -> list[dict]:
  """Returns the records of a stage's `metrics.jsonl`, oldest first; a line cut by a kill is left out."""
  return _read(Path(workdir) / "metrics.jsonl")


def read_validation(workdir: str | Path) -> list[dict]:
  """Returns the records of a stage's `validation.jsonl`, likewise; see `train/validation.py`."""
  return _read(Path(workdir) / "validation.jsonl")


def _read(path: Path) -> list[dict]:
  records = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return records


def _json_able(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _json_able(part) for key, part in value.items()}
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_until(path: Path, step: int) -> None:
  if path.exists():
    kept = [record for record in _read(path) if record["step"] <= step]
    put(path, "".join(json.dumps(record) + "\n" for record in kept))
