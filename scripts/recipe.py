"""Runs the whole recipe: stages, comparison arms, evaluation, report. The same command goes on where it stopped.

Examples:
  argot recipe --config=configs/quickstart.py:t5 --workdir=runs/quickstart
  argot recipe --config=configs/domain.py:gpt-tiny --config.domain=my_domain --workdir=runs/mine
"""

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot recipe`."""
  values = flags.new()
  flags.config(values)
  flags.string(values, "workdir", None, "folder of the run: stages, tokenizer, report")
  values = flags.parse(values, "recipe", __doc__, arguments, ["config", "workdir"])
  from train.recipe import run_recipe

  run_recipe(values.config, values.workdir)
