"""argot: teach a language model your field's language, then its jobs, and prove what it kept.

    argot recipe     base model -> continued pre-training -> multitask fine-tuning -> report
    argot doctor     look at data, tokenizer and model before a long run
    argot plan       memory, time and cost of a run on TPUs that are not there; searches for the best setting
    argot train      one stage
    argot supervise  a command, started again until it is done
    argot compare    finished recipe runs side by side, tested row by row
    argot evaluate   measure a model on a domain's tasks and texts
    argot generate   answer prompts
    argot classify   labels with the probability of each
    argot import     weights in Hugging Face's form, as a stage
    argot export     a model as a Hugging Face folder
    argot inspect    a model's family, parameters and memory
    argot tokenizer  train a tokenizer on a corpus
    argot checkpoints  list, verify, prune and roll back the checkpoints of a run

`argot VERB --help` shows a verb's flags with examples.
"""

import sys

from scripts import (
  checkpoints,
  classify,
  compare,
  doctor,
  evaluate,
  export_model,
  generate,
  import_model,
  inspect_model,
  plan,
  recipe,
  start,
  supervise,
  tokenizer,
  train,
)
from train.exits import Stopped

VERBS = {
  "recipe": recipe.main,
  "doctor": doctor.main,
  "plan": plan.main,
  "train": train.main,
  "supervise": supervise.main,
  "compare": compare.main,
  "evaluate": evaluate.main,
  "generate": generate.main,
  "classify": classify.main,
  "import": import_model.main,
  "export": export_model.main,
  "inspect": inspect_model.main,
  "tokenizer": tokenizer.main,
  "checkpoints": checkpoints.main,
}


def main() -> None:
  """Runs the verb that the command line names; a user's mistake ends with one clear line and exit code 1 or 2."""
  arguments = sys.argv[1:]
  if not arguments or arguments[0] in ("-h", "--help", "help"):
    print(__doc__.strip())
    return
  verb, *rest = arguments
  if verb not in VERBS:
    sys.exit(f"argot: unknown verb {verb!r}; known: {', '.join(VERBS)}")
  start.with_many_files()
  try:
    VERBS[verb](rest)
  except (ValueError, OSError) as error:
    sys.exit(f"argot {verb}: {error}")
  except KeyboardInterrupt:
    sys.exit(f"argot {verb}: stopped; the same command goes on from the last checkpoint")
  except Stopped as error:
    print(f"argot {verb}: {error}", file=sys.stderr, flush=True)
    sys.exit(error.code)


if __name__ == "__main__":
  start.with_large_pages()
  main()
