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


def attention_pairs(model: Model, encoder_length: int, decoder_length: int) -> tuple[int, int]:
  """Returns the (query, key) pairs of a row in all layers: those that may be seen, and all.

  Example:
    A causal layer of 4 tokens has 10 of 16.
  """
  c, long, short = model.config, encoder_length, decoder_length
  causal = short * (short + 1) // 2
  if not hasattr(c, "encoder_layers"):
    window = min(c.window or short, short)
    local, narrow = int(c.local.sum()), window * (window + 1) // 2 + (short - window) * window
    return local * narrow + (c.layers - local) * causal, c.layers * short * short
  both_ways, cross = c.encoder_layers * long * long, c.decoder_layers * short * long
  return both_ways + c.decoder_layers * causal + cross, both_ways + c.decoder_layers * short * short + cross
