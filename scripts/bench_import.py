"""Measures what reading weights takes of the host's memory, on a folder that it makes.

  python -m scripts.bench_import [--size=llama3.2-1b] [--layers=16] [--folder=DIR]

A child process reads the folder onto its CPU device, whose arrays lie in the same memory. What the reading itself takes
is the process's peak, less what it had before and less the arrays that it ends with; the unit is the largest tensor of
the files. In bfloat16 and in float32.
"""

import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from scripts.turns import peak


def write_folder(folder: Path, size: str, layers: int) -> None:
  """Writes a decoder-only model of a published size, with fewer or more layers, in bfloat16 files of 1 GB at most."""
  import jax
  import ml_dtypes

  from models import MODELS, hf_export
  from models.families import FAMILIES
  from models.weights import Writer

  config = MODELS["gpt"](size, 32_000, layers=layers).config
  shapes = jax.eval_shape(MODELS["gpt"](size, 32_000, layers=layers).init, jax.random.key(0))
  kind, theirs = hf_export.their_config(config, "bfloat16", 2048, {"eos_token_id": 1})
  hf_export.save_config(folder, theirs, config)
  tensors = hf_export.their_shapes(FAMILIES[kind].rows(config), shapes, config.vocab_size)
  writer = Writer(folder, {name: 2 * int(np.prod(shape)) for name, shape in tensors.items()}, 10**9)
  noise = np.random.default_rng(0).normal(size=1 << 20).astype(ml_dtypes.bfloat16)
  for name, shape in tensors.items():
    writer.add(name, np.resize(noise, shape))
  writer.close()


def measure(folder: str, storage: str, queue: multiprocessing.Queue) -> None:
  """Reads the folder in this process and reports its memory, in bytes."""
  import jax

  from models import MODELS, hf
  from models.sharding import make_mesh

  folder = Path(folder)
  found = hf.describe(folder)
  model = MODELS[found.architecture]("custom", found.vocab_size, **found.fields, storage=storage)
  mesh = make_mesh({})
  jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())
  before, began = peak(), time.monotonic()
  with jax.set_mesh(mesh):
    params = jax.block_until_ready(hf.load(folder, model, mesh))
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  queue.put({"before": before, "peak": peak(), "held": held, "seconds": time.monotonic() - began})


def main(size: str, layers: int, folder: Path) -> None:
  """Writes the folder where it is not there, and prints a line for each storage."""
  from models.weights import open_tensors

  if not (folder / "config.json").exists():
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, size, layers)
  tensors = open_tensors(folder)
  sizes = [tensor.shape[0] * tensor.row_bytes for tensor in tensors.values()]
  print(f"{folder}: {len(sizes)} tensors, {sum(sizes) / 1e9:.2f} GB, the largest {max(sizes) / 1e9:.3f} GB")
  context = multiprocessing.get_context("spawn")
  for storage in ("bfloat16", "float32"):
    queue = context.Queue()
    child = context.Process(target=measure, args=(str(folder), storage, queue))
    child.start()
    got = queue.get()
    child.join()
    own = got["peak"] - got["before"] - got["held"]
    print(
      f"{storage}: arrays of {got['held'] / 1e9:.2f} GB in {got['seconds']:.0f} s, peak {got['peak'] / 1e9:.2f} GB; "
      f"{own / 1e9:.3f} GB beside the arrays, {own / max(sizes):.2f} × the largest tensor"
    )
    print(json.dumps({"storage": storage, **got, "largest": max(sizes)}), file=sys.stderr)


if __name__ == "__main__":
  from scripts import flags

  values = flags.new()
  flags.string(values, "size", "llama3.2-1b", "a row of SIZES in models/gpt.py")
  flags.integer(values, "layers", 16, "layers")
  flags.string(values, "folder", None, "where the folder is or shall be; default: a temporary one")
  values = flags.parse(values, "bench_import", __doc__, sys.argv[1:], [])
  with tempfile.TemporaryDirectory(prefix="argot-weights-") as temporary:
    main(values.size, values.layers, Path(values.folder or temporary))
