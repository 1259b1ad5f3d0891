"""What a run knows of the steps that are done: tokens, records for the log, skipped steps, the last good one."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data.pipeline import Stream
from train.anomalies import Anomalies
from train.log import Log
from train.meter import Meter
from train.optimizer import build_schedule

_ALWAYS = ("tokens", "skipped", "loss", "gradient_norm")  # fetched of every step; all else where a step is recorded


class Account:
  """Keeps the account of a run's steps, in their order.

  Args:
    config: the resolved config.
    workdir: the stage's folder.
    stream: the input; its state is that after the record's step.
    record: of the checkpoint that the run goes on from: steps, tokens, seconds so far, skipped steps.
    log: where steps are recorded.
    meter: measures speed.

  Attributes:
    good: the last step that was not skipped: its number, the tokens up to it and the stream's state after it.
    anomalies: the steps that were skipped.
  """

  def __init__(
    self, config: ConfigDict, workdir: Path, stream: Stream, record: Mapping[str, Any], log: Log, meter: Meter
  ):
    self._stream, self._log, self._meter, self._settings = stream, log, meter, config.train
    self._tokens, self._began = record["tokens"], time.monotonic() - record["seconds"]
    self._rates, self._before = learning_rates(config), stream.state()
    self.good = (record["steps"], self._tokens, self._before)
    self.anomalies = Anomalies(workdir, config.train.max_skipped_steps, stream, record.get("skipped"))

  def settle(
    self, number: int, metrics: Mapping[str, Any], batch: Mapping[str, np.ndarray], checksum: int, position: dict
  ) -> None:
    """Waits for a step and records it.

    Args:
      number: of the step.
      metrics: its metrics, on the devices.
      batch: what it was given, whole.
      checksum: of the batch.
      position: the stream's state after the batch.
    """
    recorded = not number % self._settings.log_every_steps or number == self._settings.steps
    recorded |= "task_gradient_share" in metrics
    values = jax.device_get(metrics if recorded else {key: metrics[key] for key in _ALWAYS})
    self._tokens += int(values["tokens"])
    self._meter.count(float(values["tokens"]))
    rate = float(self._rates[number - 1 - self.anomalies.counts["total"]])  # a skipped step leaves the schedule alone
    if not self.anomalies.settle(number, values, batch, self._before):
      self.good = (number, self._tokens, position)
    self._before = position
    if recorded:
      values["skipped"] = self.anomalies.counts["total"]
      extra = {"learning_rate": rate, "batch": f"{checksum:08x}", **self._stream.shares(position)}
      self._log.write(number, readable(values, self._stream.task_names) | extra, self._meter.read(number))

  def record(self, steps: int, position: dict, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of the run after the last settled step, for its checkpoint."""
    return self._record(steps, self._tokens, position, state, self.anomalies.counts)

  def record_of_good(self, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of the run after its last good step, whose parameters `state` still has."""
    counts = self.anomalies.counts
    return self._record(*self.good, state, {"total": counts["total"] - counts["in_a_row"], "in_a_row": 0})

  def _record(
    self, steps: int, tokens: int, position: dict, state: Mapping[str, Any], skipped: Mapping[str, int]
  ) -> dict[str, Any]:
    record = record_of(self._stream, position, steps, tokens, time.monotonic() - self._began)
    if skipped["total"]:
      record["skipped"] = dict(skipped)
    if "norms" in state:
      record["norms"] = np.asarray(jax.device_get(state["norms"]), np.float64).tolist()
    return record


def learning_rates(config: ConfigDict) -> np.ndarray:
  """Returns the learning rate of every step, so that none is asked of the device between steps."""
  schedule = build_schedule(config.optimizer, config.train.steps)
  return np.asarray(jax.jit(jax.vmap(schedule))(np.arange(config.train.steps)))


def record_of(stream: Stream, position: dict, steps: int, tokens: int, seconds: float) -> dict[str, Any]:
  """Returns the record of a run for its checkpoint."""
  input_of = {"fingerprint": stream.fingerprint(), "stream": position, "counts": stream.summary(position)}
  return {"steps": steps, "tokens": tokens, "seconds": seconds, **input_of}


def readable(values: Mapping[str, np.ndarray], task_names: list[str]) -> dict[str, float | dict]:
  """Turns a step's metrics into numbers, with per-task arrays as dicts by task."""
  shown: dict[str, float | dict] = {}
  for key, value in values.items():
    if np.ndim(value):
      weights = values["task_weight"]
      shown[key] = {name: float(value[i]) for i, name in enumerate(task_names) if weights[i] > 0}
    else:
      shown[key] = float(value)
  return shown
