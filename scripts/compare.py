"""Compares finished recipe runs with the first one: values, paired tests, settings that differ; a report of its own.

Runs that were measured on other test rows are put side by side and not tested against each other, with the reason.

Examples:
  argot compare runs/t5 runs/gpt --output=runs/compared
  argot compare --run=runs/seed0 --run=runs/seed1
"""

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot compare`."""
  values = flags.new()
  flags.strings(values, "run", "a recipe's workdir; several; may be given without --run=")
  flags.string(values, "output", "", "folder for compare.html and compare.json; else the terminal only")
  values = flags.parse(values, "compare", __doc__, named(arguments), ["run"])
  from train.compare import compare_runs, lines
  from train.report import plain, write_page
  from train.report_compare import render

  comparison = plain(compare_runs(values.run), "comparison")
  print("\n".join(lines(comparison)))
  if values.output:
    write_page(values.output, "compare", comparison, render)
    print(f"comparison: {values.output}/compare.html")


def named(arguments: list[str]) -> list[str]:
  """Returns the arguments with `--run=` before each that is no flag, and no flag's value.

  Example:
    >>> named(["runs/a", "--output", "out", "runs/b"])
    ['--run=runs/a', '--output', 'out', '--run=runs/b']
  """
  is_value = [before in ("--run", "--output") for before in ["", *arguments]]
  return [
    argument if value or argument.startswith("-") else f"--run={argument}"
    for argument, value in zip(arguments, is_value, strict=False)
  ]
