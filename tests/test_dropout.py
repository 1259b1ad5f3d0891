"""Dropout: where the published models have it, at the rate that is asked, and not without a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import gpt, t5
from models.attention import xla_attention
from models.layers import Mlp
from models.module import pure
from models.visibility import Drop, Visibility
from tests.conftest import FORMS, distinct_params, packed_batch, small_model


@pytest.mark.parametrize("form", ["gpt", "gpt2", "t5"])
def test_without_a_key_nothing_is_dropped(form):
  params, batch = distinct_params(small_model(form)), packed_batch(FORMS[form][0], rows=2)
  plain, dropping = (jax.jit(small_model(form, dropout=rate).features) for rate in (0.0, 0.5))
  assert (plain(params, batch) == dropping(params, batch)).all()
  with_key = [np.asarray(dropping(params, batch, jax.random.key(seed))) for seed in (0, 0, 1)]
  assert (with_key[0] == with_key[1]).all() and (with_key[0] != with_key[2]).any()
  assert (plain(params, batch, jax.random.key(0)) == plain(params, batch)).all()


def test_attention_weights_are_dropped_at_the_rate_and_scaled_up():
  rng, length = np.random.default_rng(0), 64
  q, k = (jnp.asarray(rng.normal(size=(2, length, 2, *group, 8)), jnp.float32) for group in ((2,), ()))
  v = jnp.broadcast_to(jnp.eye(length)[None, :, None], (2, length, 2, length))  # so that outputs are weights
  ones = jnp.ones((2, length), jnp.int32)
  view = Visibility(ones, ones, causal=False)
  whole = np.asarray(xla_attention(q, k, v, view, None, 0.3))
  dropped = np.asarray(xla_attention(q, k, v, view, None, 0.3, drop=Drop(0.25, jax.random.key(0))))
  assert (dropped == 0).mean() == pytest.approx(0.25, abs=0.01)
  np.testing.assert_allclose(dropped[dropped > 0], whole[dropped > 0] / 0.75, rtol=1e-5)
  assert len({tuple(np.flatnonzero(head == 0)) for head in dropped.reshape(2, length, 4, length)[0, 0]}) == 4


def test_hidden_activations_are_dropped_at_the_rate_and_scaled_up():
  mlp = pure(lambda rngs: Mlp(rngs, 4, 512, "relu", False, False, (1.0, 1.0)))
  params = {"up": jnp.ones((4, 512)), "down": jnp.eye(512)}  # so that outputs are hidden activations of 4
  x = jnp.ones((2, 8, 4))
  assert (mlp.apply(params, x) == 4).all() and (mlp.apply(params, x, 0.25) == 4).all()
  dropped = np.asarray(mlp.apply(params, x, 0.25, jax.random.key(0)))
  assert (dropped == 0).mean() == pytest.approx(0.25, abs=0.02)
  np.testing.assert_allclose(dropped[dropped > 0], 4 / 0.75, rtol=1e-6)


@pytest.mark.parametrize(("form", "drops"), [("gpt", False), ("gpt2", True), ("t5", True)])
def test_attention_weights_are_dropped_where_the_published_model_does(form, drops, monkeypatch):
  model, batch = small_model(form, dropout=0.5), packed_batch(FORMS[form][0], rows=1)
  keys = []
  monkeypatch.setattr(
    {"gpt": gpt, "t5": t5}[FORMS[form][0]], "Drop", lambda rate, key: keys.append(rate) or Drop(rate, key)
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  jax.eval_shape(model.features, shapes, batch, jax.random.key(0))
  assert set(keys) == ({0.5} if drops else set())
