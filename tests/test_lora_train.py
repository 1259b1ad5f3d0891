"""Stages of adapters: only adapters are stored, a stopped run goes on bit for bit, later stages load merged weights."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import quickstart
from models.sharding import make_mesh
from scripts import export_model as export_command
from tests.test_exchange import published
from tests.test_train import EVERY, batches_of, config_of, domain, one_cpu, params_of, run  # noqa: F401
from train import loop, recipe, serve, stage
from train.checkpoint import Checkpoints
from train.exchange import export_adapters, export_model, import_model, inspect_model
from train.generate import Wish, answers
from train.log import read_metrics

ADAPTERS = {"lora.rank": 4, "optimizer.name": "adamw", "optimizer.learning_rate": 1e-2}


def adapted(domain, base, architecture="gpt", steps=6, **more):  # noqa: F811
  """The config of a stage of adapters on the stage in the folder `base`; "" = on weights from scratch."""
  return config_of(domain, architecture, **{**ADAPTERS, "init_from": str(base), "train.steps": steps, **more})


@pytest.fixture(scope="module", params=["gpt", pytest.param("t5", marks=pytest.mark.slow)])
def chain(request, domain, tmp_path_factory):  # noqa: F811
  """A recipe-like chain in one folder: a full stage, adapters on it, adapters on those."""
  folder, architecture = tmp_path_factory.mktemp(request.param) / "stages", request.param
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    runs = {"base": run(config_of(domain, architecture, **{"train.steps": 6}), folder / "base")}
    for name, base in (("continued", "base"), ("multitask", "continued")):
      runs[name] = run(adapted(domain, folder / base, architecture), folder / name)
  return architecture, folder, runs


def loaded(folder, run) -> list[np.ndarray]:  # noqa: F811
  with jax.set_mesh(run.mesh):
    return jax.tree.leaves(jax.device_get(stage.load_params(folder, run.model, run.mesh)))


def test_a_chain_of_adapters_loads_merged(chain, domain):  # noqa: F811
  _, folder, runs = chain
  params = {name: params_of(finished) for name, finished in runs.items()}
  for name, finished in runs.items():
    assert all((a == b).all() for a, b in zip(params[name], loaded(folder / name, finished), strict=True))
  paths = list(flatten_dict(runs["base"].params, sep="/"))
  for before, after in (("base", "continued"), ("continued", "multitask")):
    changed = {path for path, a, b in zip(paths, params[before], params[after], strict=True) if (a != b).any()}
    assert changed == {path for path in paths if path.rpartition("/")[2] in TARGETED}


TARGETED = ("query", "key", "value", "out", "gate", "up", "down")


def test_a_stage_of_adapters_serves_without_knowing_of_them(chain):
  architecture, folder, runs = chain
  with serve.load(folder.parent) as model:
    assert model.folder == folder / "multitask"
    served = jax.tree.leaves(jax.device_get(model.evaluator.params))
    assert len(answers(model.evaluator, ["obs stable"], Wish(room=3))) == 1
  for a, b in zip(params_of(runs["multitask"]), served, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)  # on eight devices, merged there


def test_a_checkpoint_holds_adapters_only(chain):
  _, folder, runs = chain
  sizes = {}
  for name in ("base", "continued"):
    step = folder / name / "checkpoints" / "6"
    assert {item.name for item in step.iterdir() if item.is_dir()} == {"params", "opt", "run"}
    sizes[name] = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
    for item in ("params", "opt"):
      paths = [path for path in json.loads((step / item / "_METADATA").read_text())["tree_metadata"]]
      arrays = [path for path in paths if "layers" in path]
      assert arrays and all(("lora_" in path) == (name == "continued") for path in arrays)
      assert any("embed" in path for path in paths) == (name == "base")
  assert sizes["continued"] < sizes["base"]


def test_a_stopped_run_goes_on_bit_for_bit(chain, domain, tmp_path, one_cpu, monkeypatch, capsys):  # noqa: F811
  config, seen = adapted(domain, chain[1] / "continued", chain[0], steps=14), []
  straight = run(config, tmp_path / "straight")
  checksum = loop.checksum_of

  def power_cut(batch):
    seen.append(0)
    if len(seen) == EVERY + 4:
      raise RuntimeError("power cut")
    return checksum(batch)

  monkeypatch.setattr(loop, "checksum_of", power_cut)
  with pytest.raises(RuntimeError, match="power cut"):
    run(config, tmp_path / "stopped")
  with Checkpoints(tmp_path / "stopped") as checkpoints:
    assert checkpoints.latest() == EVERY
  resumed = run(config, tmp_path / "stopped")
  assert f"going on from step {EVERY}" in capsys.readouterr().out
  assert all((a == b).all() for a, b in zip(params_of(straight), params_of(resumed), strict=True))
  assert batches_of(tmp_path / "stopped") == batches_of(tmp_path / "straight")
  assert resumed.record["base"] == straight.record["base"] == stage.identity(chain[1] / "continued")


def test_adapters_learn_and_say_how_few_they_are(domain, tmp_path, one_cpu, capsys):  # noqa: F811
  # A T5's output matrix is large enough from the start for the layers before it to learn beside it.
  config = adapted(domain, "", "t5", steps=40, **{"lora.targets": "mlp/(up|down)$", "optimizer.learning_rate": 2e-2})
  finished, out = run(config, tmp_path), capsys.readouterr().out
  losses = [record["loss"] for record in read_metrics(tmp_path)]
  assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
  with jax.set_mesh(finished.mesh):
    start = jax.device_get(stage.scratch_params(config, finished.model, finished.mesh))
  same = jax.tree.map(lambda a, b: bool((a == b).all()), start, jax.device_get(finished.params))
  changed = {path for path, unchanged in flatten_dict(same, sep="/").items() if not unchanged}
  assert changed == {f"{stack}/layers/mlp/{name}" for stack in ("encoder", "decoder") for name in ("up", "down")}
  total = sum(leaf.size for leaf in jax.tree.leaves(start))
  own = 2 * 2 * 4 * (32 + 384)  # two matrices in two layers, rank 4, from 32 to 384 and back
  assert "test: WARNING adapters beside random weights" in out
  assert f"test: {own:,} parameters are trained beside {total:,} frozen ones" in out
  # Weights from scratch are made again where adapters are loaded.
  assert all((a == b).all() for a, b in zip(params_of(finished), loaded(tmp_path, finished), strict=True))


def test_another_adapter_is_refused(chain, domain, one_cpu):  # noqa: F811
  architecture, folder, _ = chain
  with pytest.raises(ValueError, match=r"lora.alpha: 16.0 then, 8.0 now"):
    run(adapted(domain, folder / "base", architecture, **{"lora.alpha": 8.0}), folder / "continued")


def test_weights_that_have_changed_or_gone_are_refused(chain, domain, tmp_path, one_cpu):  # noqa: F811
  architecture, old, runs = chain
  folder, finished = tmp_path / "copied" / "stages", runs["multitask"]
  shutil.copytree(old, folder)
  for name in ("continued", "multitask"):  # as on another machine: the paths of the config lead nowhere
    text = (folder / name / "config.json").read_text()
    (folder / name / "config.json").write_text(text.replace(str(old), "/nowhere/stages"))
  # Moved as a whole, the stages find each other.
  copied = loaded(folder / "multitask", finished)
  assert all((a == b).all() for a, b in zip(params_of(finished), copied, strict=True))
  shutil.move(folder / "base", folder / "elsewhere")
  with pytest.raises(FileNotFoundError, match=r"copied/stages/continued holds adapters.*/nowhere/stages/base.*gone"):
    loaded(folder / "multitask", finished)
  # Another run's weights in the place of the right ones.
  run(config_of(domain, architecture, **{"train.steps": 6, "seed": 1}), folder / "base")
  with pytest.raises(ValueError, match=r"holds adapters for the checkpoint .*but that in .*stages/base is"):
    loaded(folder / "continued", finished)
  with pytest.raises(ValueError, match="it was trained on or made anew"):
    run(adapted(domain, folder / "base", architecture), folder / "continued")


def test_a_renamed_run_finds_its_weights_where_another_run_took_its_place(chain, domain, tmp_path, one_cpu):  # noqa: F811
  architecture, old, runs = chain
  kept, new = tmp_path / "kept" / "stages", tmp_path / "new" / "stages"
  shutil.copytree(old, kept)
  config = kept / "continued" / "config.json"
  config.write_text(config.read_text().replace(str(old), str(new)))
  run(config_of(domain, architecture, **{"train.steps": 1, "seed": 1}), new / "base")
  again = loaded(kept / "continued", runs["continued"])
  assert all((a == b).all() for a, b in zip(params_of(runs["continued"]), again, strict=True))


def test_published_weights_are_adapted_exported_and_imported(domain, tmp_path, one_cpu, capsys):  # noqa: F811
  published(tmp_path / "hf", "gpt2", layers=1)
  config = stage.inherit(adapted(domain, tmp_path / "hf", steps=6, **{"lora.rank_stabilised": True}))
  finished = run(config, tmp_path / "adapted")
  (tmp_path / "adapted" / "calibration.json").write_text("{}")  # the recipe's
  export_adapters(str(tmp_path / "adapted"), tmp_path / "peft")
  assert "gpt2, adapters of" in capsys.readouterr().out
  assert (
    json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == config.init_from
  )
  import_model(str(tmp_path / "hf"), tmp_path / "merged", str(tmp_path / "peft"))
  for a, b in zip(params_of(finished), loaded(tmp_path / "merged", finished), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  # Merged they are asked as their stage was; without a word of it the calibration of other weights says nothing.
  assert stage.read_tasks(tmp_path / "merged") == stage.read_tasks(tmp_path / "adapted") != {}
  assert stage.read_config(tmp_path / "merged").data.decoder_length == config.data.decoder_length
  assert (tmp_path / "merged" / "calibration.json").exists()
  shutil.move(tmp_path / "peft" / "calibration.json", tmp_path / "hf")
  (tmp_path / "peft" / stage.ASKED_AS).unlink()
  import_model(str(tmp_path / "hf"), tmp_path / "others", str(tmp_path / "peft"))
  assert not (tmp_path / "others" / "calibration.json").exists()
  changed = next(path for path in (tmp_path / "hf").glob("*.safetensors"))
  export_model(str(tmp_path / "adapted"), tmp_path / "whole", "float32", 10**9)
  shutil.copy(tmp_path / "whole" / changed.name, changed)  # other values of the same shapes
  with pytest.raises(ValueError, match="holds adapters for the checkpoint .*model.safetensors"):
    loaded(tmp_path / "adapted", finished)
  with pytest.raises(ValueError, match="has no adapters"):
    export_adapters(str(tmp_path / "merged"), tmp_path / "none")
  with pytest.raises(ValueError, match="--dtype and --file_megabytes are of a whole model"):
    export_command.main(
      [f"--from={tmp_path / 'adapted'}", f"--to={tmp_path / 'none'}", "--what=adapters", "--dtype=bfloat16"]
    )
  about = tmp_path / "adapted" / "config.json"
  about.write_text(about.read_text().replace('"bidirectional_prefix": false', '"bidirectional_prefix": true'))
  with pytest.raises(ValueError, match="no Hugging Face model computes"):
    export_adapters(str(tmp_path / "adapted"), tmp_path / "none")


def test_adapters_beside_weights_stored_in_bfloat16(domain, tmp_path, one_cpu):  # noqa: F811
  finished = run(adapted(domain, "", steps=2, **{"model.storage": "bfloat16"}), tmp_path)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(finished.params)} == {"bfloat16"}
  with Checkpoints(tmp_path) as checkpoints:
    like = loop.state_like(stage.read_config(tmp_path), finished.model, finished.mesh)["params"]
    stored = checkpoints.restore_params(2, like)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(stored)} == {"float32"}
  assert all((a == b).all() for a, b in zip(params_of(finished), loaded(tmp_path, finished), strict=True))


def test_memory_is_counted_for_what_is_trained(chain):
  _, folder, _ = chain
  said = ["\n".join(inspect_model(str(folder / name), {}, 8, 128)) for name in ("base", "continued")]
  weights, gradients = (
    [float(part.partition(f"{what} ")[2].partition(" MiB")[0]) for part in said] for what in ("weights", "gradients")
  )
  assert gradients[0] == weights[0] <= weights[1] and gradients[1] < gradients[0] / 2


def test_one_stage_of_a_recipe_can_have_adapters(tmp_path):
  config = quickstart.get_config("gpt")
  with config.unlocked():
    config.stages.multitask.lora = {"rank": 8, "alpha": 32.0}
  ranks = [
    recipe.stage_config(config, recipe.Stage(name, "", name), tmp_path).lora.rank for name in ("continued", "multitask")
  ]
  assert ranks == [0, 8]
