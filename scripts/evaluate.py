"""Measures a model on a domain: perplexity of its held-out text, every task; writes JSON.

Temperature and threshold of labels are fitted anew, on the domain's validation split, and not stored with the model.

Examples:
  argot evaluate --model=runs/quickstart --domain=my_domain --output=scores.json
  argot evaluate --model=runs/quickstart/stages/base --domain=my_domain --split=validation --output=scores.json
"""

from pathlib import Path

from scripts import flags


def main(arguments: list[str]) -> None:
  """Runs `argot evaluate`."""
  values = flags.new()
  flags.string(values, "model", None, "a run's workdir or a stage in it")
  flags.string(values, "domain", None, "a domain folder")
  flags.string(values, "split", "test", "of the tasks: validation or test")
  flags.integer(values, "beams", None, "of a generation task's answers; default: the model's config.evaluate.beams")
  flags.number(values, "length_penalty", None, "… ranked by log-probability / length^this; default: the model's, too")
  flags.number(values, "repetition_penalty", None, "above 1: less of what was read or written; default: the model's")
  flags.integer(values, "candidates", None, "draws, of which the others bear one out most; default: the model's")
  flags.number(values, "temperature", None, "… of the draws; default: the model's")
  flags.string(values, "bad_rows", "error", "a row that cannot be read or used: error or skip")
  flags.string(values, "output", None, "JSON file to write")
  values = flags.parse(values, "evaluate", __doc__, arguments, ["model", "domain", "output"])
  from ml_collections import ConfigDict

  from configs.base import get_config
  from data.tasks import load_domain
  from train import processes, serve
  from train.metrics import DECODING
  from train.recipe import evaluate_all, prepare_jax
  from train.skills import skills_of
  from train.stage import check_same_everywhere, write_json

  prepare_jax(get_config())
  serve.check_output(values.output)
  domain = processes.together(lambda: load_domain(values.domain, bad_rows=values.bad_rows))
  with serve.load(values.model) as loaded:
    asked = {name: values[name].value for name in DECODING if values[name].present}
    settings = loaded.evaluator.config.evaluate
    settings.update(asked)
    texts = {"domain": domain.corpus_test}
    skills = processes.together(lambda: skills_of(texts, domain.tasks, values.split, settings))
    check_same_everywhere(skills.fingerprint(), ConfigDict({"evaluate": settings}))
    measured = evaluate_all(loaded.evaluator, domain.tasks, texts, values.split)
  result = {
    "model": str(loaded.folder),
    "domain": domain.name,
    "split": values.split,
    "skills": {name: found.metrics for name, found in measured.items()},
    "samples": {name: found.samples for name, found in measured.items() if name in domain.tasks},
  }
  processes.first(lambda: write_json(Path(values.output), result))
  print(f"wrote {values.output}")
