"""Sampling draws what it should, on any mesh; self-generated replay is made once and goes on bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decode
from models.sharding import make_mesh, on_mesh
from tests.conftest import distinct_params, small_model
from tests.test_train import batches_of, config_of, domain, one_cpu, params_of, run  # noqa: F401  fixtures
from train import loop
from train.checkpoint import Checkpoints
from train.recipe import load_materials

ENDS = {"room": 12, "eos_id": 1, "pad_id": 0}


def written(form, mesh, rows=8, **settings):
  """Tokens that a random model writes after prompts of different lengths; greedily without settings."""
  model = small_model(form)
  prompts = [[5, 6, 7][: 1 + i % 3] for i in range(rows)]
  with jax.set_mesh(mesh):
    params, inputs = distinct_params(model), on_mesh(model.prompts(prompts, 4, 0))
    if settings:
      key, choice = jax.random.key(3), decode.Choice(**{"temperature": 1.0, **settings})
      return np.asarray(jax.jit(lambda p, i: decode.write(model, p, i, key, choice=choice, **ENDS))(params, inputs))
    return np.asarray(jax.jit(lambda p, i: decode.write(model, p, i, **ENDS))(params, inputs))


@pytest.mark.parametrize("form", ["gpt", "t5"])
@pytest.mark.parametrize("settings", [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-6}])
def test_the_likeliest_alone_is_greedy(form, settings):
  mesh = make_mesh({}, jax.devices()[:1])
  assert (written(form, mesh, **settings) == written(form, mesh)).all()


@pytest.mark.parametrize("form", ["gpt", "t5"])
def test_the_same_draws_on_one_device_and_on_eight(form):
  one, eight = (
    written(form, make_mesh(sizes, jax.devices()[:n]), temperature=1.5, top_p=0.9)
    for sizes, n in (({}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 8))
  )
  assert (one == eight).all() and (one != written(form, make_mesh({}, jax.devices()[:1]))).any()


def test_draws_follow_the_distribution():
  """20,000 first tokens of a GPT against softmax(logits / temperature): within 5 standard errors, each."""
  model, rows, temperature = small_model("gpt"), 20_000, 0.7
  with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
    params = jax.tree.map(lambda leaf: leaf * 0.5, distinct_params(model))
    inputs = on_mesh(model.prompts([[]] * rows, 1, 0))
    settings = {"room": 1, "eos_id": 1, "pad_id": 0, "choice": decode.Choice(temperature)}
    drawn = np.asarray(jax.jit(lambda: decode.write(model, params, inputs, jax.random.key(0), **settings))())[:, 0]
    few = jax.tree.map(lambda leaf: leaf[:1], inputs)
    logits, _ = model.extend(params, model.prefill(params, few, 1), few["first"][:, None])
  expected = np.asarray(jax.nn.softmax(logits[0, -1] / temperature))
  frequency = np.bincount(drawn, minlength=len(expected)) / rows
  assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / rows) + 1e-9).all()
  assert (frequency > 0).sum() > 5


def test_the_nucleus_is_the_smallest_that_has_the_probability():
  logits = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]]))
  kept = np.asarray(decode.likeliest(logits, top_k=0, top_p=0.75)) > -np.inf
  assert kept.tolist() == [[False, True, True, True], [True, False, False, False]]
  kept = np.asarray(decode.likeliest(logits[:1], top_k=2, top_p=1.0)) > -np.inf
  assert kept.tolist() == [[False, True, True, False]]


_RANGES = "temperature and top_k must be 0 or more, top_p above 0 and at most 1"


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_out_of_range_are_refused(settings):
  with pytest.raises(ValueError, match=_RANGES):
    written("gpt", make_mesh({}, jax.devices()[:1]), **settings)


def test_draws_need_a_key():
  with pytest.raises(ValueError, match="drawing needs a key"):
    decode.write(small_model("gpt"), {}, {}, choice=decode.Choice(1.0), **ENDS)


def replaying(folder, architecture, base, **more):
  mixture = {"domain": 0.7, "replay": 0.3}
  config = config_of(
    folder, architecture, **{"init_from": str(base), "data.mixture": mixture, "train.steps": 6, **more}
  )
  config.replay.update({"documents": 20, "tokens": 24})
  return config


@pytest.mark.parametrize("architecture", ["gpt", "t5"])
def test_replay_is_sampled_once_and_resumed(domain, tmp_path, one_cpu, architecture, capsys):  # noqa: F811
  base, workdir = tmp_path / "base", tmp_path / "next"
  run(config_of(domain, architecture, **{"train.steps": 3, "data.mixture": {"domain": 1.0}}), base)
  straight = run(replaying(domain, architecture, base), tmp_path / "straight")
  texts = [json.loads(line)["text"] for line in (tmp_path / "straight" / "replay.jsonl").read_text().splitlines()]
  assert 0 < len(texts) <= 20 and all(texts) and len(set(texts)) == len(texts)
  counts = straight.record["counts"]
  drawn = counts["replay"]["examples"] / (counts["replay"]["examples"] + counts["domain"]["examples"])
  assert drawn == pytest.approx(0.3, abs=0.1) and counts["replay"]["asked"] == pytest.approx(0.3)

  write = loop.Log.write

  def stop_at_5(log, step, *rest):
    if step == 5:  # between two checkpoints
      raise KeyboardInterrupt
    write(log, step, *rest)

  with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(loop.Log, "write", stop_at_5)
    run(replaying(domain, architecture, base), workdir)
  assert Checkpoints(workdir).latest() == 4
  capsys.readouterr()
  resumed = run(replaying(domain, architecture, base), workdir)
  assert "documents sampled" not in capsys.readouterr().out
  assert batches_of(workdir) == batches_of(tmp_path / "straight")
  assert all((a == b).all() for a, b in zip(params_of(straight), params_of(resumed), strict=True))


def test_another_checkpoint_or_setting_is_sampled_anew(domain, tmp_path, one_cpu, capsys):  # noqa: F811
  from train import replay
  from train.loop import build_model

  base, workdir = tmp_path / "base", tmp_path / "next"
  run(config_of(domain, **{"train.steps": 1}), base)
  config = replaying(domain, "gpt", base)
  workdir.mkdir()
  tokenizer = load_materials(config, workdir).tokenizer
  mesh = make_mesh({}, jax.devices()[:1])

  def digest():
    with jax.set_mesh(mesh):
      return replay.replay_texts(config, workdir, tokenizer, build_model(config, tokenizer), mesh).digest()

  first = digest()
  assert capsys.readouterr().out.count("documents sampled") == 1
  assert digest() == first and "documents sampled" not in capsys.readouterr().out
  config.replay.temperature = 0.5
  assert digest() != first and "documents sampled" in capsys.readouterr().out
  config.replay.temperature = 0.0
  with pytest.raises(ValueError, match="config.replay.temperature must be above 0"):
    digest()


def test_replay_needs_a_checkpoint(domain, tmp_path, one_cpu):  # noqa: F811
  with pytest.raises(ValueError, match="starts from scratch; set config.init_from"):
    run(replaying(domain, "gpt", ""), tmp_path)
