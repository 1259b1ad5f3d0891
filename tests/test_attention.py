"""Attention: T5's buckets exactly, and what may be seen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention
from models.attention import relative_bucket, rotary_frequencies, rotate, rotation
from models.visibility import Visibility, visible


def buckets(bidirectional: bool, distances) -> list[int]:
  return relative_bucket(jnp.array(distances), bidirectional, 32, 128).tolist()


def test_bidirectional_buckets():
  edges = [
    (0, 0),
    (7, 7),
    (8, 8),
    (11, 8),
    (12, 9),
    (15, 9),
    (16, 10),
    (22, 10),
    (23, 11),
    (31, 11),
    (32, 12),
    (45, 12),
  ]
  edges += [(46, 13), (63, 13), (64, 14), (90, 14), (91, 15), (128, 15), (5000, 15)]
  left = [-distance for distance, _ in edges]
  assert buckets(True, left) == [bucket for _, bucket in edges]
  assert buckets(True, [distance for distance, _ in edges[1:]]) == [16 + bucket for _, bucket in edges[1:]]


def test_causal_buckets():
  starts = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
  assert buckets(False, [-d for d in range(16)]) == list(range(16))
  assert buckets(False, [-d for d in starts]) == list(range(16, 32))
  assert buckets(False, [1 - d for d in starts[1:]]) == list(range(16, 31))
  assert buckets(False, [3, 100, -5000]) == [0, 0, 31]


def test_visibility_of_a_packed_row():
  segments = jnp.array([[1, 1, 2, 2, 0]])
  causal = visible(Visibility(segments, segments, causal=True))[0].astype(int).tolist()
  assert causal[1] == [1, 1, 0, 0, 0] and causal[3] == [0, 0, 1, 1, 0]
  flags = jnp.array([[1, 1, 1, 0, 0]])
  prefix = visible(Visibility(segments, segments, causal=True, bidirectional_BT=flags))[0].astype(int).tolist()
  assert prefix[0] == [1, 1, 0, 0, 0] and prefix[2] == [0, 0, 1, 0, 0]


def test_rotation_depends_on_distance_only():
  rng = np.random.default_rng(0)
  q, k = (jnp.array(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
  frequency = rotary_frequencies(8, 10_000.0)

  def product(query_at: int, key_at: int) -> float:
    here, there = (rotate(x, rotation(jnp.array([[p]]), frequency)) for x, p in ((q, query_at), (k, key_at)))
    return float(jnp.sum(here * there))

  assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
  assert product(7, 3) != pytest.approx(product(7, 5), abs=1e-3)


def test_a_tpus_turn_by_a_product_is_that_by_halves(monkeypatch):
  x, g = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 64), jnp.bfloat16)
  np.testing.assert_array_equal(attention.turned_by_product(x), attention.turned_by_halves(x))
  turn = rotation(jnp.tile(jnp.arange(5) * 7, (2, 1)), rotary_frequencies(64, 10_000.0))
  halves, back = jax.vjp(partial(rotate, turn=turn), x)
  monkeypatch.setattr(attention, "platform", lambda: "tpu")
  monkeypatch.setattr(attention, "turned_by_halves", lambda _: pytest.fail("not by a product"))
  product, back_by_product = jax.vjp(partial(rotate, turn=turn), x)
  np.testing.assert_array_equal(product, halves)
  for ours, theirs in zip(back_by_product(g), back(g), strict=True):
    np.testing.assert_allclose(*(np.asarray(z, np.float32) for z in (ours, theirs)), atol=0.03)


def test_rotary_scalings():
  plain = rotary_frequencies(128, 500_000.0)
  np.testing.assert_allclose(rotary_frequencies(128, 500_000.0, ("linear", 8.0)), plain / 8, rtol=1e-6)
  scaled = rotary_frequencies(128, 500_000.0, ("llama3", 8.0, 1.0, 4.0, 8192))
  wavelength = 2 * np.pi / plain
  np.testing.assert_array_equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
  np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
  between = (wavelength >= 8192 / 4) & (wavelength <= 8192)
  assert between.any() and (np.diff((scaled / plain)[between]) < 0).all()
  with pytest.raises(ValueError, match="llama3"):
    rotary_frequencies(128, 1e4, ("yarn", 4.0))
