"""Answers prompts, greedily unless asked otherwise; with --task the task's template is put around each text.

Examples:
  argot generate --model=runs/quickstart --task=instructions --prompt="72F c/o SOB. Rx amox 500mg PO TDS 5/7."
  argot generate --model=runs/quickstart --task=instructions --input=notes.jsonl --output=answers.jsonl
  argot generate --model=runs/quickstart --prompt="Once" --temperature=0.8 --top_p=0.95 --num_samples=3 --seed=1
  argot generate --model=runs/quickstart --task=instructions --prompt="…" --beams=4 --length_penalty=1.2
  argot generate --model=runs/mine --task=instructions --prompt="…" --temperature=1 --num_samples=9 --consensus=rougeL
  argot generate --model=runs/quickstart --task=instructions --prompt="…" --stop=". " --stream

An --input line is {"input": "…"}; further fields are kept, and the answer is added as "output", a list where there are
several samples. --held keeps a classification task's answer to one of its labels, token by token.
"""

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot generate`."""
  values = flags.new()
  flags.string(values, "model", None, "a run's workdir or a stage in it")
  flags.string(
    values, "task", None, "a task the model knows; none: the prompt as it is, and a GPT of texts goes on with it"
  )
  flags.string(values, "prompt", None, "one text")
  flags.string(values, "input", None, "JSONL file of texts")
  flags.string(values, "output", None, "JSONL file to write; default: the terminal")
  flags.integer(values, "max_new_tokens", None, "longest answer; default: config.evaluate.max_new_tokens")
  flags.integer(values, "template", 0, "which of the task's templates, from 0")
  flags.integer(values, "num_samples", 1, "answers to each prompt: draws, or the best beams")
  flags.integer(values, "beams", 1, "more than 1: beam search")
  flags.number(values, "length_penalty", 1.0, "beams are ranked by log-probability / length^this")
  flags.number(values, "temperature", 0.0, "divides the logits that tokens are drawn from; 0 = the likeliest token")
  flags.integer(values, "top_k", 0, "only the k likeliest tokens are drawn; 0 = all")
  flags.number(values, "top_p", 1.0, "only the likeliest tokens of this probability together are drawn")
  flags.number(values, "repetition_penalty", 1.0, "above 1: less of what was read or written")
  flags.string(values, "consensus", "", "keep the sample that the others bear out most by this metric, such as rougeL")
  flags.strings(values, "stop", "a string that ends an answer; may be given several times")
  flags.integer(values, "seed", 0, "of the draws")
  flags.boolean(values, "held", "to the labels of a classification task")
  flags.boolean(values, "stream", "write one answer to the terminal as it is made")
  values = flags.parse(values, "generate", __doc__, arguments, ["model"])
  from models.decode import Choice
  from train import generate, serve

  choice = Choice(values.temperature, values.top_k, values.top_p, values.repetition_penalty)
  wish = generate.Wish(choice, values.beams, values.length_penalty, values.num_samples, tuple(values.stop))
  wish = wish._replace(seed=values.seed, room=values.max_new_tokens or 0, held=values.held, template=values.template)
  wish = wish._replace(consensus=values.consensus)

  rows = serve.read_requests(values.prompt, values.input, "--prompt=TEXT")
  serve.check_output(values.output)
  with serve.load(values.model) as loaded:
    task = loaded.task(values.task) if values.task else None
    prompts = [loaded.prompt(task, row, values.template) for row in rows]
    if values.stream:
      if len(prompts) > 1 or values.output:
        raise ValueError("--stream writes the answer to one --prompt to the terminal; leave out --output")
      for piece in generate.stream(loaded.evaluator, prompts[0], wish, task, rows[0] if task else None):
        print(piece, end="", flush=True)
      print()
    else:
      found = generate.answers(loaded.evaluator, prompts, wish, task, rows if task else ())
    loaded.say_cut()
  if values.stream:
    return
  answers = [several[0] if len(several) == 1 else several for several in found]
  serve.write_answers([{**row, "output": answer} for row, answer in zip(rows, answers, strict=True)], values.output)
