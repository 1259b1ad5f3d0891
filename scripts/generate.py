"""Answers prompts by greedy decoding; with --task the task's template is put around each text.

Examples:
  argot generate --model=runs/quickstart --task=instructions --prompt="72F c/o SOB. Rx amox 500mg PO TDS 5/7."
  argot generate --model=runs/quickstart --task=instructions --input=notes.jsonl --output=answers.jsonl

An --input line is {"input": "…"}; further fields are kept, and the answer is added as "output".
"""

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot generate`."""
  values = flags.new()
  flags.string(values, "model", None, "a run's workdir or a stage in it")
  flags.string(values, "task", None, "a task the model knows; none: the prompt is taken as it is")
  flags.string(values, "prompt", None, "one text")
  flags.string(values, "input", None, "JSONL file of texts")
  flags.string(values, "output", None, "JSONL file to write; default: the terminal")
  flags.integer(values, "max_new_tokens", None, "longest answer; default: config.evaluate.max_new_tokens")
  flags.integer(values, "template", 0, "which of the task's templates, from 0")
  values = flags.parse(values, "generate", __doc__, arguments, ["model"])
  from train import serve

  rows = serve.read_requests(values.prompt, values.input, "--prompt=TEXT")
  with serve.load(values.model) as loaded:
    task = loaded.task(values.task) if values.task else None
    prompts = [loaded.prompt(task, row, values.template) for row in rows]
    answers = loaded.evaluator.generate(prompts, values.max_new_tokens, task)
  serve.write_answers([{**row, "output": answer} for row, answer in zip(rows, answers, strict=True)], values.output)
