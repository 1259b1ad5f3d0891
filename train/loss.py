"""Cross entropy over the vocabulary without the array [B,T,V], with its own gradient.

Logits of a chunk of tokens are made, used for the loss and for both gradients, and dropped. Every figure is a sum over
tokens; the caller divides once, by the global weight. Axis letters: see `models/model.py`; N is tokens of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from models.sharding import BATCH, CONTEXT, pin, platform, spec, split_over

_HIDDEN = -1e30  # logit of the vocabulary's padding: no probability, and finite
_SUMMED = 16  # columns that a CPU takes together


def token_losses(
  x_BTD: jax.Array,
  w_DV: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  vocab_size: int,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  chunk_tokens: int = 512,
  logit_cap: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Weighted sum of token losses, differentiable in `x` and `w`.

  Args:
    x_BTD: features in the compute dtype.
    w_DV: float32 output matrix.
    targets_BT: int32.
    weights_BT: float32; 0 where there is nothing to predict.
    vocab_size: columns of `w` from here on are padding and get no probability.
    z_loss: weight of log(Z)² (Chowdhery et al. 2022, §5).
    label_smoothing: share ε of each target's probability that is spread evenly over the vocabulary (Szegedy et al.
      2016, §7): the target's nll becomes (1 - ε) · nll + ε · the mean nll of all tokens.
    chunk_tokens: tokens whose logits exist at one time on a device.
    logit_cap: see `Model`.

  Returns:
    The sum of `weight · (smoothed nll + z_loss · log(Z)²)`, to be differentiated, and per token, float32 [B,T] and not
    differentiated: `nll` (of the target alone), `z_loss` (unweighted by tokens) and `correct` (the argmax was right).
  """
  w_DV = pin(w_DV.astype(x_BTD.dtype), None, "tensor")
  settings = (vocab_size, z_loss, label_smoothing, chunk_tokens, logit_cap)
  return _token_losses(settings, x_BTD, w_DV, targets_BT, weights_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(settings, x_BTD, w_DV, targets_BT, weights_BT):
  return _per_device(settings, False, x_BTD, w_DV, targets_BT, weights_BT)[:2]


def _forward(settings, x_BTD, w_DV, targets_BT, weights_BT):
  total, tokens, dx, dw = _per_device(settings, True, x_BTD, w_DV, targets_BT, weights_BT)
  return (total, tokens), (dx, dw)


def _backward(settings, gradients, cotangents):
  dx, dw = gradients
  scale = cotangents[0]
  return (dx * scale).astype(dx.dtype), (dw * scale).astype(dx.dtype), None, None


_token_losses.defvjp(_forward, _backward)


def _per_device(settings, with_gradient, *arrays):
  """Runs the chunk loop on each device's rows and vocabulary columns; one reduction at the end."""
  if spec() is None:  # no mesh, or already per-device: all columns are here, and the caller reduces
    return _chunk_loop(settings, with_gradient, (), *arrays)
  axis = split_over(arrays[0])
  over = BATCH if axis is None else (*BATCH, CONTEXT)
  rows, columns, whole = P(BATCH, axis), P(None, "tensor"), P()
  tokens = {"nll": rows, "z_loss": rows, "correct": rows}
  outputs = (whole, tokens) + ((rows, columns) if with_gradient else (None, None))
  # check_vma is off because each output is reduced by hand, here and in _chunk_loop; nothing is differentiated inside.
  run = partial(_chunk_loop, settings, with_gradient, over)
  return jax.shard_map(run, in_specs=(rows, columns, rows, rows), out_specs=outputs, check_vma=False)(*arrays)


def _chunk_loop(settings, with_gradient, over, x_BTD, w_DV, targets_BT, weights_BT):
  """`over`: the mesh axes that tokens are split over; () where there is no mesh."""
  vocab_size, z_loss, smoothing, chunk_tokens, cap = settings
  shape, count = targets_BT.shape, targets_BT.size
  size = min(chunk_tokens, count)
  chunks = -(-count // size)

  def cut(x):  # tokens in chunks; the last one filled up with weight 0
    x = x.reshape((count,) + x.shape[2:])
    x = jnp.pad(x, ((0, chunks * size - count),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape((chunks, size) + x.shape[1:])

  def over_columns(reduce, x):
    return reduce(x, "tensor") if over else x

  columns = w_DV.shape[1]
  first = jax.lax.axis_index("tensor") * columns if over else 0
  column_V = first + jnp.arange(columns)
  padded = columns * (jax.lax.axis_size("tensor") if over else 1) > vocab_size

  def body(dw, chunk):
    x_ND, target_N, weight_N = chunk
    logits_NV = jnp.einsum("ND,DV->NV", x_ND, w_DV, preferred_element_type=jnp.float32)
    capped_NV = jnp.tanh(logits_NV / cap) if cap else None
    logits_NV = cap * capped_NV if cap else logits_NV
    if padded:
      logits_NV = jnp.where(column_V < vocab_size, logits_NV, _HIDDEN)
    top_N = over_columns(jax.lax.pmax, _by_row(jnp.max, logits_NV))
    exp_NV = jnp.exp(logits_NV - top_N[:, None])
    sum_N = over_columns(jax.lax.psum, _by_row(jnp.sum, exp_NV))
    log_z_N = jnp.log(sum_N) + top_N
    hit_NV = column_V == target_N[:, None]
    target_logit_N = over_columns(jax.lax.psum, _by_row(jnp.sum, jnp.where(hit_NV, logits_NV, 0.0)))
    nll_N, z_N = log_z_N - target_logit_N, z_loss * jnp.square(log_z_N)
    tokens = {"nll": nll_N, "z_loss": z_N, "correct": (target_logit_N >= top_N).astype(jnp.float32)}
    if smoothing:
      real_NV = column_V < vocab_size
      sums_N = over_columns(jax.lax.psum, _by_row(jnp.sum, jnp.where(real_NV, logits_NV, 0.0)))
      nll_N = (1.0 - smoothing) * nll_N + smoothing * (log_z_N - sums_N / vocab_size)
      hit_NV = (1.0 - smoothing) * hit_NV + (smoothing / vocab_size) * real_NV
    if not with_gradient:
      return dw, (tokens, jnp.sum(weight_N * (nll_N + z_N)), None)
    share_NV = exp_NV * ((1.0 + 2.0 * z_loss * log_z_N) / sum_N)[:, None]
    d_NV = (share_NV - hit_NV) * weight_N[:, None]
    d_NV = (d_NV * (1.0 - jnp.square(capped_NV)) if cap else d_NV).astype(x_ND.dtype)
    dw += jnp.einsum("ND,NV->DV", x_ND, d_NV, preferred_element_type=jnp.float32)
    return dw, (tokens, jnp.sum(weight_N * (nll_N + z_N)), jnp.einsum("NV,DV->ND", d_NV, w_DV))

  dw = jnp.zeros(w_DV.shape, jnp.float32) if with_gradient else None
  dw, (tokens, totals, dx) = jax.lax.scan(body, dw, (cut(x_BTD), cut(targets_BT), cut(weights_BT)))
  tokens = {name: value.reshape(-1)[:count].reshape(shape) for name, value in tokens.items()}
  total = jnp.sum(totals)
  total = jax.lax.psum(total, over) if over else total
  if not with_gradient:
    return total, tokens, None, None
  dx = over_columns(jax.lax.psum, dx.reshape(-1, x_BTD.shape[-1])[:count].reshape(x_BTD.shape))
  return total, tokens, dx, (jax.lax.psum(dw, over) if over else dw)


def _by_row(reduce, x_NV):
  """Returns the largest element or the sum of each row, [N].

  XLA reduces a row that is longer than 32 by windows on a CPU, each step as a program of its own that first writes out
  what it reads. Shorter sums it works out with what makes their terms: a long row is a quarter of the time so.
  """
  while platform() == "cpu" and x_NV.shape[1] > _SUMMED:
    width = x_NV.shape[1] // _SUMMED
    parts_NW = reduce(x_NV[:, : _SUMMED * width].reshape(-1, _SUMMED, width), axis=1)
    x_NV = jnp.concatenate([parts_NW, x_NV[:, _SUMMED * width :]], axis=1)
  return reduce(x_NV, axis=1)
