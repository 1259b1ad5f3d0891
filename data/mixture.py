"""The mixture: which component gives the next example, so that each gets the share it was asked to have.

Shares count examples or supervised tokens. Whoever is furthest behind its share is next: no chance is involved, so an
achieved share is off by one example at most, whatever the examples' lengths, and may change from step to step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from data.tasks import RESERVED, Task, read_task_rows

UNITS = ("examples", "tokens")  # what shares count
Share = tuple[float, ...]  # at equal distances from a stage's first step to its last; a single one is constant


class Mixture:
  """Draws from components in their shares; the order within each is shuffled anew every pass.

  Args:
    sizes: examples in a pass over each component.
    shares: of each component; they need not add up to 1.
    seed: of the order.
    steps: batches in the stage, over which shares change.

  Attributes:
    drawn: examples drawn from each component.
    owed: what each is behind its share, in the unit that `next` is told; adds up to 0.
  """

  def __init__(self, sizes: Sequence[int], shares: Sequence[Share], seed: int, steps: int = 1):
    self._shares, self._steps = [tuple(share) for share in shares], steps
    self._constant = all(len(share) == 1 for share in self._shares)
    self._at(np.arange(1 if self._constant else steps))  # shares that are all 0 somewhere are refused now
    self._now = self.shares(0)
    self._orders = [_order(size, (seed + 7919 * i) % 2**32) for i, size in enumerate(sizes)]
    self.drawn, self.owed, self._due = [0] * len(sizes), np.zeros(len(sizes)), np.zeros(len(sizes))

  def shares(self, step: int) -> np.ndarray:
    """Returns the shares at a step, float64 [components], adding up to 1."""
    return self._at(np.array([step]))[0]

  def asked(self, state: Mapping[str, Any]) -> np.ndarray:
    """Returns the mean shares up to a state, float64 [components], each step's by what was drawn in it.

    Batches of short examples hold more of them: a mean over the steps would be another.
    """
    due = np.array(state.get("due", ()))
    return due / due.sum() if due.any() else self.shares(0)

  def _at(self, steps: np.ndarray) -> np.ndarray:
    if not self._shares:  # of a stage without steps
      return np.zeros((len(steps), 0))
    done = np.minimum(steps / max(self._steps - 1, 1), 1.0)
    at = np.stack([np.interp(done, np.linspace(0, 1, len(share)), share) for share in self._shares], axis=1)
    total = at.sum(axis=1, keepdims=True)
    if not total.all():
      raise ValueError(
        f"the mixture's shares are all 0 at step {steps[total.argmin()]}; give one of them a share there"
      )
    return at / total

  def go_to(self, step: int) -> None:
    """Takes the shares of a step."""
    if not self._constant:
      self._now = self.shares(step)

  def draw(self) -> tuple[int, int]:
    """Returns whose turn it is, and the number of the example in that component's order."""
    chosen = int(np.where(self._now > 0, self.owed + 1e-9 * self._now, -np.inf).argmax())  # at equal debts the larger
    self.drawn[chosen] += 1
    return chosen, self.drawn[chosen] - 1

  def pay(self, chosen: int, amount: float) -> None:
    """Says how much the drawn example was."""
    self._due += amount * self._now
    self.owed += amount * self._now
    self.owed[chosen] -= amount

  def item(self, component: int, number: int) -> int:
    """Returns which of the component's examples is its `number`-th."""
    return int(self._orders[component][number])

  def state(self) -> dict[str, Any]:
    """Returns where it stands, JSON-able and exact."""
    due = {} if self._constant else {"due": self._due.tolist()}
    return {"drawn": list(self.drawn), "owed": self.owed.tolist(), **due}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes to a state."""
    self.drawn, self.owed = list(state["drawn"]), np.array(state["owed"], np.float64)
    self._due = np.array(state.get("due", np.zeros(len(self.drawn))))  # an older version did not store it


def _order(size: int, seed: int) -> grain.MapDataset:
  return grain.MapDataset.range(size).shuffle(seed=seed).repeat(None)


def mixture_shares(config: ConfigDict, tasks: Mapping[str, Task], corpora: Mapping[str, Any]) -> dict[str, Share]:
  """Resolves `config.data.mixture`: "tasks" is split among the tasks that are not named themselves.

  Returns:
    Component name -> share, without those that are always 0, and without general text where there is none.

  Raises:
    ValueError: an unknown name, a bad share, a share of "tasks" that no task gets, or nothing left for a stage's steps.
  """
  mixture, limit, temperature = config.data.mixture.to_dict(), config.data.task_limit, config.data.task_temperature
  if limit < 0 or not 0 < temperature < float("inf"):
    raise ValueError(
      f"config.data.task_limit must be 0 (none) or more, and task_temperature above 0; got {limit} and {temperature}"
    )
  known = {*tasks, *corpora, "tasks"}
  shares: dict[str, Share] = {}
  for name, asked in mixture.items():
    share = _share(name, asked)
    if name in RESERVED and not any(share):
      continue  # a text that is not given may be named so
    if name == "general" and not config.general:
      continue
    if name not in known:
      raise ValueError(f"config.data.mixture names {name!r}; known here: {sorted(known)}")
    if name == "tasks":
      rest = [task for task in tasks if task not in mixture]
      if not rest and any(share):
        have = f"all of {sorted(tasks)} are named themselves" if tasks else "there is no task here"
        raise ValueError(f"config.data.mixture.tasks is {asked!r}, but {have}; leave it out or make it 0")
      sizes = [len(read_task_rows(tasks[task], "train")) for task in rest]
      try:
        rates = [mixing_rate(size, limit, temperature) for size in sizes]
      except OverflowError as error:
        raise ValueError(
          f"config.data.task_temperature is {temperature}: too near 0 for tasks of {max(sizes)} examples (1 shares by "
          "examples, more is more even)"
        ) from error
      shares |= {task: tuple(s * rate / sum(rates) for s in share) for task, rate in zip(rest, rates, strict=True)}
    else:
      shares[name] = share
  shares = {name: share for name, share in shares.items() if any(share)}
  if not shares and config.train.steps:
    without = ' without general text (config.general is "")' if "general" in mixture and not config.general else ""
    raise ValueError(
      f"config.data.mixture {mixture} leaves nothing to train on{without}; known here: {sorted(known)}. Give one a "
      "share (of a recipe's stage: config.stages.STAGE.data.mixture), or train no steps"
    )
  return shares


def _share(name: str, asked: Any) -> Share:
  share = tuple(asked) if isinstance(asked, (list, tuple)) else (asked,)
  numbers = all(isinstance(s, (int, float)) and not isinstance(s, bool) and 0 <= s < float("inf") for s in share)
  if not share or not numbers:
    raise ValueError(
      f"config.data.mixture.{name} must be a share of 0 or more, or a list of them to go through in a stage; "
      f"got {asked!r}"
    )
  return share


def mixing_rate(examples: int, limit: float = 0, temperature: float = 1.0, scale: float = 1.0) -> float:
  """Returns a task's rate: `min(examples · scale, limit)^(1/temperature)`; limit 0 is none.

  Reference:
    Raffel et al. 2020, §3.5.2.

  Example:
    >>> mixing_rate(3, scale=27, temperature=2.0)
    9.0
  """
  size = examples * scale
  return (min(size, limit) if limit else size) ** (1.0 / temperature)
