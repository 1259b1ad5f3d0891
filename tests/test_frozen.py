"""Parameters frozen by path: no gradient, no optimizer state, complete checkpoints."""

import jax
import pytest

from models.sharding import by_path
from tests.conftest import small_model
from tests.test_state_kept import stopped_and_resumed
from tests.test_train import EVERY, config_of, domain, one_cpu, params_of, run  # noqa: F401
from train import loop, stage
from train.checkpoint import Checkpoints
from train.flops import model_flops
from train.tuning import build_tuning, frozen_paths

FROZEN = {"train.frozen": "embed/|layers/attention/", "optimizer.warmup_steps": 1, "train.steps": EVERY + 3}


def test_what_is_frozen_stays_and_the_checkpoint_is_complete(domain, tmp_path, one_cpu, monkeypatch, capsys):  # noqa: F811
  first = run(config_of(domain, **{"train.steps": 2}), tmp_path / "first")
  config = config_of(domain, **FROZEN, init_from=str(tmp_path / "first"))
  done = stopped_and_resumed(config, tmp_path, monkeypatch)
  assert "parameters are trained beside" in capsys.readouterr().out
  before, after = by_path(jax.device_get(first.params)), by_path(jax.device_get(done.params))
  changed = {path for path in after if (before[path] != after[path]).any()}
  assert before.keys() == after.keys()
  assert changed == {path for path in after if "embed/" not in path and "/attention/" not in path}
  with jax.set_mesh(done.mesh), Checkpoints(tmp_path / "straight") as checkpoints:
    held = checkpoints.restore_params(EVERY + 3, stage.params_like(done.model, done.mesh))
    like = loop.state_like(config, done.model, done.mesh)
  assert all((by_path(held)[path] == after[path]).all() for path in after)
  moments = by_path(like["opt"])
  assert any("mlp/up" in path for path in moments)
  assert not [path for path in moments if "embed/" in path or "/attention/" in path]
  # Whatever comes after needs that folder alone.
  (tmp_path / "first").rename(tmp_path / "elsewhere")
  onward = run(config_of(domain, **{"train.steps": 1, "init_from": str(tmp_path / "straight")}), tmp_path / "onward")
  assert onward.record["steps"] == 1 and len(params_of(onward)) == len(after)


@pytest.mark.parametrize(("pattern", "what"), [("norm$", "no parameter"), ("", "every parameter")])
def test_a_pattern_that_divides_nothing_is_refused(pattern, what):
  shapes = jax.eval_shape(small_model("gpt").init, jax.random.key(0))
  with pytest.raises(ValueError, match=f"matches {what}; they are .*layers/mlp/up"):
    frozen_paths(pattern).split(shapes)


def test_frozen_paths_and_adapters_do_not_go_together(domain):  # noqa: F811
  with pytest.raises(ValueError, match="adapters freeze every weight"):
    build_tuning(config_of(domain, **FROZEN, **{"lora.rank": 2}))


@pytest.mark.parametrize(("form", "head"), [("gpt", "embed/tokens"), ("t5", "head/kernel")])
def test_a_frozen_matrix_takes_two_thirds_of_the_flops(form, head):
  model = small_model(form)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  lengths = (16 if form == "t5" else 0, 12)
  whole = model_flops(model, shapes, 4, *lengths)
  trained, frozen = frozen_paths(head).split(shapes)
  assert list(by_path(frozen)) == [head] and len(by_path(trained)) == len(by_path(shapes)) - 1
  assert whole - model_flops(model, shapes, 4, *lengths, frozen) == 2 * model.config.vocab_size * 32 * 4 * 12
