"""Which stages and comparison arms a recipe has, and the config of each.

The main line is base, continued, multitask. Beside it, by `config.arms`:

only_TASK                    multitask's settings, on one task alone
multitask_without_continued  multitask straight from base
replay_SHARE                 multitask again, with that share of texts beside its tasks
averaged_SHARE               no training: the parameters between an earlier stage's (0) and multitask's (1)
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from data.components import held_out_objective
from data.tasks import Domain
from train.stage import MAIN_LINE as NEWEST_FIRST
from train.stage import flat

MAIN_LINE = NEWEST_FIRST[::-1]


class Stage(NamedTuple):
  """One training run of the recipe, or an average of two of them.

  Attributes:
    name: as in the report.
    init_from: the stage it starts from; "" is scratch (or `config.init_from`).
    like: the main stage whose settings it takes.
    mixture: instead of that stage's, or None.
    steps: instead of that stage's; 0 = the same.
    sweep: what it is a point of, "replay" or "averaging"; "" = of nothing.
    share: where in the sweep it lies.
    average_with: an average is not trained: `share` of `init_from`'s parameters, the rest of this stage's.
    unmeasured: its one task has no validation split, so that none of its steps is known to be the best.
  """

  name: str
  init_from: str
  like: str
  mixture: Mapping[str, float] | None = None
  steps: int = 0
  sweep: str = ""
  share: float = 0.0
  average_with: str = ""
  unmeasured: bool = False


def plan_stages(config: ConfigDict, domain: Domain) -> list[Stage]:
  """Lists the stages and arms in the order they run.

  Raises:
    ValueError: an arm that cannot be, or `config.stages` has other names than the stages of the main line.
  """
  base, continued, multitask = MAIN_LINE
  if unknown := sorted(set(config.stages) - set(MAIN_LINE)):
    raise ValueError(f"config.stages has {unknown}; expected {list(MAIN_LINE)} (an arm has multitask's settings)")
  stages = [Stage(base, "", base), Stage(continued, base, continued), Stage(multitask, continued, multitask)]
  stages += [
    Stage(
      f"only_{task}",
      continued,
      multitask,
      {task: 1.0},
      config.arms.only_steps,
      unmeasured="validation" not in domain.tasks[task].files,
    )
    for task in lone_tasks(config, domain)
  ]
  if config.arms.without_continued:
    stages.append(Stage("multitask_without_continued", base, multitask))
  for share in shares(config.arms.replay, "replay", 0.0):
    mixture = replay_mixture(config, domain, share)
    stages.append(Stage(f"replay_{share:g}", continued, multitask, mixture, sweep="replay", share=share))
  if config.arms.averaging and config.arms.averaging_with not in (base, continued):
    asked = config.arms.averaging_with
    raise ValueError(f"config.arms.averaging_with is {asked!r}; expected {base!r} or {continued!r}")
  for share in shares(config.arms.averaging, "averaging", None):
    other = {"sweep": "averaging", "share": share, "average_with": config.arms.averaging_with}
    stages.append(Stage(f"averaged_{share:g}", multitask, multitask, **other))
  return stages


def lone_tasks(config: ConfigDict, domain: Domain) -> list[str]:
  """Returns the tasks that get an arm of their own: `config.arms.only`.

  Raises:
    ValueError: an unknown name.
  """
  asked, tasks = config.arms.only, list(domain.tasks)
  if asked in ("all", "none"):
    return tasks if asked == "all" else []
  if asked == "one_of_each":
    kinds = {domain.tasks[name].kind: name for name in reversed(tasks)}
    return [name for name in tasks if name in kinds.values()]
  chosen = [name for name in asked.split(",") if name]
  if unknown := set(chosen) - set(tasks):
    raise ValueError(f"config.arms.only names {sorted(unknown)}; tasks are {tasks}, or 'all', 'none', 'one_of_each'")
  return chosen


def shares(asked: Any, name: str, lowest: float | None) -> list[float]:
  """Returns the shares of a sweep.

  Args:
    asked: `config.arms.replay` or `.averaging`.
    name: which of them, for the error.
    lowest: the least share that may be; None: it must be above 0.

  Raises:
    ValueError: a share out of range, or one that comes twice.
  """
  found = list(asked)
  fits = [
    isinstance(share, (int, float))
    and not isinstance(share, bool)
    and (share > 0 if lowest is None else share >= lowest)
    and share < 1
    for share in found
  ]
  if not all(fits) or len({f"{share:g}" for share in found}) < len(found):
    least = "above 0" if lowest is None else f"from {lowest:g}"
    raise ValueError(f"config.arms.{name} must be different shares, each {least} and below 1; got {found}")
  return [float(share) for share in found]


def replay_mixture(config: ConfigDict, domain: Domain, share: float) -> dict[str, float]:
  """Returns multitask's mixture with `share` of `config.arms.replay_mixture` instead of its own texts.

  The tasks keep their proportions; the rest of the mixture (texts) is left out.

  Raises:
    ValueError: no task in multitask's mixture, one whose share changes over the stage, or nothing to replay.

  Example:
    `{"urgency": 0.6, "summary": 0.3, "domain": 0.1}` at a share of 0.2 of `{"general": 1}` becomes
    `{"urgency": 0.533, "summary": 0.267, "general": 0.2}`.
  """
  mixture = mixture_of(config, config.stages[MAIN_LINE[-1]].to_dict())
  tasks = {name: weight for name, weight in mixture.items() if name == "tasks" or name in domain.tasks}
  if changing := [name for name, weight in tasks.items() if isinstance(weight, (list, tuple))]:
    raise ValueError(
      f"config.arms.replay: the shares of {changing} in multitask's mixture change over the stage, so a share of "
      "replay beside them is not defined; give each task one share, or leave out arms.replay"
    )
  replayed = {name: weight for name, weight in config.arms.replay_mixture.to_dict().items() if weight}
  if not config.general:  # its share goes to the other texts, so that they have all of `share`
    replayed.pop("general", None)
  if not sum(tasks.values()) or not replayed:
    raise ValueError(
      f"config.arms.replay needs tasks in multitask's mixture, got {mixture}, and texts in arms.replay_mixture, got "
      f"{replayed}"
    )
  result = {name: (1 - share) * weight / sum(tasks.values()) for name, weight in tasks.items()}
  return result | {name: share * weight / sum(replayed.values()) for name, weight in replayed.items() if share}


def mixture_of(config: ConfigDict, different: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the mixture of a main stage: that of `config.stages`, else the recipe's."""
  return dict(different.get("data", {}).get("mixture") or config.data.mixture.to_dict())


_MIXTURE = "data.mixture."
# What a recipe loads once, or does not do in a stage.
ONE_FOR_ALL = ("domain", "general", "sources", "tasks", "tokenizer", "cpu_devices", "processes", "data.cache_dir")
ONE_FOR_ALL += ("data.bad_rows", "retain", "gate", "arms", "stages", "architecture", "evaluate")


def stage_config(config: ConfigDict, stage: Stage, workdir: Path) -> ConfigDict:
  """Returns the full config of a stage: the recipe's, with what differs in that stage.

  Raises:
    ValueError: `config.stages` changes a key that does not exist.
  """
  result = config.copy_and_resolve_references()
  if stage.like not in config.stages:
    raise ValueError(
      f"config.stages has no {stage.like!r}: a recipe needs settings of {list(MAIN_LINE)}, as in configs/domain.py; a "
      "config of one stage is trained by `argot train`"
    )
  different = config.stages[stage.like].to_dict()
  if unknown := set(flat(different)) - set(flat(config.to_dict())) - _mixture_keys(different):
    raise ValueError(f"config.stages.{stage.like} has unknown {sorted(unknown)}; keys are those of configs/base.py")
  if fixed := [key for key in flat(different) if any(f"{key}.".startswith(f"{one}.") for one in ONE_FOR_ALL)]:
    raise ValueError(f"config.stages.{stage.like} has {fixed}: one for all stages, to be set in the config itself")
  with result.unlocked():
    result.update(different)
    # One measure for all stages, also where one learns by an objective of its own.
    result.evaluate.objective = result.evaluate.objective or held_out_objective(config)
    result.data.mixture = ConfigDict(dict(stage.mixture or mixture_of(config, different)))
    result.train.steps = stage.steps or result.train.steps
    if stage.mixture and not stage.sweep and result.train.best_metric:
      # An arm on one task is as good as it is there.
      result.train.best_metric = "" if stage.unmeasured else next(iter(stage.mixture))
    result.stages = ConfigDict()
    if stage.init_from:
      result.init_from = str(workdir / "stages" / stage.init_from)
    if stage.average_with:  # whole parameters: adapters were merged before they were averaged
      result.train.steps, result.train.frozen, result.lora.rank = 0, "", 0
      result.train.best_metric = ""  # nothing is trained, so no step is the best
  return result.lock()


def overruled(config: ConfigDict, given: Collection[str]) -> list[str]:
  """Says which keys given on the command line do not reach stages, for these have values of their own.

  Args:
    config: the recipe's, with what was given.
    given: dotted keys, such as "optimizer.learning_rate" or "stages.multitask.train.steps".

  Returns:
    A line a key.

  Raises:
    ValueError: a key reaches no stage at all.
  """
  own = {name: flat(config.stages[name].to_dict()) for name in MAIN_LINE if name in config.stages}
  # A stage without steps takes no setting, nor misses one.
  own = {name: keys for name, keys in own.items() if keys.get("train.steps", config.train.steps)}
  for keys in own.values():
    if any(key.startswith(_MIXTURE) for key in keys):  # a stage's mixture is all of it
      keys |= {key: 0 for key in flat(config.to_dict()) if key.startswith(_MIXTURE) and key not in keys}
  lines = []
  for key, value in flat(config.to_dict()).items():
    if not any(f"{key}.".startswith(f"{one}.") for one in given):
      continue
    others = {name: keys[key] for name, keys in own.items() if keys.get(key, value) != value}
    unsaid = [name for name in others if f"stages.{name}.{key}" not in given]
    if not unsaid:
      continue
    values = ", ".join(f"{name} {others[name]!r}" for name in unsaid)
    instead = f"Set --config.stages.{unsaid[0] if len(unsaid) == 1 else 'STAGE'}.{key}"
    if len(others) == len(own):
      raise ValueError(f"--config.{key}={value} reaches no stage, for each has its own: {values}. {instead}")
    lines.append(f"--config.{key}={value} does not reach stages that have their own: {values}. {instead}")
  return lines


def _mixture_keys(different: Mapping[str, Any]) -> set[str]:
  return {f"{_MIXTURE}{name}" for name in different.get("data", {}).get("mixture", {})}
