"""Weights in and out without torch: folders as they should be and broken ones, any mesh, every verb."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from huggingface_hub.utils import filter_repo_objects

from configs import domain, pretrain
from configs.base import get_config
from data.tokenizer import byte_tokenizer, load_tokenizer, train_tokenizer
from models import MODELS, hf, hf_export
from models.sharding import make_mesh
from models.weights import INDEX, SINGLE, open_tensors
from scripts.__main__ import main
from tests.conftest import distinct_params, small_model
from train import calibration, exchange, stage
from train.calibration import Calibration
from train.loop import build_model

IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 0, "decoder_start_token_id": 0}
BYTES = 384  # ids of the byte tokenizer


def published(folder, form="qwen3", file_bytes=hf_export.FILE_BYTES, dtype="float32", vocab_size=BYTES, **fields):
  """Writes a small model in Hugging Face's form, with the byte tokenizer; returns its parameters."""
  model = small_model(form, vocab_size, **fields)
  folder.mkdir(parents=True)
  params = distinct_params(model)
  kind, theirs = hf_export.their_config(model.config, dtype, 64, IDS)
  hf_export.save_config(folder, theirs, model.config)
  hf_export.save(folder, kind, model.config, params, dtype, file_bytes)
  byte_tokenizer().export(folder, begins=not form.startswith("t5"))
  return params


def read(folder, mesh=None, vocab_size=0, **fields):
  """Reads a folder on a mesh, with a vocabulary as large as asked."""
  found = hf.describe(folder)
  model = MODELS[found.architecture]("custom", max(found.vocab_size, vocab_size), **{**found.fields, **fields})
  mesh = mesh or make_mesh({}, jax.devices()[:1])
  with jax.set_mesh(mesh):
    return jax.device_get(hf.load(folder, model, mesh))


def assert_equal(one, other):
  """Every parameter the same, without the vocabulary's padding."""
  paths = jax.tree_util.tree_leaves_with_path(one)
  assert len(paths) == len(jax.tree.leaves(other))
  for (path, a), b in zip(paths, jax.tree.leaves(other), strict=True):
    name, a, b = jax.tree_util.keystr(path), np.asarray(a), np.asarray(b)
    a, b = ((x[:BYTES] if "tokens" in name else x[:, :BYTES] if "kernel" in name else x) for x in (a, b))
    np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("form", ["gpt2", "qwen2", "gemma3", "t5", "t5-v1.0"])
@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_weights_come_back_on_every_mesh(form, sizes, tmp_path):
  params = published(tmp_path / "hf", form, file_bytes=10_000)
  files = sorted(file.name for file in (tmp_path / "hf").glob("*.safetensors"))
  assert len(files) > 3 and (tmp_path / "hf" / INDEX).exists() and SINGLE not in files
  assert_equal(params, read(tmp_path / "hf", make_mesh(sizes)))


def test_each_device_is_given_its_own_part(tmp_path):
  published(tmp_path / "hf", "qwen3")
  mesh = make_mesh({"fsdp": 8})
  found = hf.describe(tmp_path / "hf")
  model = MODELS["gpt"]("custom", found.vocab_size, **found.fields)
  with jax.set_mesh(mesh):
    loaded = hf.load(tmp_path / "hf", model, mesh)
    like = stage.params_like(model, mesh)
  assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, like)
  query = loaded["layers"]["attention"]["query"]
  assert {shard.data.shape for shard in query.addressable_shards} == {(2, 4, 4, 1, 8)}


def test_bfloat16_files_come_back_exactly_and_can_be_stored_so(tmp_path):
  published(tmp_path / "one", dtype="bfloat16")
  params = read(tmp_path / "one")
  assert hf.describe(tmp_path / "one").dtype == "bfloat16"
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
  halved = read(tmp_path / "one", storage="bfloat16")
  assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(halved))
  assert_equal(params, jax.tree.map(lambda x: x.astype(np.float32), halved))
  model = small_model("qwen3", BYTES)
  (tmp_path / "two").mkdir()
  hf_export.save(
    tmp_path / "two", "qwen3", model.config, jax.tree.map(jax.numpy.asarray, params), "bfloat16", hf_export.FILE_BYTES
  )
  one, two = (tmp_path / name / SINGLE for name in ("one", "two"))
  assert one.read_bytes() == two.read_bytes()


def test_a_larger_vocabulary_starts_from_the_mean(tmp_path, capsys):
  params = published(tmp_path / "hf", "t5")
  for mesh in (None, make_mesh({"tensor": 4, "fsdp": 2})):
    larger = read(tmp_path / "hf", mesh, vocab_size=600)
    tokens, kernel = larger["embed"]["tokens"], larger["head"]["kernel"]
    assert tokens.shape == (640, 32) and "216 new rows" in capsys.readouterr().out
    np.testing.assert_array_equal(tokens[:BYTES], params["embed"]["tokens"])
    mean = params["embed"]["tokens"].mean(axis=0)
    np.testing.assert_allclose(tokens[BYTES:600], np.broadcast_to(mean, (216, 32)), atol=1e-6)
    mean = params["head"]["kernel"].mean(axis=1)
    np.testing.assert_allclose(kernel[:, BYTES:600], np.broadcast_to(mean[:, None], (32, 216)), atol=1e-6)
    assert not tokens[600:].any() and not kernel[:, 600:].any()


def test_a_tensor_is_read_in_pieces(tmp_path, monkeypatch):
  params = published(tmp_path / "hf", "gpt2")
  monkeypatch.setattr(hf, "BLOCK_BYTES", 200)
  assert_equal(params, read(tmp_path / "hf", make_mesh({"fsdp": 4, "tensor": 2})))


def tensors_of(folder):
  return safetensors.numpy.load_file(folder / SINGLE)


def test_older_folders_are_understood(tmp_path):
  """GPT-2's own names have no prefix and a mask beside; T5's folders repeat their embedding."""
  params = published(tmp_path / "gpt2", "gpt2")
  tensors = {name.removeprefix("transformer."): value for name, value in tensors_of(tmp_path / "gpt2").items()}
  tensors |= {f"h.{i}.attn.bias": np.ones((1, 1, 8, 8), np.float32) for i in range(2)}
  tensors["lm_head.weight"] = tensors["wte.weight"]
  safetensors.numpy.save_file(tensors, tmp_path / "gpt2" / SINGLE)
  assert hf.describe(tmp_path / "gpt2").fields["tied"]
  assert_equal(params, read(tmp_path / "gpt2"))
  params = published(tmp_path / "t5", "t5")
  tensors = tensors_of(tmp_path / "t5")
  tensors |= {f"{side}.embed_tokens.weight": tensors["shared.weight"] for side in ("encoder", "decoder")}
  safetensors.numpy.save_file(tensors, tmp_path / "t5" / SINGLE)
  assert_equal(params, read(tmp_path / "t5"))
  tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
  safetensors.numpy.save_file(tensors, tmp_path / "t5" / SINGLE)
  with pytest.raises(ValueError, match="encoder.embed_tokens.weight.*two embeddings"):
    read(tmp_path / "t5")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks 1 tensors.*layers.1.mlp.up_proj"),
    (lambda t: t.update(extra=np.ones(3, np.float32)), "1 tensors that no part of.*'extra'"),
    (
      lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)}),
      r"model.norm.weight' has shape \(3,\).*\(32,\)",
    ),
    (lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}), "model.norm.weight' is I8"),
    (lambda t: t.pop("model.embed_tokens.weight"), "no tensor 'model.embed_tokens.weight'"),
  ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
  published(tmp_path / "hf", "qwen3")
  tensors = tensors_of(tmp_path / "hf")
  change(tensors)
  safetensors.numpy.save_file(tensors, tmp_path / "hf" / SINGLE)
  with pytest.raises(ValueError, match=message):
    read(tmp_path / "hf")


def edit(file, **changes):
  file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "bert"}, "'bert' is not supported; known: .*gpt2.*t5"),
    ({"attention_bias": True}, "attention_bias = True is not supported"),
    ({"hidden_act": "mish"}, "'mish' is not known"),
    ({"layer_types": ["linear_attention"] * 2}, "linear_attention"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "'yarn' is not supported"),
    ({"num_hidden_layers": 3}, "num_hidden_layers"),
    ({"intermediate_size": 65}, r"mlp.gate_proj.weight' has shape \(64, 32\), by config.json it is \(65, 32\)"),
    ({"num_hidden_layers": "three"}, "config.json is no config of qwen3"),
  ],
)
def test_settings_that_cannot_be_are_named(changes, message, tmp_path):
  published(tmp_path / "hf", "qwen3")
  edit(tmp_path / "hf" / "config.json", **changes)
  with pytest.raises(ValueError, match=message):
    read(tmp_path / "hf")


def test_pickles_are_refused_with_advice(tmp_path):
  published(tmp_path / "hf")
  (tmp_path / "hf" / SINGLE).rename(tmp_path / "hf" / "pytorch_model.bin")
  with pytest.raises(FileNotFoundError, match="pytorch_model.bin is not read.*convert it"):
    hf.describe(tmp_path / "hf")


@pytest.mark.parametrize(
  "name", ["../secret.safetensors", "/etc/secret.safetensors", "weights.bin", 7, "a/b.safetensors"]
)
def test_an_index_that_leaves_its_folder_is_refused(name, tmp_path):
  published(tmp_path / "hf" / "in", file_bytes=10_000)
  shutil.copy(next((tmp_path / "hf" / "in").glob("*.safetensors")), tmp_path / "hf" / "secret.safetensors")
  index = json.loads((tmp_path / "hf" / "in" / INDEX).read_text())
  index["weight_map"]["model.norm.weight"] = name
  (tmp_path / "hf" / "in" / INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match="only safetensors files in the same folder|expected"):
    open_tensors(tmp_path / "hf" / "in")


def test_damaged_files_are_named(tmp_path):
  published(tmp_path / "hf", file_bytes=10_000)
  folder = tmp_path / "hf"
  first = sorted(folder.glob("*.safetensors"))[0]
  whole = first.read_bytes()
  for broken in (whole[:-5], whole[:20], b"", b"\xff" * 100):
    first.write_bytes(broken)
    with pytest.raises(ValueError, match=f"{first.name} is not a whole safetensors file"):
      open_tensors(folder)
  first.unlink()
  with pytest.raises(FileNotFoundError, match=f"names {first.name}, which is missing"):
    open_tensors(folder)
  (folder / INDEX).write_text("[1]")
  with pytest.raises(ValueError, match="weight_map"):
    open_tensors(folder)


def test_what_is_written_is_read_back(tmp_path, monkeypatch):
  def lossy(tensors, file, metadata):
    safetensors_save({name: value * 0 for name, value in tensors.items()}, file, metadata)

  safetensors_save = safetensors.numpy.save_file
  monkeypatch.setattr(safetensors.numpy, "save_file", lossy)
  with pytest.raises(OSError, match="reads back differently"):
    published(tmp_path / "hf")


def test_a_model_of_no_family_is_refused():
  config = small_model("gpt2", positions="rotary").config
  with pytest.raises(ValueError, match="no Hugging Face family"):
    hf_export.their_config(config, "float32", 64, IDS)


@pytest.mark.parametrize(
  ("asked", "theirs"),
  [
    ({"beams": 4, "length_penalty": 0.5}, {"num_beams": 4, "length_penalty": 0.5}),
    ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
  ],
)
def test_an_export_answers_as_the_model_does(asked, theirs):
  config = get_config()
  config.evaluate.update(asked)
  found = exchange._generation_config(config, byte_tokenizer())
  assert {key: getattr(found, key) for key in theirs} == theirs


def argot(monkeypatch, *arguments: str) -> None:
  monkeypatch.setattr("sys.argv", ["argot", *arguments])
  main()


def test_the_verbs(tmp_path, monkeypatch, capsys):
  params = published(tmp_path / "hf", "t5")
  argot(monkeypatch, "import", f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'run'}")
  argot(monkeypatch, "export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'out'}")
  assert_equal(params, read(tmp_path / "out"))
  assert (tmp_path / "hf" / SINGLE).read_bytes() == (tmp_path / "out" / SINGLE).read_bytes()
  settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
  assert (settings["eos_token_id"], settings["decoder_start_token_id"]) == (1, 0)
  for source in ("hf", "run"):
    argot(monkeypatch, "generate", f"--model={tmp_path / source}", "--prompt=a note", "--max_new_tokens=5")
  said = capsys.readouterr()
  one, other = said.out.splitlines()[-2:]
  assert "not finished" not in said.err  # what was imported has no steps to come to
  assert one == other and json.loads(one)["input"] == "a note"
  for source, kind in (("hf", "float32 in the files"), ("run", "a run of Argot's")):
    argot(monkeypatch, "inspect", f"--model={tmp_path / source}", "--mesh=fsdp:8", "--rows=2", "--length=32")
    out = capsys.readouterr().out
    assert f"t5 (t5), {kind}" in out and "encoder/layers/mlp/gate" in out
    held = 4 * sum(leaf.size for leaf in jax.tree.leaves(params)) / 8 / 2**20
    assert f"weights {held:.1f} MiB" in out and "cache of 2 rows of 32" in out
  for arguments, message in (
    (("import", f"--from={tmp_path / 'run'}", "--to=x"), "run of Argot's already"),
    (("import", f"--from={tmp_path / 'none'}", "--to=x"), "no model in"),
    (("import", f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'out'}"), "is in use"),
    (("export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'out'}"), "is in use"),
    (("export", f"--from={tmp_path / 'run'}", "--to=x", "--dtype=float16"), "float16"),
    (("inspect", f"--model={tmp_path / 'run'}", "--mesh=depth:2"), "depth:2"),
  ):
    with pytest.raises(SystemExit, match=message):
      argot(monkeypatch, *arguments)


def test_an_export_keeps_what_asking_needs(tmp_path):
  published(tmp_path / "hf", "gpt2")
  exchange.import_model(str(tmp_path / "hf"), tmp_path / "run")
  config = stage.read_config(tmp_path / "run")
  assert config.data.objective == "next_token"  # what published GPTs do
  with config.unlocked():
    config.data.update({"objective": "prefix_lm", "decoder_length": 48, "loss_normalisation": "example"})
    config.evaluate.update({"max_new_tokens": 7, "label_score": "pmi", "candidates": 5})
  stage.write_json(tmp_path / "run" / "config.json", json.loads(config.to_json()))
  stage.write_json(tmp_path / "run" / "calibration.json", {"t": Calibration("sum", 3.0, threshold=0.99)._asdict()})
  for number in range(2):  # and the export of its import
    exchange.export_model(str(tmp_path / "run"), tmp_path / f"out{number}", "float32", 1 << 30)
    again = stage.read_config(tmp_path / f"out{number}")
    assert again.data.decoder_length == 48 and again.data.objective == "prefix_lm"
    assert again.data.loss_normalisation == "example" and again.evaluate == config.evaluate
    assert calibration.read(tmp_path / f"out{number}" / "calibration.json")["t"].threshold == 0.99
    shutil.rmtree(tmp_path / "run")
    exchange.import_model(str(tmp_path / f"out{number}"), tmp_path / "run")


@pytest.mark.parametrize(
  ("form", "changes", "ends"),
  [
    ("gpt2", {}, False),  # a published GPT
    ("gpt2", {"objective": "prefix_lm"}, True),
    ("gpt2", {"mixture": {"domain": 1.0, "urgency": [0.0, 0.0]}}, False),
    ("gpt2", {"mixture": {"domain": 0.5, "urgency": [0.0, 0.5]}}, True),
    ("gpt2", {"mixture": {"tasks": 1.0}}, True),
    ("t5", {}, True),
  ],
)
def test_exported_prompts_end_where_answers_were_learned(form, changes, ends, tmp_path, capsys):
  published(tmp_path / "hf", form)
  exchange.import_model(str(tmp_path / "hf"), tmp_path / "run")
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  config["data"].update(changes)
  stage.write_json(tmp_path / "run" / "config.json", config)
  stage.write_json(tmp_path / "run" / "tasks.json", {"urgency": {"kind": "generation", "instruction": "How urgent?"}})
  for source, target in (("run", "out"), ("out", "again")):
    exchange.export_model(str(tmp_path / source), tmp_path / target, "float32", 1 << 30)
    prompt = tokenizers.Tokenizer.from_file(str(tmp_path / target / "tokenizer.json")).encode("a note").ids
    assert (prompt[-1] == byte_tokenizer().eos_id) == ends, target
    assert f"the tokenizer puts {'EOS' if ends else 'no EOS'} after a prompt" in capsys.readouterr().out


def test_the_model_of_a_workdir_is_that_of_the_last_stage_with_a_step(tmp_path):
  for name, steps in (("base", ["100"]), ("continued", ["200"]), ("multitask", ["50.orbax-checkpoint-tmp"])):
    for step in steps:
      (tmp_path / "stages" / name / "checkpoints" / step).mkdir(parents=True)
    (tmp_path / "stages" / name / "config.json").write_text("{}")
  assert stage.find(tmp_path) == tmp_path / "stages" / "continued"
  with pytest.raises(FileNotFoundError, match="multitask has saved no step"):
    stage.find(tmp_path / "stages" / "multitask")
  (tmp_path / "stages" / "multitask" / "checkpoints" / "50").mkdir()
  assert stage.find(tmp_path) == tmp_path / "stages" / "multitask"


def test_hub_names_without_a_network_end_clearly(monkeypatch):
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  with pytest.raises(FileNotFoundError, match="hf:argot/none cannot be had from the hub"):
    stage.find("hf:argot/none")


def test_a_hub_name_is_a_local_folder_once_it_is_there(tmp_path, monkeypatch):
  published(tmp_path / "hf")
  asked = {}

  def snapshot(name, allow_patterns, ignore_patterns):
    asked.update(name=name, patterns=allow_patterns, ignored=ignore_patterns)
    return str(tmp_path / "hf")

  monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
  assert stage.find("hf:someone/model") == tmp_path / "hf" and asked["name"] == "someone/model"
  assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked["patterns"])
  taken = filter_repo_objects(
    ["consolidated.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"],
    allow_patterns=asked["patterns"],
    ignore_patterns=asked["ignored"],
  )
  assert list(taken) == ["model-00001-of-00002.safetensors"]  # no weights twice


def test_pickles_on_the_hub_are_refused_with_advice(tmp_path, monkeypatch):
  published(tmp_path / "hf")
  (tmp_path / "hf" / SINGLE).unlink()  # a snapshot holds no pickles
  monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **patterns: str(tmp_path / "hf"))
  there = ["config.json", "training_args.bin", "pytorch_model.bin"]
  monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, name: there)
  with pytest.raises(FileNotFoundError, match="hf:someone/old has no safetensors; pytorch_model.bin is not .*convert"):
    stage.find("hf:someone/old")


def inheriting(folder, arg="gpt-init_from", make=domain):
  config = make.get_config(arg)
  config.init_from = str(folder)
  return config


def test_a_config_inherits_the_shape_and_the_tokenizer(tmp_path, capsys):
  published(tmp_path / "hf", "gemma3", vocab_size=500)
  for config in (inheriting(tmp_path / "hf"), inheriting(tmp_path / "hf", "gpt-tiny", pretrain)):
    config = stage.inherit(config)
    assert "of the shape of" in capsys.readouterr().out and config.tokenizer.path == str(tmp_path / "hf")
    model = build_model(config, load_tokenizer(config.tokenizer.path))
    expected = small_model("gemma3", 500, max_length=64).config
    meaning = hf_export.meaning
    assert meaning(model.config) == meaning(expected) and model.config.vocab_size == 500
  again = stage.inherit(inheriting(tmp_path / "hf"))
  assert stage.inherit(again) == again
  with pytest.raises(ValueError, match="holds a gpt, config.architecture is 't5'"):
    stage.inherit(inheriting(tmp_path / "hf", "t5-init_from"))
  config = inheriting("", "gpt-init_from")
  with pytest.raises(ValueError, match="set config.init_from"):
    stage.inherit(config)
  plain = get_config()
  assert stage.inherit(plain) is plain
  exchange.import_model(str(tmp_path / "hf"), tmp_path / "run")
  config = pretrain.get_config("gpt-tiny")
  config.init_from = str(tmp_path / "run")
  found = stage.inherit(config)  # a new tokenizer would give its embeddings to other tokens
  assert config.tokenizer.path == "train" and found.tokenizer.path == str(tmp_path / "run" / "tokenizer")
  assert found.model.size == "tiny"


@pytest.mark.parametrize("begins", [True, False])
def test_exported_tokenizers_give_the_ids_of_a_prompt(begins, tmp_path):
  import transformers

  text = "BP 120/80, naïve\n  spaced 😀"
  for number, tokenizer in enumerate((byte_tokenizer(), train_tokenizer([text, "some words"] * 20, 420, 20))):
    folder = tmp_path / str(number)
    folder.mkdir()
    tokenizer.export(folder, begins)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer.encode(text)
    assert theirs(text)["input_ids"] == [*([tokenizer.start_id] if begins else []), *ids, tokenizer.eos_id]
    assert theirs.decode(ids) == tokenizer.decode(ids) == text
    assert (theirs.pad_token_id, theirs.eos_token_id) == (tokenizer.pad_id, tokenizer.eos_id)
    assert theirs.convert_tokens_to_ids("<extra_id_1>") == tokenizer.sentinel_ids[1]
    again = load_tokenizer(str(folder))
    assert again.encode(text) == ids and again.sentinel_ids == tokenizer.sentinel_ids


def test_byt5_folders_are_bytes_with_the_sentinels_of_their_pre_training(tmp_path):
  import transformers

  (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
  tokenizer, text = load_tokenizer(str(tmp_path)), "naïve 每天吃药 😀\U0010ffff"
  assert tokenizer.sentinel_ids == tuple(range(258, 158, -1)) and tokenizer.vocab_size == 384
  ids = tokenizer.encode(text)
  assert ids == byte_tokenizer().encode(text) and set(ids) & set(tokenizer.sentinel_ids)  # these stay text
  assert tokenizer.decode(ids) == text and tokenizer.count_bytes(ids) == len(text.encode()) == len(ids)
  assert tokenizer.decode([258, *ids, 257]) == f"<extra_id_0>{text}<extra_id_1>"
  assert [token for token in tokenizer.sentinel_ids if tokenizer.is_special(token)] == list(range(258, 247, -1))
  assert tokenizer.count_bytes([258, *ids, 257]) == len(ids)
  tokenizer.save(tmp_path / "saved")
  (tmp_path / "out").mkdir()
  tokenizer.export(tmp_path / "out", begins=False)
  for folder in ("saved", "out"):
    assert load_tokenizer(str(tmp_path / folder)).fingerprint() == tokenizer.fingerprint()
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
  assert theirs(text)["input_ids"] == [*ids, tokenizer.eos_id] and theirs.pad_token_id == tokenizer.pad_id
  tokenizer.export(tmp_path / "out", begins=True)  # of a GPT
  assert tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode(text).ids == [0, *ids, 1]


@pytest.mark.parametrize("form", ["gpt", "t5"])
def test_weights_stored_in_bfloat16_are_trained_with_float32_statistics(form):
  from tests.test_step import optimizer_of

  model = small_model(form, storage="bfloat16")
  params, transform = jax.jit(model.init)(jax.random.key(0)), optimizer_of("adamw")
  state = transform.init(params)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
  assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
  with pytest.raises(ValueError, match="float16"):
    small_model(form, storage="float16")


def test_weights_without_their_head_are_refused(tmp_path):
  published(tmp_path / "hf", "qwen3", tied=False)
  tensors = safetensors.numpy.load_file(tmp_path / "hf" / SINGLE)
  assert not hf.describe(tmp_path / "hf").fields["tied"]
  safetensors.numpy.save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, tmp_path / "hf" / SINGLE)
  with pytest.raises(ValueError, match="no tensor 'lm_head.weight', and config.json says .*without its head"):
    hf.describe(tmp_path / "hf")
