"""Training speed and memory beside PyTorch, in one run: nanoGPT's model and transformers' T5.

  python -m scripts.bench_train --model=gpt                  nanoGPT: 6 layers of 384, 16 rows of 256, float32
  python -m scripts.bench_train --model=t5                   T5 v1.1 small: 8 rows of 512 and 114, float32
  python -m scripts.bench_train --model=gpt --shape=124m     GPT-2's sizes, 1024 tokens a row, bfloat16 (a GPU)
  python -m scripts.bench_train --argot="model.remat=dots;"  beside the defaults

Each competitor steps in turn, in a process of its own, on random tokens; Argot steps as `argot train` does, with large
pages (scripts/start.py); PyTorch gets them with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before the command. The tokens of
a T5 are those of both sides. Needs `pip install 'argot[parity]'`.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from scripts import start, turns

SHAPES: dict[str, dict[str, int]] = {
  "gpt-small": {"layers": 6, "dim": 384, "heads": 6, "length": 256, "rows": 16, "vocab_size": 50304},
  "gpt-124m": {"layers": 12, "dim": 768, "heads": 12, "length": 1024, "rows": 16, "vocab_size": 50304},
  "gpt-1.3b": {"layers": 24, "dim": 2048, "heads": 16, "length": 1024, "rows": 8, "vocab_size": 50304},
  "t5-small": {"layers": 8, "dim": 512, "heads": 6, "mlp_dim": 1024, "rows": 8, "vocab_size": 32128}
  | {"encoder_length": 512, "length": 114},
}


def batches(name: str, shape: Mapping[str, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields inputs and targets, int64: of a GPT the row and the row shifted, of a T5 the encoder's and the decoder's."""
  draws = np.random.default_rng(0)
  rows, length, highest = shape["rows"], shape["length"], shape["vocab_size"] - 128
  while True:
    if name == "gpt":
      row = draws.integers(2, highest, (rows, length + 1))
      yield np.ascontiguousarray(row[:, :-1]), np.ascontiguousarray(row[:, 1:])
    else:
      yield draws.integers(2, highest, (rows, shape["encoder_length"])), draws.integers(2, highest, (rows, length))


def peer(name: str, shape: Mapping[str, int], mode: str, device: str):
  """PyTorch's competitor: returns its turn."""
  from scripts import peers

  return peers.trainer(name, shape, mode, device, partial(batches, name, shape))


def argot_config(name: str, shape: Mapping[str, int], device: str, settings: Mapping[str, object]):
  """Returns the config of Argot's competitor; `settings` are keys such as "model.remat" with their values."""
  from configs import base

  config = base.get_config()
  with config.unlocked():
    config.architecture = name
    sizes = {"embed_dim": shape["dim"], "heads": shape["heads"], "head_dim": shape["dim"] // shape["heads"]}
    if name == "gpt":
      config.model.size = "gpt2"
      sizes |= {"layers": shape["layers"], "kv_heads": shape["heads"], "mlp_dim": 4 * shape["dim"]}
      sizes |= {"max_length": shape["length"]}
    else:
      config.model.size = "t5-v1.1-small"
      sizes |= {"head_dim": 64, "mlp_dim": shape["mlp_dim"]}
      sizes |= {"encoder_layers": shape["layers"], "decoder_layers": shape["layers"]}
    config.model.overrides.update(sizes)
    config.model.vocab_size = shape["vocab_size"]
    config.model.dtype = "bfloat16" if device == "cuda" else "float32"
    config.optimizer.update({"b2": 0.95, "weight_decay": 0.1, "schedule": "constant", "warmup_steps": 1})
    config.update_from_flattened_dict(settings)
  return config.lock()


def argot(name: str, shape: Mapping[str, int], device: str, settings: Mapping[str, object]):
  """Argot's competitor: returns its turn."""
  import jax

  from data.tokenizer import byte_tokenizer
  from models.sharding import make_mesh, on_mesh
  from train import loop, programs, stage
  from train.meter import compiled

  config = argot_config(name, shape, device, settings)
  if config.cpu_devices:
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
  mesh, model = make_mesh(config.mesh), loop.build_model(config, byte_tokenizer())
  with jax.set_mesh(mesh):
    state = loop.new_state(config, stage.scratch_params(config, model, mesh), mesh)
    data = (on_mesh(as_batch(name, *pair)) for pair in batches(name, shape))
    step = compiled(programs.make_train_step(config, model, mesh, tasks=1), state, next(data), "argot")

  def turn() -> float:
    nonlocal state
    with jax.set_mesh(mesh):
      state, metrics = step(state, next(data))
      return float(metrics["loss"])

  return turn


def as_batch(name: str, tokens: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
  """Returns rows as the pipeline would give them: full, one example each."""
  inputs = tokens if name == "gpt" else np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  batch = {"decoder_input_tokens": inputs, "decoder_target_tokens": targets}
  batch |= {"encoder_input_tokens": tokens} if name == "t5" else {}
  for side in ["decoder", "encoder"][: 1 + (name == "t5")]:
    rows = batch[f"{side}_input_tokens"]
    batch[f"{side}_segment_ids"] = np.ones_like(rows)
    batch[f"{side}_positions"] = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
  batch = {key: value.astype(np.int32) for key, value in batch.items()}
  batch["task_ids"] = np.zeros_like(batch["decoder_segment_ids"])
  return batch | {"decoder_loss_weights": np.ones(targets.shape, np.float32)}


def flops_of(name: str, shape: Mapping[str, int]) -> int:
  """Returns a step's FLOPs by train/flops.py."""
  import jax

  from data.tokenizer import byte_tokenizer
  from train.flops import model_flops
  from train.loop import build_model

  model = build_model(argot_config(name, shape, "cpu", {}), byte_tokenizer())
  params = jax.eval_shape(model.init, jax.random.key(0))
  return model_flops(model, params, shape["rows"], shape.get("encoder_length", 0), shape["length"])


def read_settings(text: str) -> dict[str, object]:
  """Reads "key=value,key=value".

  Example:
    >>> read_settings("model.remat=dots,cpu_devices=2")
    {'model.remat': 'dots', 'cpu_devices': 2}
  """
  pairs = (pair.strip().split("=", 1) for pair in text.split(",") if pair.strip())
  return {key: int(value) if value.lstrip("-").isdigit() else value for key, value in pairs}


def main(name: str, size: str, device: str, asked: str, variants: list[str], rounds: int) -> None:
  """Runs the competitors and prints the table."""
  shape = {"threads": len(os.sched_getaffinity(0)), **SHAPES[f"{name}-{size}"]}
  makers, environments = {}, {}
  for variant in variants:
    label = f"Argot {variant.strip()}".strip()
    makers[label] = (argot, (name, shape, device, read_settings(variant)))
    environments[label] = start.environment()
  makers |= {f"PyTorch, {mode}": (peer, (name, shape, mode, device)) for mode in asked.split(",") if mode}
  found = turns.take_turns(makers, rounds, environments=environments)
  tokens = shape["rows"] * (shape["length"] + shape.get("encoder_length", 0))
  print(f"{name}-{size}, {shape['threads']} threads, {rounds} rounds, {device}; speed is beside the last row")
  print(turns.table(found, list(found)[-1], tokens, "tokens", flops_of(name, shape)))
  print(f"last losses: {', '.join(f'{label} {timing.answer:.3f}' for label, timing in found.items())}")


if __name__ == "__main__":
  from scripts import flags

  values = flags.new()
  flags.string(values, "model", "gpt", "gpt or t5")
  flags.string(values, "shape", "small", f"of {sorted(SHAPES)}, what stands after the model")
  flags.string(values, "device", "cpu", "cpu or cuda")
  flags.string(
    values,
    "peers",
    "lean,compile",
    "of PyTorch, each after a comma: eager, compile, lean (compiled, only the loss leaves the model); or nothing",
  )
  flags.string(values, "argot", "", "settings of Argot's config, key=value,key=value; several competitors between ';'")
  flags.integer(values, "rounds", 15, "steps of each that are timed")
  values = flags.parse(values, "bench_train", __doc__, sys.argv[1:], [])
  main(values.model, values.shape, values.device, values.peers, values.argot.split(";"), values.rounds)
