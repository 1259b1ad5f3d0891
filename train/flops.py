"""FLOPs that a model needs for a batch, by formula: the numerator of MFU.

  6 · Σ matrices (parameters · tokens they are applied to)  +  12 · heads · head dim · Σ layers (visible pairs)

A matrix product takes 2 FLOPs a parameter and token forward, twice that backward; attention's two products take
4 · heads · head dim a (query, key) pair forward. Embedding look-ups, norms, biases and T5's table of relative positions
count as nothing; the output matrix counts, tied or not, without the vocabulary's padding. T5's encoder matrices, and
the keys and values of its cross-attention, are applied to encoder tokens, the rest to decoder tokens. A pair is visible
where the mask lets a whole row see it: causal T(T+1)/2, a window fewer, encoder and cross all; a row counts as one
segment. What remat computes again is not counted. A frozen parameter takes 4 FLOPs a token, not 6, since it has no
gradient (what is before it still has one); adapters' own products, a few per cent, are left out.

Reference:
  Chowdhery et al. 2022 (PaLM), appendix B; with visible pairs only, where the appendix counts all.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from models import Model
from models.sharding import by_path
from train.optimizer import NO_DECAY


def model_flops(
  model: Model, params: Any, rows: int, encoder_length: int, decoder_length: int, frozen: Any = ()
) -> int:
  """Returns the FLOPs of one training step.

  Args:
    model: the model.
    params: its parameters or their shapes.
    rows: of the batch.
    encoder_length: S, tokens of an encoder row; 0 for a decoder-only model.
    decoder_length: T.
    frozen: those of the parameters that have no gradient.
  """
  tokens = {"encoder": rows * encoder_length, "decoder": rows * decoder_length}

  def products(tree: Any) -> int:
    return sum(count * tokens[side] for side, count in matrix_parameters(model, tree).items())

  visible, _ = attention_pairs(model, encoder_length, decoder_length)
  flops = 6 * products(params) - 2 * products(frozen)
  return flops + 12 * model.config.heads * model.config.head_dim * rows * visible


def row_lengths(config: ConfigDict) -> tuple[int, int]:
  """Returns S (0 without an encoder) and T, the tokens of a config's rows."""
  return config.data.encoder_length if config.architecture == "t5" else 0, config.data.decoder_length


def matrix_parameters(model: Model, params: Any) -> dict[str, int]:
  """Counts those of a model's parameters that are multiplied with encoder tokens and with decoder tokens."""
  counts = {"encoder": 0, "decoder": 0}
  leaves = by_path(params)
  for name, leaf in leaves.items():
    if not NO_DECAY.search(name) and not name.startswith(("embed/", "head/")):
      read = name.startswith("encoder/") or name.endswith(("cross/key", "cross/value"))
      counts["encoder" if read else "decoder"] += int(np.prod(leaf.shape))
  if ("embed/tokens" if model.config.tied else "head/kernel") in leaves:
    counts["decoder"] += model.config.vocab_size * model.config.embed_dim
  return counts


def attention_pairs(model: Model, encoder_length: int, decoder_length: int, parts: int = 1) -> tuple[int, int]:
  """Returns the (query, key) pairs of a row in all layers: those that may be seen, and all.

  Args:
    model: the model.
    encoder_length, decoder_length: tokens of a row.
    parts: more than 1: only those of the last of so many equal parts of the queries, which sees most.

  Example:
    A causal layer of 4 tokens has 10 of 16; the second of two parts 7 of 8.
  """
  c, long, short = model.config, encoder_length, decoder_length
  own = short // parts

  def seen(window: int) -> int:
    def of_first(queries: int) -> int:
      near = min(queries, window)  # those that see less than a window, or just one
      return near * (near + 1) // 2 + (queries - near) * window

    return of_first(short) - of_first(short - own)

  if not hasattr(c, "encoder_layers"):
    local, narrow = int(c.local.sum()), seen(min(c.window or short, short))
    return local * narrow + (c.layers - local) * seen(short), c.layers * own * short
  both_ways, cross = c.encoder_layers * long // parts * long, c.decoder_layers * own * long
  return both_ways + c.decoder_layers * seen(short) + cross, both_ways + c.decoder_layers * own * short + cross
