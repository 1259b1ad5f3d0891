"""The doctor: the sample domain is well, and every planted fault is found, with its place and what to do."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict
from tokenizers import models, normalizers, pre_tokenizers

from configs import pretrain, quickstart
from data.features import Layout
from data.inspect import Known, copied, identity, lengths, overlap, placed, shingles
from data.prompts import render
from data.rows import Listed
from data.sample import write_domain
from data.tasks import Task, load_domain, read_task_rows
from data.tokenizer import byte_tokenizer
from models.sharding import make_mesh
from scripts import __main__ as command
from tests.conftest import SMALL, distinct_params, packed_batch, small_model
from tests.test_pipeline import write
from train.doctor import examine, probe
from train.recipe import answers_cut


def severe(sections, *severities):
  return [finding for _, findings in sections for finding in findings if finding.severity in severities]


@pytest.mark.parametrize(("architecture", "steps"), [("t5", 1), ("gpt", 0)])
def test_the_sample_domain_is_well(tmp_path, architecture, steps):
  config = quickstart.get_config(architecture)
  with config.unlocked():
    config.model.overrides.update(SMALL[architecture])
    config.cpu_devices = 0
    config.mesh.data = 8
  sections = list(examine(config, tmp_path, steps))
  assert severe(sections, "error", "warning") == []
  said = {finding.where: finding.what for _, findings in sections for finding in findings}
  assert "no leak between" in said["packing"] and "no position sees later ones" in said["causality"]
  assert ("estimate for this machine" in said["stage base"]) == bool(steps)
  example = said["multitask, urgency"]  # the prompt is read, the label alone is learned, then EOS
  supervised = "".join(part[1:-1] for part in example.split("  ⟶  ")[-1].split("|") if part.startswith("["))
  assert supervised in ("routine⏎", "urgent⏎", "emergency⏎")


@pytest.mark.parametrize("recipe", [True, False])
def test_a_base_that_is_given_and_a_config_of_one_stage_are_well(tmp_path, recipe):
  config = quickstart.get_config("gpt") if recipe else pretrain.get_config("gpt")
  with config.unlocked():
    config.model.overrides.update(SMALL["gpt"])
    config.tokenizer.path, config.cpu_devices, config.mesh.data = "bytes", 0, 8
    config.data.update({"batch_size": 8, "overlong": "truncate"})
    if recipe:
      config.stages.base.train.steps = 0
  sections = list(examine(config, tmp_path, 1))
  assert severe(sections, "error") == []
  places = {finding.where for _, findings in sections for finding in findings}
  assert {"stage continued", "stage multitask"} <= places if recipe else "stage train" in places
  assert "stage base" not in places and "causality" in places


WORDS = (
  "the note of a patient with pain in left right arm leg chest since monday no fever was given rest today yes".split()
)


def sentence(seed: int, length: int = 14) -> str:
  return " ".join(np.random.default_rng(seed).choice(WORDS, length))


@pytest.fixture
def broken(tmp_path):
  """A folder with one fault of every kind, and a tokenizer that knows few words."""
  folder = tmp_path / "ward"
  documents = [{"text": sentence(i, 30)} for i in range(60)]
  documents[5]["text"] = "lost <extra_id_0> of another preparation"
  documents[6]["text"] = "temperature 39\ufffdC"
  write(folder / "corpus.jsonl", documents)
  lines = (folder / "corpus.jsonl").read_bytes().splitlines()
  (folder / "corpus.jsonl").write_bytes(
    b"\n".join([*lines, b'{"text": ', b'{"text": "\xff"}', b'{"text": ""}']) + b"\n"
  )
  write(
    folder / "corpus_validation.jsonl", [documents[0], {"text": sentence(1, 30) + " today"}, {"text": sentence(99, 30)}]
  )
  tasks = {
    "triage": {"kind": "classification", "labels": ["yes", "no", "zq1", "zq2", "yes today"]},
    "reply": {"kind": "generation", "metrics": ["meteor"]},
    "ranked": {"kind": "ranking"},
    "lonely": {"kind": "generation"},
  }
  (folder / "tasks.json").write_text(json.dumps(tasks))
  rows = [{"input": sentence(200 + i), "target": ["yes", "no", "yes today"][i % 3]} for i in range(30)]
  rows += [{"input": rows[0]["input"].upper(), "target": "no"}]  # line 31: the input of line 1 with another label
  rows += [{"input": "x", "target": "maybe"}, {"input": "no target"}]  # lines 32 and 33
  write(folder / "triage" / "train.jsonl", rows)
  write(folder / "triage" / "test.jsonl", [{"input": sentence(300), "target": "zq1"}, {**rows[1], "target": "no"}])
  replies = [{"input": sentence(400 + i), "target": sentence(500 + i, 4)} for i in range(8)]
  replies += [{"input": sentence(1, 200), "target": "rest"}, {"input": "pain", "target": "\u200b"}]  # lines 9 and 10
  write(folder / "reply" / "train.jsonl", replies)
  write(folder / "reply" / "test.jsonl", [{"input": sentence(600), "target": "rest"}])
  write(folder / "lonely" / "train.jsonl", replies[:4])
  write(folder / "lonely" / "valid.jsonl", replies[:4])
  write(folder / "refund" / "train.jsonl", replies[:4])
  backend = tokenizers.Tokenizer(
    models.WordLevel({"[UNK]": 0, "</s>": 1, **{w: i + 2 for i, w in enumerate(WORDS)}}, "[UNK]")
  )
  backend.normalizer = normalizers.Replace("\u200b", "")
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  (tmp_path / "words").mkdir()
  backend.save(str(tmp_path / "words" / "tokenizer.json"))
  names = {"eos_token": "</s>", "unk_token": "[UNK]", "tokenizer_class": "PreTrainedTokenizerFast"}
  (tmp_path / "words" / "tokenizer_config.json").write_text(json.dumps(names))
  return tmp_path


def ward(folder, **data):
  config = pretrain.get_config("gpt")
  config.domain, config.general, config.tokenizer.path = str(folder / "ward"), "", str(folder / "words")
  with config.unlocked():
    config.model.overrides.update(SMALL["gpt"])
    config.data.update({"decoder_length": 96, "batch_size": 8, "cache_dir": str(folder / "cache")})
    config.data.update({"overlong": "error", **data})
    config.mesh.data = 8
    for name, mixture in (("base", {"domain": 1.0}), ("multitask", {"reply": 0.99, "triage": 0.01})):
      config.stages[name] = {"train": {"steps": 400}, "data": {"mixture": mixture}}
    config.stages.continued = {"train": {"steps": 1}, "data": {"mixture": {"absent": 1.0}}}
    config.arms.update({"only": "none", "without_continued": False})
    config.sources = {"more": str(folder / "nowhere.csv")}
  return config


# severity, part of the place, part of what is said
PLANTED = [
  ("error", "corpus.jsonl:61", "not a line of JSON"),
  ("error", "corpus.jsonl:62", "not UTF-8"),
  ("error", "corpus.jsonl:63", "must be a non-empty string"),
  ("error", "task ranked", "`kind` must be one of"),
  ("error", "triage/train.jsonl:32", "the label is none of"),
  ("error", "triage/train.jsonl:33", "field 'target'"),
  ("error", "task lonely, test", "the split is missing"),
  ("warning", "ward/lonely", "nothing reads ['valid.jsonl']; read are ['train.jsonl']"),
  ("warning", "ward/refund", "nothing reads ['train.jsonl']: tasks.json has no task 'refund'"),
  ("error", "config.sources.more", "nowhere.csv"),
  ("error", "config.evaluate", "task 'reply': `metrics` names ['meteor']; known are"),
  ("warning", "corpus", "'<extra_id_0>'"),
  ("warning", "corpus", "broken characters: '\ufffd'"),
  ("error", "task triage", "['zq1', 'zq2'] are the same tokens"),
  ("info", "task triage", "label 'yes' begins label 'yes today'"),
  ("warning", "task triage", "labels without a training row: ['zq1', 'zq2']; ['zq1'] are tested"),
  ("warning", "task triage", "1 training inputs have two labels"),
  ("error", "task triage, test", "1 of 2 (50.0%) have the same text"),
  ("error", "corpus_validation", "1 of 3 (33.3%) have the same text"),
  ("warning", "corpus_validation", "1 of 3 (33.3%) have nearly the same text"),
  ("error", "task reply, train", "1 rows whose answer has no token"),
  ("error", "task reply, train", "are refused; first"),
  ("error", "stage continued", "names 'absent'"),
  ("warning", "stage multitask", "reply would be read"),
  ("warning", "stage multitask", "triage is 0."),
]


def test_every_planted_fault_is_found(broken):
  config = ward(broken)
  config.data.loss_normalisation = "token"
  sections = list(examine(config, broken / "run", steps=0))
  found = [finding for _, findings in sections for finding in findings]
  for severity, where, what in PLANTED:
    hits = [f for f in found if f.severity == severity and where in f.where and what in f.what]
    assert hits, (severity, where, what, [f for f in found if where in f.where])
    assert severity == "info" or all(hit.fix for hit in hits)
  places = " ".join(finding.what for finding in found)
  assert "triage/train.jsonl:1 ('yes') and" in places and "triage/train.jsonl:31 ('no')" in places
  assert "reply/train.jsonl:9" in places and "reply/train.jsonl:10" in places


def test_bad_rows_of_sources_and_a_long_warm_up_are_found(broken):
  config = ward(broken)
  file = broken / "more.jsonl"
  file.write_text('{"text": "some text"}\n{no\n')
  with config.unlocked():
    config.sources.more = str(file)
    config.stages.base.optimizer = {"warmup_steps": 500}
  found = severe(examine(config, broken / "run", steps=0), "error", "warning")
  assert any(f.severity == "error" and "more.jsonl:2" in f.where for f in found)
  assert any(f.where == "stage base" and "never comes down" in f.what for f in found)


def test_what_is_skipped_by_wish_is_a_warning(broken):
  sections = list(examine(ward(broken, bad_rows="skip", overlong="skip"), broken / "run", steps=0))
  bad = [f for f in severe(sections, "warning") if "corpus.jsonl:61" in f.where]
  assert len(bad) == 1 and "skipped and counted" in bad[0].fix
  assert any("are skipped; first" in f.what for f in severe(sections, "warning"))


def test_unknown_tokens(broken):
  documents = [{"text": "words that nobody knows here"} for _ in range(40)]
  write(broken / "ward" / "corpus.jsonl", documents)
  found = severe(examine(ward(broken), broken / "run", steps=0), "error")
  assert any(f.where == "corpus" and "of the tokens are unknown, first in 'words that" in f.what for f in found)


def test_a_missing_folder_and_a_model_that_cannot_be(broken):
  config = ward(broken)
  config.domain = str(broken / "absent")
  places = [f.where for f in severe(examine(config, broken / "run", steps=0), "error")]
  assert any("corpus" in place for place in places) and any("tasks.json" in place for place in places)
  config = ward(broken)
  config.model.size = "huge"
  found = severe(examine(config, broken / "run", steps=0), "error")
  assert any(f.where == "config.model" and "'huge'" in f.what for f in found)
  config = ward(broken)
  with config.unlocked():
    config.stages.multitask.optimizer = {"name": "admw"}
  found = [f for f in severe(examine(config, broken / "run", steps=0), "error") if "'admw'" in f.what]
  assert [f.where for f in found] == ["stage multitask"]
  config = ward(broken)
  config.tokenizer.path = str(broken / "no tokenizer")
  assert any(f.where == "config.tokenizer" for f in severe(examine(config, broken / "run", steps=0), "error"))


def test_half_empty_rows(broken):
  write(broken / "ward" / "corpus.jsonl", [{"text": sentence(i, 50)} for i in range(60)])  # two do not fit a row
  found = severe(examine(ward(broken), broken / "run", steps=0), "warning")
  assert any(f.where == "stage base" and "rows are filled to 5" in f.what for f in found)


def test_the_verb_says_it_by_its_exit_code_and_in_json(broken, capsys, monkeypatch):
  file = broken / "config.py"
  file.write_text(
    "from pathlib import Path\nfrom tests.test_doctor import ward\n"
    f"def get_config(arg=''):\n  return ward(Path({str(broken)!r})).lock()\n"
  )
  arguments = ["argot", "doctor", f"--config={file}", "--steps=0", f"--output={broken / 'findings.json'}"]
  monkeypatch.setattr("sys.argv", arguments)
  with pytest.raises(SystemExit) as ended:
    command.main()
  out = capsys.readouterr().out
  assert ended.value.code == 1 and "ERROR    task ranked" in out and " errors, " in out.splitlines()[-1]
  written = json.loads((broken / "findings.json").read_text())
  assert {"section", "severity", "where", "what", "fix"} == set(written[0])
  assert sum(found["severity"] == "error" for found in written) == int(out.splitlines()[-1].split()[0])


def leaking(model, what):
  """The model with packing's segments, or the order of tokens, overlooked."""

  def features(params, batch, key=None):
    if what == "segments":
      ones = {name: (value > 0).astype(value.dtype) for name, value in batch.items() if name.endswith("segment_ids")}
      return model.features(params, {**batch, **ones}, key)
    x_BTD = model.features(params, batch, key)
    return x_BTD + x_BTD.mean(axis=1, keepdims=True)

  return model._replace(features=features)


@pytest.mark.parametrize("form", ["gpt", "t5"])
@pytest.mark.parametrize(("what", "where"), [("segments", "packing"), ("order", "causality")])
def test_a_leaking_model_is_found(form, what, where):
  model, batch = small_model(form), packed_batch(form)
  with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
    params = distinct_params(model)
    assert [f.severity for f in probe(model, params, batch)] == ["info", "info"]
    errors = [f.where for f in probe(leaking(model, what), params, batch) if f.severity == "error"]
  assert where in errors


def test_a_bidirectional_prefix_is_no_leak():
  model, batch = small_model("gpt"), packed_batch("gpt", bidirectional_prefix=True)
  with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
    assert [f.severity for f in probe(model, distinct_params(model), batch)] == ["info", "info"]


def test_near_copies():
  train = [sentence(i, 40) for i in range(50)]
  known = Known(Listed([{"text": text} for text in train]), "text")
  changed = train[7].split()
  changed[0] = "another"
  assert known.near(" ".join(changed)) and identity(" ".join(changed)) not in known.whole
  assert not known.near(sentence(1000, 40)) and identity(train[3].upper()) in known.whole
  assert len(shingles("one two")) == 1 and len(shingles(sentence(0, 20))) == 13 and len(shingles("")) == 0
  (found,) = overlap("test", known, Listed([{"text": " ".join(changed)}], "there"), "text", tested=False)
  assert found.severity == "info" and "such as there, row 1" in found.what


def test_near_copies_without_spaces():
  known = Known(
    Listed([{"text": "患者因反复胸痛三天入院，心电图提示下壁心肌缺血，予以阿司匹林口服治疗后症状缓解。"}]), "text"
  )
  assert known.near("患者因反复胸痛三天入院，心电图提示下壁心肌缺血，予以阿司匹林口服治疗后症状好转。")
  assert not known.near("孩子发热两天，咳嗽，食欲差，体温三十九度，医生建议多喝水并按时服用退烧药。")


def test_copies_are_looked_for_in_every_row(monkeypatch):
  monkeypatch.setattr("data.inspect.LOOKED_AT", 10)
  monkeypatch.setattr(placed, "__defaults__", (10,))
  train = Listed([{"text": sentence(i, 40)} for i in range(30)])
  said = [found.what for found in overlap("test", Known(train, "text"), train, "text")]
  assert "first 10 rows alone" in said[0] and "30 of 30 (100.0%) have the same text" in said[1]


def test_test_inputs_that_are_trained_on_are_counted(tmp_path):
  task = Task.from_dict("t", {"kind": "generation", "train": f"{tmp_path}/a.jsonl", "test": f"{tmp_path}/b.jsonl"})
  for name, texts in (("a", ["one two", "three"]), ("b", ["four", "One  two", "three"])):
    write(tmp_path / f"{name}.jsonl", [{"input": text, "target": "x"} for text in texts])
  assert copied(task) == f"2 of 3 test inputs are trained on, too, such as {tmp_path}/b.jsonl:2"
  write(tmp_path / "b.jsonl", [{"input": "four", "target": "x"}])
  assert copied(task) == ""


def test_prompts_that_evaluation_cuts_are_told(tmp_path):
  write_domain(tmp_path / "ward", documents=40, train=20, validation=5, test=5)
  task = load_domain(tmp_path / "ward").tasks["instructions"]
  rows = [row for split in ("validation", "test") for row in read_task_rows(task, split)]
  longest = max(len(render(task, row)[0].encode()) for row in rows) + 1
  layout = Layout("gpt", 0, longest + 20, 0, 1)
  assert not [found for found in lengths(task, byte_tokenizer(), layout, "skip", 8) if "cut in" in found.what]
  told = [found for found in lengths(task, byte_tokenizer(), layout, "skip", 100) if "cut in" in found.what]
  assert {found.where for found in told} <= {"task instructions, validation", "task instructions, test"} and told


def test_answers_that_are_longer_than_what_is_asked_for_are_told(tmp_path):
  write_domain(tmp_path / "ward", documents=40, train=20, validation=5, test=5)
  tasks, tokenizer = load_domain(tmp_path / "ward").tasks, byte_tokenizer()
  answers = [len(row["target"].encode()) for row in read_task_rows(tasks["instructions"], "test")]
  layout, longest = Layout("t5", 512, 512, 0, 1), max(answers)
  for room, count in ((longest, 0), (longest - 1, answers.count(longest)), (1, 5)):
    told = [found for found in lengths(tasks["instructions"], tokenizer, layout, "skip", room) if found.fix]
    told = [found for found in told if found.where == "task instructions, test"]
    what = f"{count} of 5 right answers are longer than config.evaluate.max_new_tokens={room} and "
    assert [found.what.startswith(what) for found in told] == [True] * bool(count)
    settings = ConfigDict({"max_new_tokens": room, "max_examples": 0})
    assert answers_cut(tasks, tokenizer, settings) == [f"instructions: {found.what}" for found in told]


def test_token_ids_beyond_the_vocabulary_are_found(broken):
  from train.doctor import look_at_model

  batch = packed_batch("gpt") | {"decoder_target_tokens": np.full((8, 24), 5000, np.int32)}
  found = look_at_model({"base": ward(broken)}, batch, "base", byte_tokenizer(), 0)
  assert "token id 5000 is beyond the vocabulary of 384" in next(f.what for f in found if f.severity == "error")
