"""Steps that were skipped: counted, their batches written out to be looked at, a run stopped that only skips.

workdir/anomalies/step_N.jsonl   first what happened, then one line for each row of the batch: its examples with where
                                 they came from, their token ids and text
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.pipeline import Stream
from train import stage
from train.exits import EXIT_UNSTABLE, Stopped
from train.moments import on_device
from train.processes import is_first

FILES = 100  # batches that are written out, at most; further ones are counted only


class Anomalies:
  """Counts skipped steps.

  Args:
    workdir: the stage's folder.
    limit: skipped steps in a row that end the run.
    stream: the run's input, to say where examples came from.
    counts: as in `counts`, of the checkpoint.

  Attributes:
    counts: `total` skipped steps, and `in_a_row` up to the last one that was settled.
  """

  def __init__(self, workdir: Path, limit: int, stream: Stream, counts: Mapping[str, int] | None):
    self._workdir, self._limit, self._stream = workdir, limit, stream
    self.counts = {"total": 0, "in_a_row": 0, **(counts or {})}

  def settle(
    self, number: int, values: Mapping[str, Any], batch: Mapping[str, np.ndarray], before: Mapping[str, Any]
  ) -> bool:
    """Takes note of a step that is done.

    Args:
      number: of the step.
      values: its metrics: `skipped`, `loss`, `gradient_norm`.
      batch: what it was given, whole.
      before: the stream's state before that batch.

    Returns:
      Whether it was skipped.
    """
    if not values["skipped"]:
      self.counts["in_a_row"] = 0
      return False
    self.counts = {key: value + 1 for key, value in self.counts.items()}
    found = {key: float(values[key]) for key in ("loss", "gradient_norm")}
    where = self._write(number, found, batch, before) if is_first() else None
    told = f"; its batch is in {where}" if where else ""
    shown = f"loss {found['loss']:.4g}, gradient norm {found['gradient_norm']:.4g}"
    print(f"step {number} is skipped: {shown}, {self.counts['in_a_row']} in a row{told}", flush=True)
    return True

  @property
  def too_many(self) -> bool:
    """Whether the run has to end."""
    return self.counts["in_a_row"] >= self._limit

  def stopped(self, name: str, good: int) -> Stopped:
    """Returns what ends the run, after its last good step."""
    return Stopped(
      f"{name}: {self.counts['in_a_row']} steps in a row after step {good} had a loss or a gradient that is not finite "
      "(or a spike); nothing after the last good step is lost or changed. Bad data, or a learning rate that is too "
      f"high? The batches are in {self._workdir / 'anomalies'}. To pass over them raise config.train.max_skipped_steps",
      EXIT_UNSTABLE,
    )

  def _write(
    self, number: int, found: Mapping[str, float], batch: Mapping[str, np.ndarray], before: Mapping[str, Any]
  ) -> Path | None:
    folder = self._workdir / "anomalies"
    folder.mkdir(exist_ok=True)
    file = folder / f"step_{number}.jsonl"
    if not file.exists() and len(list(folder.iterdir())) >= FILES:
      return None
    shown = {key: value if math.isfinite(value) else str(value) for key, value in found.items()}
    origin, tokenizer = self._stream.origin(before), stage.read_tokenizer(self._workdir)
    lines = [{"step": number, **shown, "stream": before}]
    for row, origins in enumerate(origin):
      examples = [
        {"from": where, **side_by_side(batch, row, segment, tokenizer)} for segment, where in enumerate(origins, 1)
      ]
      lines.append({"row": row, "examples": examples})
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return file


def side_by_side(batch: Mapping[str, np.ndarray], row: int, segment: int, tokenizer: Any) -> dict[str, Any]:
  """Returns an example of a batch: token ids and text of each side, and the loss weights of its targets.

  Args:
    batch: the batch.
    row: its row.
    segment: its number in the row, from 1.
    tokenizer: decodes.
  """
  found: dict[str, Any] = {}
  for side in ("encoder_input", "decoder_input", "decoder_target"):
    key = f"{side}_tokens"
    if key in batch:
      here = batch[f"{side.split('_')[0]}_segment_ids"][row] == segment
      ids = batch[key][row][here].tolist()
      found |= {f"{side}_ids": ids, f"{side}_text": tokenizer.decode(ids)}
      if side == "decoder_target":
        found["weights"] = [round(weight, 6) for weight in batch["decoder_loss_weights"][row][here].tolist()]
  return found


@jax.jit
def _finite(tree: Any) -> jax.Array:
  leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  return jnp.stack([jnp.isfinite(on_device(leaf)).all() for leaf in leaves]).all()


def check_finite(state: Mapping[str, Any], name: str, step: int) -> None:
  """Refuses to save a state that is not finite, such as after an update that was too large.

  Raises:
    Stopped: with the exit code for an unstable run.
  """
  if not bool(_finite({key: state[key] for key in ("params", "opt")})):
    raise Stopped(
      f"{name}: parameters or optimizer state are not finite after step {step}; nothing is saved, and the checkpoint "
      "before it stays. A smaller config.optimizer.learning_rate may help",
      EXIT_UNSTABLE,
    )
