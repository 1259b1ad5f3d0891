"""Classifies texts: the label, and the probability of every label of the task.

Examples:
  argot classify --model=runs/quickstart --task=urgency --text="72F c/o SOBAR. sats 84%. PMH COPD."
  argot classify --model=runs/quickstart --task=urgency --input=notes.jsonl --output=labels.jsonl

An --input line is {"input": "…"}; further fields are kept, and "label" and "probabilities" are added.
"""

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
  with serve.load(values.model) as loaded:
    task = loaded.task(values.task, "classification")
    prompts = [loaded.prompt(task, row, values.template) for row in rows]
    scores = loaded.evaluator.classify(task, prompts, values.template)
  serve.write_answers(
    [{**row, **serve.label(task, score)} for row, score in zip(rows, scores, strict=True)], values.output
  )
