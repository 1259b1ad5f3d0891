"""Self-generated replay: text sampled from the checkpoint that a stage starts from, where the earlier data is gone.

A mixture asks for it by the name "replay". The text is made once and lies in the stage's folder:

replay.jsonl    {"text": …} a line       replay.json    of which checkpoint, with which settings
"""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data.files import put, read_json
from data.sources import Texts, open_texts, texts_of
from data.tokenizer import Tokenizer
from models import Model, decode
from models.sharding import fetch, on_mesh, whole_batch
from train import processes, stage
from train.checkpoint import Checkpoints
from train.evaluator import until

NAME = "replay"  # in a mixture
PLAIN = ("next_token", "prefix_lm")  # objectives that continue text; the others fill in what a sentinel hides


def asked_for(config: ConfigDict) -> bool:
  """Says whether a stage's mixture has a share of self-generated text."""
  return bool(np.any(config.data.mixture.get(NAME, 0)))


def replay_texts(config: ConfigDict, workdir: Path, tokenizer: Tokenizer, model: Model, mesh: Mesh) -> Texts:
  """Returns `config.replay.documents` documents sampled from `config.init_from`, made now or before.

  A model of next-token text writes documents from nothing. One that fills in spans is asked to fill in a text that is
  hidden as a whole, `<extra_id_0>`: it writes what it would put into a gap, so its documents are about as long as the
  spans that it was trained on.

  Args:
    config: the stage's config.
    workdir: the stage's folder, where the text is kept.
    tokenizer: the tokenizer.
    model: the model, as in the checkpoint.
    mesh: the current mesh.

  Raises:
    ValueError: there is no checkpoint to sample from, or every sample was empty.
  """
  if not config.init_from:
    raise ValueError(
      "config.data.mixture has a share of 'replay', text sampled from the checkpoint that a stage starts from, but "
      "this stage starts from scratch; set config.init_from, or take 'replay' out of the first stage's mixture"
    )
  about, file = workdir / "replay.json", workdir / "replay.jsonl"
  with Checkpoints(workdir) as checkpoints:
    resumed = checkpoints.latest() is not None  # then the stream's fingerprint guards the text
  if not (resumed and file.exists()):
    source = stage.find(config.init_from)
    wanted = {"from": str(source), **stage.identity(source), "seed": config.seed, **config.replay.to_dict()}
    made = file.exists() and about.exists() and read_json(about) == wanted
    if not processes.agree(made):
      texts = sample_texts(config, tokenizer, model, stage.load_params(source, model, mesh))
      processes.first(lambda: _write(file, about, texts, wanted))
  return open_texts(file, workdir)


def _write(file: Path, about: Path, texts: list[str], wanted: dict[str, Any]) -> None:
  put(file, "".join(json.dumps({"text": text}) + "\n" for text in texts))
  stage.write_json(about, wanted)


def choice_of(config: ConfigDict) -> decode.Choice:
  """Returns how each token of a document is drawn.

  Raises:
    ValueError: `config.replay` asks for what cannot be.
  """
  settings = config.replay
  choice = decode.Choice(settings.temperature, settings.top_k, settings.top_p)
  if not choice.temperature > 0:
    raise ValueError(f"config.replay.temperature must be above 0, or all documents are one; got {choice.temperature}")
  decode.check_choice(choice)
  return choice


def sample_texts(config: ConfigDict, tokenizer: Tokenizer, model: Model, params: Any) -> list[str]:
  """Samples documents; empty ones and repeated ones are left out, and counted.

  Raises:
    ValueError: every document is empty, or see `choice_of`.
  """
  settings, rows = config.replay, whole_batch(config.evaluate.batch_size)
  whole = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id, "room": settings.tokens}
  choice = choice_of(config)
  sentinels = {token for token in tokenizer.sentinel_ids if tokenizer.is_special(token)}  # a ByT5's may be text
  run = jax.jit(partial(decode.write, model, choice=choice, **whole))
  prompts = on_mesh(model.prompts([opening(config, tokenizer)] * rows, 8, tokenizer.start_id), whole=True)
  key = jax.random.fold_in(jax.random.key(config.seed), 1_000_003)  # apart from the keys of steps
  texts: dict[str, None] = {}
  made, began, said = 0, time.monotonic(), time.monotonic()
  while made < settings.documents:
    written = fetch(run(params, prompts, jax.random.fold_in(key, made)))
    for tokens in written[: settings.documents - made].tolist():
      plain = [token for token in until(tokens, tokenizer.eos_id) if token not in sentinels]
      texts[tokenizer.decode(plain).strip()] = None
    made = min(made + rows, settings.documents)
    if time.monotonic() - said > 5:
      said, rate = time.monotonic(), made / (time.monotonic() - began)
      left = (settings.documents - made) / rate
      print(f"replay: {made}/{settings.documents} documents, {rate:.1f} a second, {left:.0f} s left", flush=True)
  texts.pop("", None)
  print(f"replay: {made} documents sampled, {made - len(texts)} of them empty or repeated and left out", flush=True)
  if not texts:
    raise ValueError(
      f"all {made} documents sampled from {config.init_from} are empty; raise config.replay.tokens or .temperature, or "
      "take 'replay' out of the mixture"
    )
  return list(texts)


def opening(config: ConfigDict, tokenizer: Tokenizer) -> list[int]:
  """Returns the tokens that ask a model for a text of its own."""
  objective = stage.read_config(stage.find(config.init_from)).data.objective
  if objective in PLAIN:
    return [tokenizer.eos_id] if config.architecture == "t5" else []  # an encoder must have something to read
  return [tokenizer.sentinel_ids[0], tokenizer.eos_id]


def stand_in() -> Texts:
  """Returns a text in the place of one that is not sampled yet, to build a stream for its other sources."""
  return texts_of(["replay"], NAME)
