"""Runs the whole recipe: stages, comparison arms, evaluation, report. The same command goes on where it stopped.

The exit code is 3 where all is done and a rule of `config.gate` is not met; a second call ends with the same.

Examples:
  argot recipe --config=configs/quickstart.py:t5 --workdir=runs/quickstart
  argot recipe --config=configs/domain.py:gpt-tiny --config.domain=my_domain --workdir=runs/mine
"""

import sys

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot recipe`."""
  values = flags.new()
  flags.config(values)
  flags.string(values, "workdir", None, "folder of the run: stages, tokenizer, report")
  values = flags.parse(values, "recipe", __doc__, arguments, ["config", "workdir"])
  from train.exits import EXIT_GATE
  from train.recipe import run_recipe

  report = run_recipe(values.config, values.workdir, flags.given(values))
  if report.get("gate", {}).get("passed") is False:
    sys.exit(EXIT_GATE)
