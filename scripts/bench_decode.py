"""Speed of decoding beside transformers' `generate`, same weights, in one run; and of scoring labels.

  python -m scripts.bench_decode [--model=t5] [--rows=8]     greedy, cached: 64 tokens read, 128 written
  python -m scripts.bench_decode --what=labels               25 labels: prompt read once, beside once for each label

Each works in turn, in a process of its own, in float32. Needs `pip install 'argot[parity]'`.
"""

import os
import sys
import tempfile
from functools import partial

import numpy as np

from scripts import turns
from scripts.bench_train import SHAPES

PROMPT, NEW, LABELS, LABEL = 64, 128, 25, 4


def loaded(folder: str):
  """Returns Argot's model and parameters of a folder, on the mesh that it sets."""
  from pathlib import Path

  import jax

  from models import MODELS, hf
  from models.sharding import make_mesh

  mesh = make_mesh({})
  jax.set_mesh(mesh)
  found = hf.describe(Path(folder))
  model = MODELS[found.architecture]("custom", found.vocab_size, **found.fields)
  return model, hf.load(Path(folder), model, mesh)


def argot(folder: str, prompts: np.ndarray):
  """Returns a turn that continues prompts greedily."""
  import jax

  from models import decode
  from models.sharding import on_mesh

  model, params = loaded(folder)
  decoder_only = "encoder" not in params  # its first token is what a row starts from
  given, start = (prompts[:, 1:], int(prompts[0, 0])) if decoder_only else (prompts, 0)
  inputs = on_mesh(model.prompts(given.tolist(), given.shape[1], start))
  run = jax.jit(partial(decode.write, model, room=NEW, eos_id=-1, pad_id=0))
  return lambda: np.asarray(run(params, inputs))[0].tolist()


def labels(folder: str, prompts: np.ndarray, naive: bool):
  """Returns a turn that scores labels after every prompt; naively, the prompt is read again for each of them."""
  import jax

  from models import decode
  from models.sharding import on_mesh

  model, params = loaded(folder)
  inputs = on_mesh(model.prompts(prompts.tolist(), prompts.shape[1], 0))
  tokens = np.random.default_rng(1).integers(2, 30_000, (LABELS, LABEL)).astype(np.int32)
  weights, run = np.ones(tokens.shape, np.float32), jax.jit(partial(decode.score, model))

  def turn() -> float:
    parts = [slice(i, i + 1) for i in range(LABELS)] if naive else [slice(None)]
    return float(sum(np.asarray(run(params, inputs, tokens[part], weights[part])).sum() for part in parts))

  return turn


def main(name: str, what: str, rows: int, rounds: int) -> None:
  """Runs the competitors and prints the table."""
  import multiprocessing

  from scripts import peers

  threads = len(os.sched_getaffinity(0))
  prompts = np.random.default_rng(0).integers(2, 30_000, (rows, PROMPT))
  prompts[:, 0] = 2
  with tempfile.TemporaryDirectory(prefix="argot-decode-") as folder:
    process = multiprocessing.get_context("spawn").Process(
      target=peers.save_random, args=(name, SHAPES[f"{name}-small"], folder)
    )
    process.start()
    process.join()
    if what == "labels":
      makers = {"once": (labels, (folder, prompts, False)), "for each label": (labels, (folder, prompts, True))}
      count, unit = rows * LABELS, "labels"
    else:
      makers = {"Argot": (argot, (folder, prompts))}
      makers["transformers"] = (peers.writer, (name, folder, prompts, NEW, threads))
      count, unit = rows * NEW, "tokens"
    found = turns.take_turns(makers, rounds)
  print(f"{name}-small, {rows} rows, {threads} threads, {rounds} rounds; speed is beside the last row")
  print(turns.table(found, list(found)[-1], count, unit))
  first, last = (timing.answer for timing in found.values())
  print(f"the same answer: {first == last if what == 'greedy' else abs(first - last) < 1e-4 * abs(last)}")


if __name__ == "__main__":
  from scripts import flags

  values = flags.new()
  flags.string(values, "model", "gpt", "gpt or t5")
  flags.string(values, "what", "greedy", "greedy or labels")
  flags.integer(values, "rows", 8, "prompts at once")
  flags.integer(values, "rounds", 7, "turns of each that are timed")
  values = flags.parse(values, "bench_decode", __doc__, sys.argv[1:], [])
  main(values.model, values.what, values.rows, values.rounds)
