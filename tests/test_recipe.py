"""The whole recipe, small: every stage and arm, the report's form, nothing run twice, every verb of `argot`."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import domain as domain_recipe
from configs import pretrain, quickstart
from data.pipeline import held_out_batches
from data.sample import write_domain
from data.tasks import Task, load_domain
from data.tokenizer import byte_tokenizer, load_tokenizer, train_tokenizer
from scripts import __main__ as command
from scripts import flags
from train import loop, serve
from train.arms import MAIN_LINE, Stage, lone_tasks, overruled, plan_stages, replay_mixture, stage_config
from train.collect import side_by_side
from train.compare import read_run
from train.recipe import (
  find_tokenizer,
  load_materials,
  measure_of,
  open_stage,
  read_scores,
  run_recipe,
)
from train.reuse import check_made_of, check_measured, check_same_rows, stored_record
from train.skills import Skills, build_skills, open_old
from train.stage import Materials, flat, read_config, read_tasks

ARMS = ["only_urgency", "only_instructions", "multitask_without_continued"]
STAGES = {"gpt": [*MAIN_LINE, *ARMS], "t5": [*MAIN_LINE]}  # arms are the same on either architecture


def small(architecture: str):
  """The quickstart with a few steps of a one-layer model."""
  config = quickstart.get_config(architecture)
  layers = {"gpt": {"layers": 1}, "t5": {"encoder_layers": 1, "decoder_layers": 1}}[architecture]
  with config.unlocked():
    config.model.overrides.update({**layers, "embed_dim": 32})
    config.tokenizer.vocab_size = 600
    config.data.update({"decoder_length": 256, "encoder_length": 256, "batch_size": 8})
    config.evaluate.update(
      {"batch_size": 8, "max_examples": 10, "max_new_tokens": 4, "corpus_tokens": 1000, "samples": 2}
    )
    for stage in config.stages.values():
      stage.train.steps = 2
    config.arms.only_steps = 1
    if architecture == "t5":
      config.arms.update({"only": "none", "without_continued": False})
    if architecture == "gpt":
      config.stages.base.data.objective = "text_infilling"
      asked = {"evaluate_every_steps": 1, "evaluate_max_examples": 5, "best_metric": "urgency"}
      config.stages.multitask.train.update({**asked, "task_gradients_every_steps": 1})
  return config.lock()


@pytest.fixture(scope="module", params=["gpt", "t5"])
def finished(request, tmp_path_factory):
  """A finished small recipe: its architecture, workdir and report."""
  workdir = tmp_path_factory.mktemp(request.param)
  return request.param, workdir, run_recipe(small(request.param), workdir)


def test_the_report_has_its_form(finished):
  architecture, workdir, report = finished
  assert report["domain"] == "sample" and report["architecture"] == architecture
  stages = STAGES[architecture]
  assert [stage["name"] for stage in report["stages"]] == stages
  assert [stage["steps"] for stage in report["stages"]] == [2, 2, 2, 1, 1, 2][: len(stages)]
  before = ["", "base", "continued", "continued", "continued", "base"]
  assert [stage["init_from"] for stage in report["stages"]] == before[: len(stages)]
  assert all(stage["tokens"] > 0 and stage["seconds"] > 0 for stage in report["stages"])
  kinds = {skill["name"]: (skill["kind"], skill["metric"], skill["higher_is_better"]) for skill in report["skills"]}
  assert kinds["general"] == kinds["domain"] == ("perplexity", "perplexity", False)
  assert kinds["urgency"] == ("classification", "accuracy", True)
  assert kinds["instructions"] == ("generation", "rougeL", True)
  assert set(report["matrix"]) == set(stages)
  for row in report["matrix"].values():
    assert row["urgency"]["n"] == row["instructions"]["n"] == 10
    assert row["domain"]["objective"] == small(architecture).data.objective
    assert row["domain"]["bits_per_byte"] > 0 and row["domain"]["value"] > 1
    assert 0 <= row["urgency"]["macro_f1"] <= 1 and 0 <= row["instructions"]["exact_match"] <= 1
    assert row["urgency"]["calibration"]["rows"] == 10 and 0 <= row["urgency"]["generated"]["valid"] <= 1
    for metrics in row.values():
      assert metrics["interval"][0] - 1e-9 <= metrics["value"] <= metrics["interval"][1] + 1e-9
  assert set(report["baselines"]["urgency"]) == {"linear", "majority", "nearest_neighbour"}
  assert report["baselines"]["urgency"]["majority"]["n"] == 10  # the rows that the stages are measured on
  assert len(report["samples"]["instructions"]) == 2
  skills = {"general", "domain", "urgency", "instructions"}
  assert all(set(found) == skills for found in report["changes"].values())
  assert set(report["arms"]) == set(stages) - set(MAIN_LINE)
  tested = [change for table in ("changes", "arms") for found in report[table].values() for change in found.values()]
  assert len(tested) == (len(stages) - 1 + len(report["arms"])) * len(skills)
  assert all(change["low"] <= change["high"] and 0 < change["p"] <= 1 for change in tested)
  page = (workdir / "report.html").read_text()
  assert all(name in page for name in stages) and "<script src" not in page


def test_what_was_measured_while_training_is_in_the_report(finished):
  architecture, workdir, report = finished
  stages = {stage["name"]: stage for stage in report["stages"]}
  assert set().union(*(found for _, found in stages["multitask"]["task_loss"])) == {"urgency", "instructions", "domain"}
  assert stages["continued"]["validation"] == [] and stages["continued"]["best"] is None
  if architecture == "t5":
    return
  assert [step for step, _ in stages["multitask"]["validation"]] == [1, 2]
  assert all(values.keys() == {"urgency", "instructions"} for _, values in stages["multitask"]["validation"])
  assert stages["multitask"]["task_gradients"][0][1].keys() == {"urgency", "instructions", "domain"}
  best = {name: stage["best"]["skill"] for name, stage in stages.items() if stage["best"]}
  assert best == {
    "multitask": "urgency",
    "only_urgency": "urgency",
    "only_instructions": "instructions",
    "multitask_without_continued": "urgency",
  }
  for name in ("Every task while it was trained", "Whose gradient it is"):
    assert name in (workdir / "report.html").read_text()


def test_a_stage_that_is_done_is_not_run_again(finished, monkeypatch):
  architecture, workdir, report = finished
  monkeypatch.setattr(loop, "train", lambda *args: pytest.fail("trained again"))
  again = run_recipe(small(architecture), workdir)
  assert again["matrix"] == report["matrix"]
  changed = small(architecture)
  with changed.unlocked():
    changed.optimizer.learning_rate = 0.5
  with pytest.raises(ValueError, match="optimizer.learning_rate"):
    run_recipe(changed, workdir)


@pytest.mark.parametrize(
  ("task", "fields", "settings", "message"),
  [
    ("instructions", {"metrics": ("chrf",)}, {}, "'rougeL'.*'chrf'.* is asked for now; delete that file"),
    ("urgency", {"label_score": "pmi"}, {}, "'label_score': 'sum'.*'label_score': 'pmi'"),
    ("instructions", {}, {"beams": 4}, "'beams': 1.*'beams': 4"),
    ("instructions", {}, {"candidates": 4}, "'candidates': 1.*'candidates': 4"),
    ("urgency", {}, {"target_accuracy": 0.9}, "'target_accuracy': 0.0.*'target_accuracy': 0.9"),
    ("urgency", {}, {"objective": "prefix_lm"}, "'general' with .*'objective': 'prefix_lm'"),
    ("urgency", {"name": "wards"}, {}, "'wards' with .'metric': None"),
  ],
)
def test_another_way_of_measuring_is_not_ignored(finished, task, fields, settings, message):
  architecture, workdir, _ = finished
  config, path = small(architecture), workdir / "stages" / "base" / "evaluation.json"
  config.evaluate.update(settings)
  tasks = load_domain(workdir / "domain" / "sample").tasks
  skills = json.loads(path.read_text())["skills"]
  check_measured(skills, tasks, small(architecture), path)
  changed = dataclasses.replace(tasks[task], **fields)
  with pytest.raises(ValueError, match=message):
    check_measured(skills, {changed.name: changed}, config, path)


def test_tasks_that_changed_are_not_those_that_were_taught(finished):
  architecture, workdir, report = finished
  file = workdir / "domain" / "sample" / "tasks.json"
  before = file.read_text()
  changed = json.loads(before)
  changed["urgency"]["labels"].reverse()
  changed["instructions"]["instruction"] = "Write."
  try:
    file.write_text(json.dumps(changed))
    with pytest.raises(
      ValueError, match=r"(?s)base.*read otherwise.*instructions.instruction.*'Write.'.*urgency.labels"
    ):
      run_recipe(small(architecture), workdir)
  finally:
    file.write_text(before)
  assert run_recipe(small(architecture), workdir)["matrix"] == report["matrix"]


def test_what_a_done_stage_was_made_of_is_compared(finished, monkeypatch, tmp_path):
  architecture, workdir, report = finished
  monkeypatch.setattr(loop, "train", lambda *args: pytest.fail("trained again"))
  file = workdir / "domain" / "sample" / "urgency" / "train.jsonl"
  before, saved = file.read_text(), (workdir / "stages" / "multitask" / "tokenizer" / "tokenizer.json").read_bytes()
  try:
    file.write_text(before.replace('"target": "urgent"', '"target": "routine"', 1))
    with pytest.raises(ValueError, match=r"(?s)stages/multitask.*source.urgency"):
      run_recipe(small(architecture), workdir)
  finally:
    file.write_text(before)
  other = small(architecture)
  other.tokenizer.path = str(tmp_path)
  answers = (workdir / "domain" / "sample" / "instructions" / "train.jsonl").read_text().splitlines()[:500]
  train_tokenizer(answers, 900).save(tmp_path)
  with pytest.raises(ValueError, match="made with the tokenizer in .*base/tokenizer.*is another now"):
    run_recipe(other, workdir)
  assert (workdir / "stages" / "multitask" / "tokenizer" / "tokenizer.json").read_bytes() == saved
  run = json.loads((workdir / "stages" / "multitask" / "evaluation.json").read_text())["run"]
  stage = plan_stages(small(architecture), load_domain(workdir / "domain" / "sample"))[2]
  config, folder = stage_config(small(architecture), stage, workdir), workdir / "stages" / "multitask"
  check_made_of(run, config, stage, run["fingerprint"], folder)
  with pytest.raises(
    ValueError, match="made from other parameters than those of .*continued now.*stages that start from"
  ):
    check_made_of({**run, "base": {**run["base"], "id": "another"}}, config, stage, run["fingerprint"], folder)
  assert run_recipe(small(architecture), workdir)["matrix"] == report["matrix"]


@pytest.mark.parametrize(
  ("stage", "settings", "message"),
  [
    ("continued", {"general": "", "data": {"bad_rows": "skip"}}, r"'data.bad_rows', 'general'.*one for all stages"),
    ("multitask", {"optimizer": {"name": "admw"}}, "'admw'"),
    ("multitask", {"lora": {"rank": 4, "targets": "quary$"}}, "targets='quary.' matches no parameter"),
    ("multitask", {"train": {"accumulation_steps": 3}}, "accumulation_steps 3"),
    ("multitask", {"train": {"keep_checkpoints": 0}}, "keep_checkpoints is 0; expected 1 or more"),
    ("multitask", {"model": {"overrides": {"kv_heads": 3}}}, "kv_heads"),
    ("multitask", {"train": {"step": "shardmap"}}, "'shardmap'"),
    ("multitask", {"train": {"spike_factor": 0.5}}, "spike_factor is 0.5"),
    ("multitask", {"train": {"label_smoothing": 1.5}}, "label_smoothing"),
    ("multitask", {"train": {"accumulation_steps": 0}}, "accumulation_steps is 0; expected 1 or more"),
    ("multitask", {"train": {"loss_chunk_tokens": 0}}, "loss_chunk_tokens is 0; expected 1 or more"),
    ("multitask", {"train": {"prefetch_batches": -1}}, "prefetch_batches is -1; expected 0 or more"),
    ("multitask", {"data": {"batch_size": 0}}, "batch_size is 0; expected 1 row or more"),
    ("multitask", {"model": {"dropout": 1.0}}, "dropout is 1.0; expected a rate"),
    ("multitask", {"optimizer": {"clip_norm": -1.0}}, "clip_norm is -1.0; expected 0"),
    ("continued", {"seed": -1}, "seed must be 0 or more"),
    ("multitask", {"train": {"profile_steps": 99}}, "profile_steps 99"),
    ("multitask", {"replay": {"temperature": 0.0}, "data": {"mixture": {"replay": 1.0}}}, "replay.temperature"),
    ("multitask", {"evaluate": {"max_examples": 5}}, "'evaluate.max_examples'.*one for all stages"),
  ],
)
def test_a_later_stages_mistakes_are_found_before_the_first(stage, settings, message, tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "train", lambda *args: pytest.fail("a stage was trained"))
  config = small("gpt")
  with config.unlocked():
    config.stages[stage].update(settings)
  with pytest.raises(ValueError, match=message):
    run_recipe(config, tmp_path)


def test_a_bad_held_out_text_is_found_before_the_first_stage(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "train", lambda *args: pytest.fail("a stage was trained"))
  write_domain(tmp_path / "own")
  held_out = tmp_path / "own" / "corpus_validation.jsonl"
  held_out.write_text("{no JSON\n" + held_out.read_text())
  config = small("gpt")
  config.domain = str(tmp_path / "own")
  with pytest.raises(ValueError, match="corpus_validation.jsonl:.*not a line of JSON"):
    run_recipe(config, tmp_path / "run")


def test_an_old_task_that_cannot_be_asked_is_found_before_the_first_stage(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "train", lambda *args: pytest.fail("a stage was trained"))
  write_domain(tmp_path / "old")
  tasks = json.loads((tmp_path / "old" / "tasks.json").read_text())
  tasks["urgency"]["chat"] = True
  (tmp_path / "old" / "tasks.json").write_text(json.dumps(tasks))
  config = small("gpt")
  with config.unlocked():
    config.retain.old = str(tmp_path / "old")
  with pytest.raises(ValueError, match="task 'old/urgency' has `chat`: true, but the tokenizer has no chat template"):
    run_recipe(config, tmp_path / "run")


def test_without_general_text_mixtures_go_without_it(tmp_path, capsys):
  config = small("gpt")
  config.general, config.tokenizer.path, config.data.decoder_length = "", "bytes", 512
  config.arms.update({"only": "none", "without_continued": False})
  materials = load_materials(config, tmp_path)
  assert 'config.general is "": mixtures go without general text' in capsys.readouterr().out
  planned = {stage.name: stage for stage in plan_stages(config, materials.domain)}
  with pytest.raises(
    ValueError, match='general.* leaves nothing to train on without general text .config.general is ""'
  ):
    open_stage(config, tmp_path, planned["base"], materials)
  config.stages.base.train.steps = 0  # as where weights are given
  with config.unlocked():
    config.stages.continued.data.mixture = {"domain": 0.5, "general": 0.5}
  streams = {name: open_stage(config, tmp_path, stage, materials)[1] for name, stage in planned.items()}
  read = {name: sorted(stream.task_names) for name, stream in streams.items()}
  assert read == {"base": [], "continued": ["domain"], "multitask": ["domain", "instructions", "urgency"]}
  assert replay_mixture(config, materials.domain, 0.2)["domain"] == pytest.approx(0.2)
  assert set(streams["base"].summary(streams["base"].state())) == {"packing"}


def test_general_text_may_be_one_of_the_sources(tmp_path):
  rows = [{"body": {"text": f"Some text, number {number}."}} for number in range(40)]
  (tmp_path / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = small("gpt")
  with config.unlocked():
    config.sources.letters = {"path": str(tmp_path / "letters.jsonl"), "fields": {"text": "body.text"}}
  config.general, config.tokenizer.path = "letters", "bytes"
  found = load_materials(config, tmp_path)
  assert len(found.general) == 38 and len(found.general_test) == 2 and not found.sources


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"text": "a"}, "expected ."),
    ({"input": "a", "share": float("nan")}, "a.jsonl:1: .*this one is no JSON"),
    ({"input": "a", "user": "\ud83d"}, "a.jsonl:1: .*this one is no JSON"),
  ],
)
def test_requests_whose_answers_could_not_be_written_are_refused(row, message, tmp_path):
  (tmp_path / "a.jsonl").write_text(json.dumps(row))
  with pytest.raises(ValueError, match=message):
    serve.read_requests(None, str(tmp_path / "a.jsonl"), "--text=TEXT")


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
  serve.check_output(None)
  serve.check_output(str(tmp_path / "new" / "out.jsonl"))
  assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())
  with pytest.raises(PermissionError, match="--output=.*cannot be written"):
    serve.check_output(str(tmp_path / "new"))


def test_a_field_that_is_no_string_is_named(tmp_path):
  task = Task.from_dict("t", {"kind": "generation", "templates": [{"input": "{age} {input}", "target": "{target}"}]})
  loaded = serve.Loaded(tmp_path, None, {"t": task}, {})
  assert loaded.prompt(task, {"input": "a", "age": "42"}) == "42 a"
  with pytest.raises(ValueError, match="needs the fields .'age'. as strings, the input has .*'age': 'int'"):
    loaded.prompt(task, {"input": "a", "age": 42})


def test_stages_that_are_none_are_named(tmp_path):
  config = small("gpt")
  with config.unlocked():
    config.stages.only_urgency = {"train": {"steps": 1}}
  with pytest.raises(ValueError, match="config.stages has .'only_urgency'.; expected"):
    run_recipe(config, tmp_path)
  with pytest.raises(ValueError, match="config.stages has no 'base'.*argot train"):
    stage_config(pretrain.get_config("gpt"), Stage("base", "", "base"), tmp_path)


def test_a_lone_task_without_validation_ends_with_its_last_step(finished):
  _, workdir, _ = finished
  domain = load_domain(workdir / "domain" / "sample")
  tasks = dict(domain.tasks)
  files = {split: file for split, file in tasks["instructions"].files.items() if split != "validation"}
  tasks["instructions"] = dataclasses.replace(tasks["instructions"], files=files)
  config = small("gpt")
  planned = {stage.name: stage for stage in plan_stages(config, dataclasses.replace(domain, tasks=tasks))}
  best = {name: stage_config(config, stage, workdir).train.best_metric for name, stage in planned.items()}
  assert (best["multitask"], best["only_urgency"], best["only_instructions"]) == ("urgency", "urgency", "")


def test_texts_are_measured_in_one_form(finished):
  architecture, workdir, _ = finished
  config = small(architecture)
  with config.unlocked():
    config.stages.continued.data.update({"noise_density": 0.6, "decoder_length": 128, "objective": "prefix_lm"})
  own = stage_config(config, Stage("continued", "base", "continued"), workdir)
  tokenizer, texts = byte_tokenizer(), load_domain(workdir / "domain" / "sample").corpus_test
  expected, *_ = held_out_batches(texts, tokenizer, config)
  found, *_ = held_out_batches(texts, tokenizer, measure_of(config, own))
  assert own.data.noise_density == 0.6
  for one, other in zip(expected, found, strict=True):
    np.testing.assert_array_equal(one["decoder_target_tokens"], other["decoder_target_tokens"])


def test_what_values_depend_on_is_compared(finished, tmp_path):
  architecture, workdir, _ = finished
  config = small(architecture)
  old = tmp_path / "old"
  shutil.copytree(workdir / "domain" / "sample", old)
  config.retain = {"old": str(old)}
  domain = load_domain(workdir / "domain" / "sample")
  materials = Materials(None, domain, None, None, {})
  path = workdir / "stages" / "base" / "evaluation.json"
  then = build_skills(config, materials)
  result = {"rows": dict(then.digests), "asked": dict(then.asked), "skills": dict.fromkeys(then.texts), "run": {}}
  result = json.loads(json.dumps(result))
  stage = Stage("base", "", "base")
  check_same_rows(result, stage, build_skills(config, materials), path)
  with config.unlocked():
    config.evaluate.max_new_tokens = 5
  with pytest.raises(ValueError, match="instructions.max_new_tokens: 4 then, 5 now"):
    check_same_rows(result, stage, build_skills(config, materials), path)
  config.evaluate.max_new_tokens = 4
  rows = old / "urgency" / "validation.jsonl"
  rows.write_text("".join(rows.read_text().splitlines(True)[1:]))
  with pytest.raises(ValueError, match="(?s)old/urgency.validation rows: .*measure again"):
    check_same_rows(result, stage, build_skills(config, materials), path)
  tasks = json.loads((old / "tasks.json").read_text())
  tasks["instructions"]["instruction"] = "Write it."
  (old / "tasks.json").write_text(json.dumps(tasks))
  with pytest.raises(ValueError, match="old/instructions.instruction: .*'Write it.' now"):
    check_same_rows(result, stage, build_skills(config, materials), path)


def test_a_tokenizer_of_other_settings_is_trained_anew_until_a_stage_uses_it(finished, tmp_path, capsys):
  architecture, workdir, _ = finished
  domain, config = load_domain(workdir / "domain" / "sample"), small(architecture)
  find = lambda: find_tokenizer(config, tmp_path, domain, None).vocab_size
  assert find() == 600 and "training a tokenizer" in capsys.readouterr().out
  assert find() == 600 and "training a tokenizer" not in capsys.readouterr().out
  config.tokenizer.vocab_size = 500
  assert find() == 500
  (tmp_path / "stages" / "base").mkdir(parents=True)
  (tmp_path / "stages" / "base" / "config.json").write_text("{}")
  config.tokenizer.vocab_size = 600
  assert find() == 500  # and the stage, made with another setting, is refused


def test_stages_that_kept_fewer_samples_stand_side_by_side():
  row = {"input": "a", "target": "b", "output": "c"}
  results = {"base": {"samples": {"t": [row] * 3}}, "multitask": {"samples": {"t": [row] * 2}}}
  stages = [Stage(name, "", name) for name in results]
  expected = {"input": "a", "target": "b", "outputs": {"base": "c", "multitask": "c"}}
  assert side_by_side("t", stages, results) == [expected] * 2


def test_a_stage_of_an_older_version_is_named(finished, tmp_path):
  _, workdir, _ = finished
  with pytest.raises(FileNotFoundError, match="scores.npz is missing.*delete evaluation.json"):
    read_scores(tmp_path)
  assert set(read_scores(workdir / "stages" / "base")) == {"general", "domain", "urgency", "instructions"}


@pytest.mark.parametrize("left", [b"", b'{"half', b"PK\x03\x04 half", b"\xff\xfe"])  # such as after a power cut
@pytest.mark.parametrize(
  ("name", "read"),
  [
    ("config.json", lambda folder: read_config(folder)),
    ("tasks.json", lambda folder: read_tasks(folder)),
    ("argot_tokenizer.json", lambda folder: load_tokenizer(str(folder))),
    ("evaluation.json", lambda folder: stored_record(folder)),
    ("report.json", lambda folder: read_run(folder, "run")),
    ("scores.npz", lambda folder: read_scores(folder)),
  ],
)
def test_a_damaged_file_of_a_stage_is_named(name, read, left, tmp_path):
  (tmp_path / name).write_bytes(left)
  with pytest.raises(ValueError, match=f"{name} is damaged .*delete"):
    read(tmp_path)


def test_every_verb_answers(finished, tmp_path, capsys, monkeypatch):
  architecture, workdir, _ = finished

  def argot(*arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["argot", *arguments])
    command.main()
    return capsys.readouterr().out

  note = "72F c/o SOBAR. sats 84%. PMH COPD. Rx amox 500mg PO TDS 5/7. R/V GP 2/52."
  ask = ("classify", f"--model={workdir}", "--task=urgency", f"--text={note}")
  answer = json.loads(argot(*ask))
  assert answer["label"] in answer["probabilities"] and sum(answer["probabilities"].values()) == pytest.approx(1)
  assert "abstain" not in answer  # config.evaluate.target_accuracy is 0
  file = workdir / "stages" / "multitask" / "calibration.json"
  stored = json.loads(file.read_text())
  assert set(stored) == {"urgency"} and stored["urgency"]["temperature"] > 0
  # What is stored is what is used: even odds at a great temperature, and less sure than any threshold.
  file.write_text(json.dumps({"urgency": {**stored["urgency"], "temperature": 1e6, "threshold": 0.5}}))
  unsure = json.loads(argot(*ask))
  file.write_text(json.dumps(stored))
  assert unsure["abstain"] is True and unsure["label"] == answer["label"]
  assert list(unsure["probabilities"].values()) == pytest.approx([1 / 3] * 3, abs=1e-3)
  rows = tmp_path / "rows.jsonl"
  rows.write_text("".join(json.dumps({"input": note, "id": i}) + "\n" for i in range(3)))
  out = tmp_path / "out.jsonl"
  argot(
    "generate", f"--model={workdir / 'stages' / 'base'}", "--task=instructions", f"--input={rows}", f"--output={out}"
  )
  assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [0, 1, 2]
  assert "output" in json.loads(argot("generate", f"--model={workdir}", "--prompt=hello", "--max_new_tokens=3"))
  scores = tmp_path / "scores.json"
  argot(
    "evaluate",
    f"--model={workdir}",
    f"--domain={workdir / 'domain' / 'sample'}",
    "--split=validation",
    "--beams=2",
    f"--output={scores}",
  )
  skills = json.loads(scores.read_text())["skills"]
  assert set(skills) == {"domain", "urgency", "instructions"} and skills["instructions"]["beams"] == 2
  corpus = workdir / "domain" / "sample" / "corpus_validation.jsonl"
  assert "wrote" in argot("tokenizer", f"--corpus={corpus}", "--vocab_size=500", f"--to={tmp_path / 'tokenizer'}")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["fly"], "unknown verb 'fly'; known: recipe"),
    (["classify", "--task=urgency", "--text=x"], "missing --model"),
    (["classify", "--model=nowhere", "--task=urgency", "--text=x"], "no model in nowhere"),
    (["generate", "--model=nowhere"], "give either --prompt=TEXT or --input"),
    (["train", "--config=configs/pretrain.py:gpt", "--config.train.stepz=3", "--workdir=x"], "stepz"),
    (["recipe", "--config=configs/nothing.py", "--workdir=x"], "nothing.py"),
    (
      ["recipe", "--config=configs/domain.py", "--config.train.steps=5", "--workdir={tmp}"],
      "--config.train.steps=5 reaches no stage, for each has its own: base 100, continued 600, multitask 700",
    ),
    (
      ["recipe", "--config=configs/domain.py", "--config.stages.base.data.objectve=ul2", "--workdir=x"],
      "--config.stages.base.data.objectve: config.data has no key 'objectve' (is 'objective' meant?); known are",
    ),
    (
      ["recipe", "--config=configs/domain.py", "--config.stages.bas.train.steps=2", "--workdir=x"],
      "--config.stages.bas.train.steps: config.stages has no key 'bas' (is 'base' meant?); known are",
    ),
    (["train", "--config=configs/pretrain.py", "--config.seed.x=2", "--workdir=x"], "config.seed is a value"),
    (
      ["recipe", "--config=configs/domain.py:t5-tiny", "--config.domain=nowhere", "--workdir={tmp}"],
      "nowhere is missing",
    ),
  ],
)
def test_mistakes_end_with_one_clear_line(arguments, message, tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["argot", *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)])
  with pytest.raises(SystemExit) as stopped:
    command.main()
  assert message in str(stopped.value) and stopped.value.code not in (0, None)


def test_a_flag_sets_what_only_a_stage_or_a_name_of_the_users_makes(monkeypatch):
  monkeypatch.setattr(sys, "argv", sys.argv)  # which parsing sets
  given = {"stages.multitask.lora.rank": 8, "stages.base.data.objective": "ul2", "retain.old": "runs/old"}
  given |= {"stages.base.data.mixture.domain": 0.5, "stages.continued.data.mixture.letters": [0.5, 1.0]}
  values = flags.new()
  flags.config(values)
  arguments = [f"--config.{key}={value}" for key, value in given.items()]
  flags.parse(values, "recipe", "", ["--config=configs/domain.py", *arguments], ["config"])
  found = flat(values.config.to_dict())
  assert flags.given(values) == given and {key: found[key] for key in given} == given
  assert values.config.is_locked and values.config.lora.rank == 0
  stage_config(values.config, Stage("multitask", "", "multitask"), Path())
  with pytest.raises(SystemExit, match="invalid literal for int"):  # a type is that of the config's own key
    flags.parse(values, "recipe", "", ["--config=configs/domain.py", "--config.stages.base.lora.rank=x"], ["config"])


@pytest.mark.parametrize(
  ("arg", "given", "expected"),
  [
    (
      "t5-tiny",
      {"optimizer.learning_rate": 5e-4},
      ["does not reach .*own: multitask 0.02. Set --config.stages.multitask"],
    ),
    ("t5-tiny", {"optimizer.warmup_steps": 7}, ["own: base 20"]),
    ("t5-init_from", {"optimizer.warmup_steps": 7}, []),  # base takes no step
    ("t5-tiny", {"optimizer.learning_rate": 2e-2, "train.log_every_steps": 3, "domain": "mine"}, []),
    ("t5-tiny", {"train.steps": 5, "stages.base.train.steps": 5}, ["own: continued 600, multitask 700. Set .*STAGE"]),
    ("t5-tiny", {"optimizer.warmup_steps": 7, "stages.base.optimizer.warmup_steps": 5}, []),  # said by the user
    ("t5-tiny", {"data.mixture.letters": 0.5}, "reaches no stage, for each has its own: base 0, continued 0"),
  ],
)
def test_flags_that_do_not_reach_a_stage_are_told(arg, given, expected):
  config = domain_recipe.get_config(arg)
  with config.unlocked():
    config.update_from_flattened_dict({key: value for key, value in given.items() if "mixture" not in key})
    config.data.mixture.update({key.split(".")[-1]: value for key, value in given.items() if "mixture" in key})
  if isinstance(expected, str):
    with pytest.raises(ValueError, match=expected):
      overruled(config, given)
    return
  lines = overruled(config, given)
  assert len(lines) == len(expected) and all(map(re.search, expected, lines)), lines


@pytest.mark.parametrize("verb", command.VERBS)
def test_help_has_an_example(verb, capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["argot", verb, "--help"])
  with pytest.raises(SystemExit) as stopped:
    command.main()
  shown = capsys.readouterr().out
  assert stopped.value.code == 0 and f"argot {verb} --" in shown and "Example" in shown


@pytest.fixture(scope="module")
def swept(finished, tmp_path_factory):
  """The finished recipe once more, with both sweeps, an old domain and rules: only what is new is trained."""
  architecture, done, _ = finished
  workdir = tmp_path_factory.mktemp("swept") / "run"
  shutil.copytree(done, workdir)
  for name in MAIN_LINE:
    (workdir / "stages" / name / "evaluation.json").unlink()  # measured again, with the old domain's skills
  config = swept_config(architecture, done)
  return config, workdir, run_recipe(config, workdir)


def swept_config(architecture: str, old: Path):
  """`small` with both sweeps, the old run's domain, and little of everything to measure."""
  config = small(architecture)
  config.evaluate.update({"max_examples": 4, "corpus_tokens": 300, "samples": 1})
  config.arms.update({"only": "none", "without_continued": False, "replay": (0.5,), "averaging": (0.25,)})
  config.arms.averaging_with = "base"  # further from multitask than the stage before it
  with config.unlocked():
    config.retain.old = str(old)
    config.gate = {"speaks": {"skill": "old/domain", "at_most": 1e9}}
  return config.lock()


@pytest.mark.parametrize("finished", ["gpt"], indirect=True)  # the same on either architecture
def test_sweeps_and_old_skills_are_in_the_report(swept):
  config, workdir, report = swept
  assert [stage["name"] for stage in report["stages"]] == [
    "base",
    "continued",
    "multitask",
    "replay_0.5",
    "averaged_0.25",
  ]
  assert [stage["sweep"]["share"] for stage in report["stages"][3:]] == [0.5, 0.25]
  drawn = report["mixture"]["replay_0.5"]
  assert sum(drawn[name]["asked"] for name in ("domain", "general")) == pytest.approx(0.5)
  assert drawn["urgency"]["asked"] / drawn["instructions"]["asked"] == pytest.approx(0.56 / 0.40)
  assert report["mixture"]["averaged_0.25"] == {} and report["stages"][4]["steps"] == 0
  retained = {skill["name"] for skill in report["skills"] if skill.get("retained")}
  assert retained == {"old/domain", "old/urgency", "old/instructions"}
  for row in report["matrix"].values():  # the same domain, so the same figures
    assert row["old/domain"]["value"] == row["domain"]["value"] and row["old/urgency"]["n"] == 4
  assert set(report["transfer"]["multitask"]["tasks"]["skills"]) == {"old/urgency", "old/instructions"}
  assert set(report["earlier"]["multitask"]) == {"base"} and report["gate"]["passed"] is True
  page = (workdir / "report.html").read_text()
  assert all(text in page for text in ("Gate passed", "Averaging", "Replay", "backward transfer"))


@pytest.mark.parametrize("finished", ["gpt"], indirect=True)  # the same on either architecture
def test_an_averaged_stage_has_the_averaged_parameters(swept):
  config, workdir, _ = swept
  params = {}
  for name in ("base", "multitask", "averaged_0.25"):
    with serve.load(str(workdir / "stages" / name)) as loaded:
      params[name] = jax.device_get(loaded.evaluator.params)
  hand = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, params["base"], params["multitask"])
  leaves = zip(*map(jax.tree.leaves, (hand, params["averaged_0.25"], params["multitask"])), strict=True)
  for expected, found, later in leaves:
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert not np.array_equal(found, later)


@pytest.mark.parametrize("finished", ["gpt"], indirect=True)  # the same on either architecture
def test_an_average_of_other_stages_is_refused(swept):
  config, workdir, _ = swept
  stages = plan_stages(config, load_domain(workdir / "domain" / "sample"))
  done = json.loads((workdir / "stages" / "averaged_0.25" / "evaluation.json").read_text())
  skills = Skills({}, {}, frozenset(), {}, {})
  check_same_rows(done, stages[-1], skills, workdir)
  with pytest.raises(ValueError, match="average with 'base', 'continued' is asked for now"):
    check_same_rows(done, stages[-1]._replace(average_with="continued"), skills, workdir)
  with pytest.raises(ValueError, match="measured 'urgency' on other test rows"):
    check_same_rows(done, stages[-1], skills._replace(digests={"urgency": "0"}), workdir)


@pytest.mark.parametrize("finished", ["gpt"], indirect=True)  # the same on either architecture
@pytest.mark.parametrize(
  ("skill", "rule", "code"),
  [("domain", {"at_most": 1e9}, 0), ("urgency", {"at_least": 1.01}, 3), ("urgncy", {"at_least": 0.5}, "no skill")],
)
def test_the_gate_sets_the_exit_code_of_the_command(swept, skill, rule, code, tmp_path, monkeypatch, capsys):
  config, workdir, _ = swept
  file = tmp_path / "config.py"
  file.write_text(
    "from tests.test_recipe import swept_config\n"
    "def get_config(arg=''):\n"
    f"  config = swept_config({config.architecture!r}, {config.retain.old!r})\n"
    "  with config.unlocked():\n"
    f"    config.gate = {{'rule': {dict(skill=skill, **rule)!r}}}\n"
    "  return config.lock()\n"
  )
  monkeypatch.setattr(loop, "train", lambda *args: pytest.fail("trained again"))
  monkeypatch.setattr(sys, "argv", ["argot", "recipe", f"--config={file}", f"--workdir={workdir}"])
  ended = 0
  try:
    command.main()
  except SystemExit as stopped:
    ended = stopped.code
  if code == "no skill":
    assert "config.gate.rule.skill is 'urgncy': nothing by that name is measured" in ended
    return
  assert ended == code
  outcome = {0: "passed", 3: "FAILED"}[code]
  assert f"gate: {outcome}\n" in capsys.readouterr().out
  assert json.loads((workdir / "report.json").read_text())["gate"]["passed"] is (code == 0)


@pytest.mark.parametrize(
  ("arms", "message"),
  [
    ({"replay": (0.1, 0.1)}, "arms.replay must be different shares"),
    ({"replay": (1.0,)}, "arms.replay must be.*from 0 and below 1"),
    ({"averaging": (0.0,)}, "arms.averaging must be.*above 0 and below 1"),
    ({"averaging": (0.5,), "averaging_with": "multitask"}, "averaging_with is 'multitask'; expected 'base' or"),
  ],
)
def test_sweeps_that_cannot_be_are_refused(finished, arms, message):
  architecture, workdir, _ = finished
  config = small(architecture)
  config.arms.update(arms)
  with pytest.raises(ValueError, match=message):
    plan_stages(config, load_domain(workdir / "domain" / "sample"))


def test_a_share_of_replay_needs_fixed_shares_of_tasks(finished):
  architecture, workdir, _ = finished
  config, domain = small(architecture), load_domain(workdir / "domain" / "sample")
  assert replay_mixture(config, domain, 0.0) == pytest.approx({"urgency": 0.56 / 0.96, "instructions": 0.40 / 0.96})
  with config.unlocked():
    config.stages.multitask.data.mixture = {"tasks": [1.0, 0.5], "domain": 0.1}
  with pytest.raises(ValueError, match="shares of .'tasks'. in multitask's mixture change over the stage"):
    replay_mixture(config, domain, 0.1)


def test_an_old_domain_that_is_gone_is_named(tmp_path):
  config = small("gpt")
  with config.unlocked():
    config.retain.old = str(tmp_path)
  with pytest.raises(FileNotFoundError, match="config.retain.old=.*expected a domain folder, or a run.*no model in"):
    open_old("old", config.retain.old, config)


def test_stages_and_arms_are_planned_from_the_config(finished):
  architecture, workdir, _ = finished
  domain, config = load_domain(workdir / "domain" / "sample"), small(architecture)
  assert [stage.name for stage in plan_stages(config, domain)] == STAGES[architecture]
  for asked, expected in (("none", []), ("all", ["urgency", "instructions"]), ("instructions", ["instructions"])):
    config.arms.only = asked
    assert lone_tasks(config, domain) == expected
  config.arms.only = "wards"
  with pytest.raises(ValueError, match="'wards'.*urgency"):
    lone_tasks(config, domain)
  with config.unlocked():
    config.stages.base.train.stepz = 3
  config.arms.only = "none"
  with pytest.raises(ValueError, match="train.stepz"):
    stage_config(config, plan_stages(config, domain)[0], workdir)
