"""Plans a run on TPUs that are not there: compiles its step for them, and says what it needs. Times are estimates.

Examples:
  argot plan --config=configs/pretrain.py:gpt-llama2-7b --topology=v5e:16x16 --config.mesh.fsdp=256 \\
    --config.mesh.data=1 --config.data.batch_size=1024 --config.data.decoder_length=2048 \\
    --config.model.dtype=bfloat16 --config.model.remat=full
  argot plan --config=… --topology=v5e:16x16 --search --rows=1,2,4,8 --seconds=3600 --output=plan.json --apply=flags
  argot train --config=… --workdir=… $(cat flags)

Needs no TPU, but libtpu: pip install 'argot[plan]'. Topologies: v4 and v5p as XxYxZ, v5e and v6e as XxY. Configs that
name no trained tokenizer count with config.tokenizer.vocab_size, or config.model.vocab_size where that is larger.

--search tries every mesh, --rows of each chip and what --vary lists; a compile takes from seconds to minutes. Ctrl-C
ends it with what it has. --apply writes the best setting as flags, one a line.
"""

import json
from pathlib import Path

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot plan`."""
  values = flags.new()
  flags.config(values)
  flags.string(values, "topology", None, "chips and shape, such as v5e:16x16 or v5p:4x4x4")
  flags.integer(values, "tokens", 0, "tokens of the run, for days and chip-hours; 0 = those of config.train.steps")
  flags.string(values, "output", None, "JSON file to write, too")
  flags.string(values, "hlo", None, "file for the optimised program's text")
  search_flags(values)
  flags.string(values, "apply", None, "search: file for the best setting as flags")
  values = flags.parse(values, "plan", __doc__, arguments, ["config", "topology"])
  rows = searched_rows(values, "apply")
  if values.search and values.hlo:
    raise ValueError("--hlo is for one setting; run again without --search and with the setting that --apply wrote")
  from train import plan, plan_report
  from train.stage import inherit

  topology, config = plan.open_topology(values.topology), inherit(values.config)
  result = _search(values, config, topology, rows) if values.search else None
  best = result[0].plan if result else plan.plan(config, topology, values.hlo)
  steps = plan_report.planned_steps(config, best, values.tokens)
  print("\n".join(plan_report.lines(best, steps)))
  if values.output:
    found = plan_report.as_dict(best, steps)
    if result:
      found["search"] = [_as_dict(config, trial, values.tokens) for trial in result]
    Path(values.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def search_flags(values: flags.Flags) -> None:
  """Defines the flags that a search is asked for with."""
  flags.boolean(values, "search", "try settings, and rank them")
  flags.string(values, "rows", "1,2,4,8", "search: rows of each chip to try")
  flags.string(values, "vary", "model.remat=none,dots,full", "search: KEY=VALUE,VALUE;KEY=… of the config")
  flags.integer(values, "seconds", 1800, "search: its time")


def searched_rows(values: flags.Flags, *others: str) -> list[int]:
  """Returns the rows of each chip to try.

  Args:
    values: the flags.
    others: further flags that are for a search.

  Raises:
    ValueError: --rows is no list of whole numbers, or a search's flag was given without --search.
  """
  for name in ("rows", "vary", "seconds", *others):
    if not values.search and values[name].present:
      raise ValueError(f"--{name} is for --search; add that")
  if not all(part.isdigit() and int(part) > 0 for part in values.rows.split(",")):
    raise ValueError(f"--rows={values.rows}: expected whole numbers such as 1,2,4")
  return [int(part) for part in values.rows.split(",")]


def _search(values: flags.Flags, config, topology, rows: list[int]) -> list:
  from train import plan_search

  vary = plan_search.parse_vary(values.vary, config)
  trials = plan_search.explore(config, topology, rows, vary, values.seconds, lambda line: print(line, flush=True))
  fitting = [trial for trial in trials if trial.plan]
  if not fitting:
    raise ValueError("no setting fits of those that were tried; take more chips, --rows=1, or more --seconds")
  print("\nby estimated time a token, the best first:")
  for trial in fitting:
    print(f"  {plan_search.describe(trial)}")
  print()
  if values.apply:
    Path(values.apply).write_text(plan_search.flag_lines(fitting[0].candidate), encoding="utf-8")
  return trials


def _as_dict(config, trial, tokens: int) -> dict:
  from train import plan_report

  setting = {"setting": trial.candidate.overrides()}
  if trial.plan is None:
    return {**setting, "reason": trial.reason}
  return {**setting, **plan_report.as_dict(trial.plan, plan_report.planned_steps(config, trial.plan, tokens))}
