"""The whole way of a user's weights: a folder of another library's, trained on a domain, and back to that library."""

import json
import sys

import jax
import numpy as np
import pytest

from configs import domain
from data import sample
from data.tokenizer import train_tokenizer
from models.sharding import on_mesh
from scripts.__main__ import main
from train import generate, serve, stage
from train.recipe import run_recipe

torch = pytest.importorskip("torch", reason="the walk ends in transformers with torch: pip install -e '.[parity]'")
import transformers  # noqa: E402  slow, and of no use without torch

_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
_LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {
  "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config, {**_T5, "tie_word_embeddings": False}),
  "gpt": (transformers.LlamaForCausalLM, transformers.LlamaConfig, _LLAMA),
}


def folder_of(tmp_path, architecture: str):
  """Writes random weights with a tokenizer, and the sample domain; returns the weights' folder."""
  sample.write_domain(tmp_path / "ward", seed=0)
  with (tmp_path / "ward" / "corpus.jsonl").open() as file:
    tokenizer = train_tokenizer([json.loads(line)["text"] for line, _ in zip(file, range(300), strict=False)], 500, 50)
  folder = tmp_path / "weights"
  folder.mkdir()
  tokenizer.export(folder, begins=architecture == "gpt")
  model_class, config_class, shape = SHAPES[architecture]
  torch.manual_seed(0)
  ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 0, "decoder_start_token_id": 0}
  model = model_class(config_class(**shape, **ids, vocab_size=tokenizer.vocab_size + 12))  # as T5's: rows to spare
  if architecture == "t5":
    model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(model.lm_head.weight))
  model.save_pretrained(folder)
  return folder


def settings(architecture: str, folder, tmp_path):
  config = domain.get_config(f"{architecture}-init_from")
  config.init_from, config.domain, config.general = str(folder), str(tmp_path / "ward"), ""
  config.data.update({"encoder_length": 160, "decoder_length": 240, "batch_size": 8})
  config.optimizer.warmup_steps = 2
  config.evaluate.update({"batch_size": 8, "max_examples": 8, "corpus_tokens": 500, "max_new_tokens": 12})
  config.arms.update({"only": "none", "without_continued": False})
  with config.unlocked():
    for name, mixture in (("base", {"domain": 1.0}), ("continued", {"domain": 1.0}), ("multitask", {"tasks": 1.0})):
      config.stages[name] = {"train": {"steps": 0 if name == "base" else 6}, "data": {"mixture": mixture}}
  return config.lock()


def their_scores(model, tokenizer, prompt: str, labels, architecture: str) -> list[float]:
  """Log-probability of each label's tokens, EOS included, after a prompt."""
  ids, scores = tokenizer(prompt, return_tensors="pt")["input_ids"], []
  for label in labels:
    answer = torch.tensor([[*tokenizer(label, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
      if architecture == "t5":
        logits = model(input_ids=ids, labels=answer).logits[0]
      else:
        logits = model(input_ids=torch.cat([ids, answer], 1)).logits[0, ids.shape[1] - 1 : -1]
    scores.append(float(torch.log_softmax(logits, -1)[range(answer.shape[1]), answer[0]].sum()))
  return scores


@pytest.mark.parametrize("architecture", ["t5", "gpt"])
def test_weights_there_and_back(architecture, tmp_path, monkeypatch, capsys):
  folder = folder_of(tmp_path, architecture)
  report = run_recipe(settings(architecture, folder, tmp_path), tmp_path / "run")
  assert [row["steps"] for row in report["stages"]] == [0, 6, 6]
  monkeypatch.setattr(sys, "argv", ["argot", "export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'out'}"])
  main()
  assert "read back and compared" in capsys.readouterr().out

  auto = transformers.AutoModelForSeq2SeqLM if architecture == "t5" else transformers.AutoModelForCausalLM
  model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True, local_files_only=True)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  assert set(stage.read_tasks(tmp_path / "out")) == {"urgency", "instructions"}
  texts = ["72F c/o SOBAR. sats 84%. PMH COPD.", "pt well", "c/o CP x 2/7, sweaty"]
  with serve.load(str(tmp_path / "run")) as loaded:
    urgency, instructions = loaded.task("urgency"), loaded.task("instructions")
    asked = [loaded.prompt(urgency, {"input": text}) for text in texts]
    scores = loaded.evaluator.classify(urgency, asked)
    wanted = [loaded.prompt(instructions, {"input": text}) for text in texts]
    answers = generate.answers(loaded.evaluator, wanted, generate.Wish(), instructions)
  for prompt, row in zip(asked, scores, strict=True):
    theirs = their_scores(model.eval(), tokenizer, prompt, urgency.labels, architecture)
    np.testing.assert_allclose(row, theirs, atol=1e-4)
    assert urgency.labels[int(np.argmax(row))] == urgency.labels[int(np.argmax(theirs))]
  for prompt, [answer] in zip(wanted, answers, strict=True):
    given = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**given, max_new_tokens=12)[0]
    ids = ids if architecture == "t5" else ids[given["input_ids"].shape[1] :]
    # A model of six steps still writes sentinels, which are special to transformers and shown by Argot.
    shown = [token for token in ids.tolist() if token not in (tokenizer.pad_token_id, tokenizer.eos_token_id)]
    assert tokenizer.decode(shown).strip() == answer


@pytest.mark.parametrize("name", ["gpt2", "sentencepiece-c4-32k", "sentencepiece-toy-26"])
@pytest.mark.parametrize("architecture", ["t5", "gpt"])
def test_real_tokenizers_with_both_architectures(name, architecture, shared, tmp_path, one_device):
  """Sentinels are added where they lack; text, ids and decoding agree after an export; a model takes every id."""
  from data.tokenizer import load_tokenizer
  from tests.conftest import small_model

  tokenizer = load_tokenizer(str(shared / "tokenizers" / name))
  assert len(tokenizer.sentinel_ids) == 100 and max(tokenizer.sentinel_ids) == tokenizer.vocab_size - 1
  tokenizer.export(tmp_path, begins=architecture == "gpt")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
  text = "Take 2 tablets (500 mg) at night; see a doctor if it hurts."
  ids = tokenizer.encode(text)
  begin = [tokenizer.start_id] if architecture == "gpt" else []
  assert theirs(text)["input_ids"] == [*begin, *ids, tokenizer.eos_id]
  if name != "sentencepiece-toy-26":  # whose vocabulary lacks letters
    assert theirs.decode(ids) == tokenizer.decode(ids) == text
  model = small_model(architecture, tokenizer.vocab_size)
  params = jax.jit(model.init)(jax.random.key(0))
  prompts = model.prompts([[*ids, *tokenizer.sentinel_ids]], 256, tokenizer.start_id)
  cache = jax.jit(lambda p, x: model.prefill(p, x, 1))(params, on_mesh(prompts))
  logits, _ = jax.jit(model.extend)(params, cache, on_mesh(prompts)["first"][:, None])
  assert np.isfinite(np.asarray(logits)[..., : tokenizer.vocab_size]).all()
