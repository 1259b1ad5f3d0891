"""Classifies texts: the label (or labels), and the probability of every label of the task.

Examples:
  argot classify --model=runs/quickstart --task=urgency --text="72F c/o SOBAR. sats 84%. PMH COPD."
  argot classify --model=runs/quickstart --task=urgency --input=notes.jsonl --output=labels.jsonl

An --input line is {"input": "…"}; further fields are kept, and "label" and "probabilities" are added, and where the
task has a threshold "abstain": true if the model is less sure than that, else false. Temperature and threshold are
those of the stage's calibration.json, which the recipe writes; without that file the temperature is 1, and the model
never abstains. Where no threshold reached the accuracy that was asked for, neither does it, and stderr says so.
A task whose texts have several labels gives "labels", "probabilities" and "thresholds", and needs that file.
"""

import sys

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot classify`."""
  values = flags.new()
  flags.string(values, "model", None, "a run's workdir or a stage in it")
  flags.string(values, "task", None, "a classification task the model knows")
  flags.string(values, "text", None, "one text")
  flags.string(values, "input", None, "JSONL file of texts")
  flags.string(values, "output", None, "JSONL file to write; default: the terminal")
  flags.integer(values, "template", 0, "which of the task's templates, from 0")
  values = flags.parse(values, "classify", __doc__, arguments, ["model", "task"])
  from train import serve

  rows = serve.read_requests(values.text, values.input, "--text=TEXT")
  serve.check_output(values.output)
  with serve.load(values.model) as loaded:
    task = loaded.task(values.task, ("classification", "multi_label"))
    prompts = [loaded.prompt(task, row, values.template) for row in rows]
    answers = loaded.classify(task, prompts, values.template)
    loaded.say_cut()
    fitted = loaded.calibrations.get(task.name)
    if fitted and fitted.note:
      print(f"{task.name}: {fitted.note}", file=sys.stderr)
  # An earlier answer's verdict does not stay where this one has none.
  kept = [{key: value for key, value in row.items() if key != "abstain"} for row in rows]
  serve.write_answers([{**row, **answer} for row, answer in zip(kept, answers, strict=True)], values.output)
