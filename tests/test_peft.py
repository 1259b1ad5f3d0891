"""Adapters in PEFT's files: PEFT reads ours, we read PEFT's, and both models compute the same."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from models import lora, peft
from models.families import FAMILIES
from tests.conftest import small_model
from tests.test_lora import TARGETS, shapes_of

ATTENTION = "attention/(query|value)$"
# our small form -> the family that computes the same
FORMS = {"gpt2": "gpt2", "gpt-grouped": "llama", "gemma2": "gemma2", "t5": "t5", "t5-v1.0": "t5"}


def distinct(model, targets: str, rank: int = 3):
  """Adapters on the host with every entry different."""
  rng = np.random.default_rng(2)
  shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes_of(model), rank=rank, targets=targets))
  return jax.tree.map(lambda s: (rng.normal(size=s.shape) * 0.1).astype(np.float32), shapes)


def written(folder, form: str, targets: str = TARGETS, **settings):
  """Writes adapters of a small model; returns the model and the adapters."""
  model, family = small_model(form), FAMILIES[FORMS[form]]
  adapters = distinct(model, targets)
  settings = {"rank": 3, "alpha": 6.0, "rank_stabilised": False, **settings}
  peft.write(folder, adapters, family, model.config, **settings)
  return model, adapters


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("targets", [TARGETS, ATTENTION, "mlp/down$"])
@pytest.mark.parametrize("form", FORMS)
def test_what_was_written_reads_back(form, targets, rank_stabilised, tmp_path):
  model, adapters = written(tmp_path, form, targets, rank_stabilised=rank_stabilised)
  back = peft.read(tmp_path, FAMILIES[FORMS[form]], model)
  assert back.scale == pytest.approx(6 / 3**0.5 if rank_stabilised else 2.0)
  given, got = (flatten_dict(tree, sep="/") for tree in (adapters, back.params))
  assert set(given) == set(got)
  for path in given:
    np.testing.assert_allclose(got[path], given[path], rtol=1e-6, err_msg=path)


def test_the_files_have_the_names_that_users_know(tmp_path):
  written(tmp_path / "llama", "gpt-grouped")
  names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
  values = json.loads((tmp_path / "llama" / peft.CONFIG).read_text())
  assert values["target_modules"] == names and values["task_type"] == "CAUSAL_LM"
  assert (values["r"], values["lora_alpha"], values["rank_pattern"], values["fan_in_fan_out"]) == (3, 6, {}, False)
  tensors = safetensors.numpy.load_file(tmp_path / "llama" / peft.WEIGHTS)
  query = "base_model.model.model.layers.1.self_attn.q_proj"
  assert tensors[f"{query}.lora_A.weight"].shape == (3, 32) and tensors[f"{query}.lora_B.weight"].shape == (32, 3)
  assert tensors[f"{query.replace('q_proj', 'k_proj')}.lora_B.weight"].shape == (16, 3)
  # Only one of GPT-2's two kinds of c_proj is meant: they are named in full.
  written(tmp_path / "gpt2", "gpt2", "mlp/down$")
  values = json.loads((tmp_path / "gpt2" / peft.CONFIG).read_text())
  assert values["target_modules"] == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
  assert values["fan_in_fan_out"]


def parity(name: str, tmp_path):
  """A tiny model of theirs and ours with the same weights, and what compares them; skips without torch and peft."""
  pytest.importorskip("peft", reason="pip install -e '.[parity]'")
  from tests import test_hf  # skips without torch

  theirs = test_hf.reference(name)
  theirs.save_pretrained(tmp_path / "base")
  model, params = test_hf.load(tmp_path / "base")
  kind = test_hf.CASES[name][0]
  architecture = "t5" if "encoder" in params else "gpt"
  batch = test_hf.packed(architecture, test_hf.PROMPTS)
  real = batch["decoder_segment_ids"] == 1

  def compare(theirs, *trees):
    expected = test_hf.their_logits(theirs.eval(), architecture, batch)[real]
    assert np.abs(test_hf.our_logits(model, params, batch)[real] - expected).max() > 0.01  # the adapters do something
    for tree in trees:
      np.testing.assert_allclose(test_hf.our_logits(model, tree, batch)[real], expected, atol=1e-4)

  return theirs, model, params, FAMILIES[kind], compare


@pytest.mark.parametrize("targets", [TARGETS, ATTENTION])
@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma3", "t5-v1.0", "t5-v1.1"])
def test_peft_loads_ours(name, targets, tmp_path, one_device):
  theirs, model, params, family, compare = parity(name, tmp_path)
  from peft import PeftModel, get_peft_model_state_dict

  adapters, stabilised = distinct(model, targets), targets == ATTENTION
  settings = {"rank": 3, "alpha": 6.0, "rank_stabilised": stabilised, "base": str(tmp_path / "base")}
  peft.write(tmp_path / "adapter", adapters, family, model.config, **settings)
  adapted = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
  stored = safetensors.numpy.load_file(tmp_path / "adapter" / peft.WEIGHTS)
  assert {k: v.shape for k, v in get_peft_model_state_dict(adapted).items()} == {k: v.shape for k, v in stored.items()}
  scale = lora.scale_of(3, 6.0, stabilised)
  compare(adapted, lora.combine(adapters, params, scale), lora.merge(adapters, params, scale))


SETTINGS = {
  "plain": {},
  "stabilised": {"use_rslora": True},
  "patterns": {"rank_pattern": {"LAST": 2}, "alpha_pattern": {"LAST": 16}},
  "some-layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
}
MODULES = {"gpt2": ["c_attn", "c_proj"], "llama3": "all-linear", "t5-v1.1": ["q", "o", "wi_1", "wo"]}


@pytest.mark.parametrize(
  ("name", "settings"),
  [*((name, "plain") for name in MODULES), ("gpt2", "patterns"), ("llama3", "stabilised"), ("llama3", "some-layers")],
)
def test_we_load_what_peft_wrote(name, settings, tmp_path, one_device):
  theirs, model, params, family, compare = parity(name, tmp_path)
  import torch
  from peft import LoraConfig, get_peft_model

  modules, more = MODULES[name], json.loads(json.dumps(SETTINGS[settings]).replace("LAST", "c_proj"))
  config = {"r": 4, "lora_alpha": 8, "target_modules": modules, "fan_in_fan_out": name == "gpt2", **more}
  adapted = get_peft_model(theirs, LoraConfig(**config, task_type="SEQ_2_SEQ_LM" if "t5" in name else "CAUSAL_LM"))
  random = torch.Generator().manual_seed(3)
  with torch.no_grad():
    for path, parameter in adapted.named_parameters():
      if "lora_" in path:
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
  adapted.save_pretrained(tmp_path / "adapter")
  back = peft.read(tmp_path / "adapter", family, model)
  compare(adapted, lora.combine(back.params, params, back.scale), lora.merge(back.params, params, back.scale))


def damaged(folder, tensors=None, **values):
  """Changes what a written folder says."""
  config = json.loads((folder / peft.CONFIG).read_text())
  (folder / peft.CONFIG).write_text(json.dumps({**config, **values}))
  if tensors:
    safetensors.numpy.save_file(tensors(safetensors.numpy.load_file(folder / peft.WEIGHTS)), folder / peft.WEIGHTS)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"use_dora": True}, "use_dora=True.*merge them with PEFT first"),
    ({"bias": "all"}, "bias='all'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"peft_type": "IA3"}, "expected peft_type 'LORA'"),
    ({"r": "many"}, "cannot be read"),
    ({"tensors": lambda t: {k.replace("q_proj", "qq"): v for k, v in t.items()}}, "such as .*qq.*has them at"),
    ({"tensors": lambda t: {k: v[:, :-1] if "lora_A" in k else v for k, v in t.items()}}, "in 31 and out"),
    ({"tensors": lambda t: {k: v for k, v in t.items() if "q_proj.lora_B" not in k}}, r"expected A \[r, in\] and B"),
    ({"tensors": lambda t: {**t, "base_model.model.lm_head.weight": t.popitem()[1]}}, "lm_head.* not supported"),
  ],
)
def test_what_is_not_a_plain_adapter_of_this_model_is_refused(change, message, tmp_path):
  model, _ = written(tmp_path, "gpt-grouped")
  damaged(tmp_path, **change)
  with pytest.raises(ValueError, match=message):
    peft.read(tmp_path, FAMILIES["llama"], model)


def test_missing_and_damaged_files_are_named_and_pickles_are_not_read(tmp_path):
  model, _ = written(tmp_path, "gpt-grouped")
  whole = (tmp_path / peft.WEIGHTS).read_bytes()
  (tmp_path / peft.WEIGHTS).write_bytes(whole[:-10])
  with pytest.raises(ValueError, match="not a whole safetensors file"):
    peft.read(tmp_path, FAMILIES["llama"], model)
  (tmp_path / peft.WEIGHTS).rename(tmp_path / "adapter_model.bin")
  with pytest.raises(FileNotFoundError, match="adapter_model.bin is not read, since loading it can run code: convert"):
    peft.read(tmp_path, FAMILIES["llama"], model)
  (tmp_path / peft.CONFIG).unlink()
  with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
    peft.read(tmp_path, FAMILIES["llama"], model)


def test_an_adapter_saved_from_the_model_without_its_head_is_read(tmp_path):
  model, adapters = written(tmp_path, "gpt2", "mlp/up$")
  damaged(tmp_path, lambda t: {k.replace(".transformer.h", ".h"): v for k, v in t.items()})
  back = peft.read(tmp_path, FAMILIES["gpt2"], model)
  assert (back.params["layers"]["mlp"]["up"]["lora_a"] == adapters["layers"]["mlp"]["up"]["lora_a"]).all()


def test_a_fused_module_with_one_of_its_adapters_zero_says_nothing_of_that_one(tmp_path):
  model, family = small_model("gpt2"), FAMILIES["gpt2"]
  flat = flatten_dict(distinct(model, "attention/(query|key)$"), sep="/")
  flat["layers/attention/key/lora_b"] *= 0
  settings = {"rank": 3, "alpha": 3.0, "rank_stabilised": False}
  peft.write(tmp_path, unflatten_dict(flat, sep="/"), family, model.config, **settings)
  assert set(peft.read(tmp_path, family, model).params["layers"]["attention"]) == {"query"}
