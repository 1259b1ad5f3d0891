"""What evaluation finds: label scores, calibration by split, free answers, the parts of every headline."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import train.evaluator
from configs.base import get_config
from data.components import Answers
from data.features import Example, Layout, decoder_only
from data.pipeline import held_out_batches
from data.prompts import frame_of, render
from data.rows import hash_of
from data.sources import open_texts, texts_of
from data.tasks import Domain, Task, read_task_rows
from data.tokenizer import byte_tokenizer
from models import MODELS
from models.decode import Choice
from models.sharding import make_mesh
from tests.conftest import SMALL, blind_tokenizer, distinct_params
from train import calibration, generate
from train.baselines import baselines
from train.evaluate import check_evaluation, evaluate_task, perplexity
from train.evaluator import Evaluator
from train.generate import Wish, answers
from train.loop import check_config
from train.metrics import VALUES, generation_metrics
from train.recipe import evaluate_all
from train.skills import build_skills
from train.stage import Materials
from train.statistics import figure

LABELS = ["routine", "urgent", "now"]
ROWS = [("sob", "urgent"), ("rash", "routine"), ("fall", "now"), ("cough", "routine"), ("pain", "routine")]


def evaluator_of(architecture="gpt", **evaluate) -> Evaluator:
  """A small model with distinct parameters."""
  config, tokenizer = get_config(), byte_tokenizer()
  config.architecture = architecture
  config.data.decoder_length = config.data.encoder_length = 128
  config.evaluate.update({"batch_size": 8, "max_new_tokens": 6, **evaluate})
  model = MODELS[architecture]("tiny", tokenizer.vocab_size, **SMALL[architecture])
  return Evaluator(config, model, distinct_params(model), tokenizer)


def task_of(folder, kind="classification", splits=("train", "validation", "test"), **more) -> Task:
  fields = {
    "kind": kind,
    "instruction": "How urgent?",
    **({"labels": LABELS} if kind == "classification" else {}),
    **more,
  }
  for split in splits:
    file = folder / f"{split}.jsonl"
    rows = ROWS[::-1] * 3 if split == "validation" else ROWS
    file.write_text("".join(json.dumps({"input": text, "target": target}) + "\n" for text, target in rows))
    fields[split] = str(file)
  return Task.from_dict("t", fields)


@pytest.mark.parametrize("architecture", ["gpt", "t5"])
def test_label_scores_are_made_from_the_log_probabilities(tmp_path, one_device, architecture):
  task, evaluator = task_of(tmp_path), evaluator_of(architecture)
  prompts = [render(task, {"input": text})[0] for text, _ in ROWS]
  sums, found = evaluator.classify(task, prompts), evaluator.label_scores(task, prompts)
  assert found["sum"] == pytest.approx(sums, abs=1e-4)
  assert found["mean"] == pytest.approx(sums / [len(label) + 1 for label in LABELS], abs=1e-4)  # bytes, and EOS
  prior = evaluator.classify(task, ["t: How urgent?\n"])[0]
  assert found["pmi"] == pytest.approx(sums - prior, abs=1e-4)
  assert np.abs(prior).min() > 1e-3


@pytest.mark.parametrize("architecture", ["gpt", "t5"])
def test_labels_of_many_tokens_get_back_what_a_loss_by_example_took(tmp_path, one_device, architecture):
  task, evaluator = task_of(tmp_path), evaluator_of(architecture)
  prompts = [render(task, {"input": text})[0] for text, _ in ROWS]
  by_token = evaluator.label_scores(task, prompts)
  evaluator.config.data.loss_normalisation = "example"
  by_example = evaluator.label_scores(task, prompts)
  # The best model of a loss whose tokens weigh 1/n has q(label) in proportion to p(label) / n: q n is p again.
  assert by_example["sum"] == pytest.approx(by_token["sum"] + np.log([len(label) + 1 for label in LABELS]))
  assert by_example["pmi"] == pytest.approx(by_token["pmi"])  # the same with and without an input


def test_a_prompt_whose_fields_are_all_empty_has_no_score_by_pmi(tmp_path, one_device):
  templates = [{"input": "{input} {ward}: {instruction}", "target": "so {target}"}]
  task, evaluator = task_of(tmp_path, splits=(), templates=templates), evaluator_of()
  assert evaluator.label_scores(task, [" : How urgent?"])["pmi"] == pytest.approx(np.zeros((1, 3)), abs=1e-4)


def test_temperature_and_threshold_come_from_the_validation_split(tmp_path, one_device):
  task, evaluator = task_of(tmp_path, label_score="pmi"), evaluator_of(target_accuracy=0.2)
  found = evaluate_task(evaluator, task, "test")
  prompts = [render(task, {"input": text})[0] for text, _ in ROWS[::-1] * 3]
  targets = np.array([LABELS.index(label) for _, label in ROWS[::-1] * 3])
  expected = calibration.fit(evaluator.label_scores(task, prompts)["pmi"], targets, "pmi", 0.2)
  assert found.calibration.rows == 15 and found.calibration.label_score == "pmi"
  assert found.calibration.temperature == pytest.approx(expected.temperature, rel=1e-3)
  assert found.calibration.threshold == pytest.approx(expected.threshold, rel=1e-3)
  measured = found.metrics["calibration"]
  assert measured["temperature"] == found.calibration.temperature and 0 <= measured["coverage"] <= 1
  assert found.metrics["label_score"] == "pmi"
  assert found.metrics["accuracy"] == found.metrics["value"] == found.metrics["accuracies"]["pmi"]
  assert set(found.metrics["accuracies"]) == {"sum", "mean", "pmi"}


@pytest.mark.parametrize(
  ("splits", "split", "note"),
  [
    (("train", "test"), "test", "the task has no validation split"),
    (("train", "validation", "test"), "validation", "measured on the validation split itself"),
  ],
)
def test_without_a_split_to_fit_on_the_temperature_is_one_and_that_is_said(tmp_path, one_device, splits, split, note):
  found = evaluate_task(evaluator_of(target_accuracy=0.5), task_of(tmp_path, splits=splits), split)
  assert found.calibration.temperature == 1.0 and found.calibration.rows == 0 and found.calibration.threshold is None
  assert note in found.calibration.note and found.metrics["calibration"]["note"] == found.calibration.note
  assert found.metrics["calibration"]["ece"]["before"] == found.metrics["calibration"]["ece"]["after"]


def test_free_answers_count_as_labels_only_where_they_are_one(tmp_path, one_device, monkeypatch):
  templates = [{"input": "{input}", "target": "It is {target}."}]
  task, evaluator = task_of(tmp_path, templates=templates), evaluator_of()
  rooms = []
  written = ["It is urgent.", "It is urgent.", "now", "It is routine.", ""]

  def answer(evaluator, texts, wish, task=None):
    rooms.append(wish.room)
    return [[text] for text in written]

  monkeypatch.setattr(generate, "answers", answer)
  found = evaluate_task(evaluator, task, "test").metrics["generated"]
  assert found == {"valid": 3 / 5, "accuracy": 2 / 5}
  assert rooms == [16]  # the longest label's 14 bytes and EOS fit


def test_the_parts_give_the_value_whatever_is_measured(tmp_path, one_device):
  templates = [{"input": "{input}", "target": "{target}"}, {"input": "{instruction} {input}", "target": "so {target}"}]
  evaluator = evaluator_of()
  tasks = {
    "labels": task_of(tmp_path, templates=templates),
    "texts": task_of(tmp_path, "generation", templates=templates, metrics=["chrf", "exact_match"]),
  }
  found = evaluate_all(evaluator, tasks, {"domain": texts_of(["a text of a ward"] * 9)}, "test")
  assert found["labels"].parts.shape == (2, 5, 2) and found["texts"].parts.shape == (2, 5, 18)
  assert found["domain"].parts.shape[0] == 1
  for name, metric in (("labels", "accuracy"), ("texts", "chrf"), ("domain", "perplexity")):
    metrics = found[name].metrics
    assert figure(found[name].parts, VALUES[metric]) == pytest.approx(metrics["value"]) == metrics[metric]
    low, high = metrics["interval"]
    assert low - 1e-9 <= metrics["value"] <= high + 1e-9
  assert set(found["texts"].metrics) == {"value", "metric", "chrf", "exact_match", "n", "templates", "interval"}
  assert found["labels"].metrics["calibration"]["reliability"]["after"][0][0] <= 10  # rows of both templates
  assert sum(row[0] for row in found["labels"].metrics["calibration"]["reliability"]["after"]) == 10


def test_a_generation_task_is_measured_against_its_own_inputs(tmp_path, one_device, monkeypatch):
  task, evaluator = task_of(tmp_path, "generation"), evaluator_of()
  written = ["one two three four", *["x"] * 4]
  monkeypatch.setattr(generate, "answers", lambda *settings: [[text] for text in written])
  metrics = evaluate_task(evaluator, task, "test").metrics
  rows = list(read_task_rows(task, "test"))
  expected = generation_metrics(written, [row["target"] for row in rows], [row["input"] for row in rows])[0]
  assert metrics == {"value": expected["rougeL"], "metric": "rougeL", **expected}


def test_answers_are_measured_without_what_the_template_puts_around_them(tmp_path, one_device, monkeypatch):
  own = [{"input": "{input}", "target": "Answer: {target}."}, {"input": "{input}", "target": "{target}"}]
  task, evaluator = task_of(tmp_path, "generation", templates=own), evaluator_of()
  right = iter([render(task, row, template)[1] for template in (0, 1) for row in read_task_rows(task, "test")])
  monkeypatch.setattr(generate, "_text", lambda *_: next(right))
  found = evaluate_task(evaluator, task, "test")
  assert found.metrics["templates"] == [1.0, 1.0] and found.metrics["exact_match"] == 1.0
  assert [sample["output"] for sample in found.samples] == [sample["target"] for sample in found.samples]


def test_rows_that_are_skipped_are_counted_where_they_are_measured(tmp_path, one_device, capsys):
  task = task_of(tmp_path)
  with (tmp_path / "test.jsonl").open("a") as file:
    file.write(json.dumps({"input": "burn", "target": "soon"}) + "\n" + '{"input": "cut"}\n')
  (tmp_path / "held.jsonl").write_text('{"text": "some held-out text"}\n{no\n')
  texts = open_texts(tmp_path / "held.jsonl", tmp_path, "skip")
  task = dataclasses.replace(task, bad_rows="skip")
  found = evaluate_all(evaluator_of(), {"t": task}, {"text": texts}, "test")
  assert found["t"].metrics["n"] == len(ROWS) and sum(found["t"].metrics["skipped"].values()) == 2
  assert found["text"].metrics["skipped"] == {"not a line of JSON": 1}
  whole = evaluate_all(evaluator_of(corpus_tokens=0), {}, {"text": texts}, "test")
  assert whole["text"].metrics["skipped"] == found["text"].metrics["skipped"]
  said = capsys.readouterr().out
  assert "t: 2 rows were skipped" in said and "text: 1 rows were skipped" in said


@pytest.mark.parametrize("architecture", ["gpt", "t5"])
def test_a_generation_task_is_answered_by_beams_where_they_are_asked_for(tmp_path, one_device, architecture):
  task = task_of(tmp_path, "generation")
  evaluator = evaluator_of(architecture, beams=3, length_penalty=2.0)
  found, greedy = (evaluate_task(one, task, "test") for one in (evaluator, evaluator_of(architecture)))
  prompts = [sample["input"] for sample in found.samples]
  prompts = [render(task, {"input": text})[0] for text in prompts]
  best = [several[0] for several in answers(evaluator, prompts, Wish(beams=3, length_penalty=2.0), task)]
  assert [sample["output"] for sample in found.samples] == best != [sample["output"] for sample in greedy.samples]
  assert (found.metrics["beams"], found.metrics["length_penalty"]) == (3, 2.0)
  assert "beams" not in greedy.metrics


def test_of_several_draws_the_one_that_the_others_bear_out_is_measured(tmp_path, one_device):
  task = task_of(tmp_path, "generation", metrics=("chrf", "rouge1"))
  asked = {"candidates": 5, "temperature": 2.0, "repetition_penalty": 1.5}
  first, again, greedy = (evaluate_task(evaluator_of(**way), task, "test") for way in (asked, asked, {}))
  assert first.samples == again.samples != greedy.samples
  prompts = [render(task, row)[0] for row in read_task_rows(task, "test")]
  wish = Wish(Choice(2.0, repetition_penalty=1.5), samples=5)
  drawn = answers(evaluator_of(), prompts, wish, task)
  assert [sample["output"] for sample in first.samples] == [generate.consensus(texts, "chrf") for texts in drawn]
  assert asked.items() <= first.metrics.items() and not asked.keys() & greedy.metrics.keys()


@pytest.mark.parametrize("architecture", ["gpt", "t5"])
def test_perplexity_by_rows_is_the_same_on_any_mesh(architecture):
  texts = texts_of([f"note {number}: the ward is quiet" for number in range(40)])
  found = []
  for devices in (1, 4):
    with jax.set_mesh(make_mesh({"data": devices}, jax.devices()[:devices])):
      evaluator = evaluator_of(architecture)
      batches, size, _ = held_out_batches(texts, evaluator.tokenizer, evaluator.config)
      found.append(perplexity(evaluator, iter(batches), size))
  one, four = found
  weights = sum(batch["decoder_loss_weights"].sum() for batch in batches)
  assert one.metrics["n"] == weights == one.parts[0, :, 1].sum()
  assert one.parts.shape[1] > 3 and one.parts == pytest.approx(four.parts, rel=1e-4)


@pytest.mark.parametrize("several", [False, True])
def test_of_files_sorted_by_label_all_labels_are_measured(tmp_path, one_device, several):
  rows = [{"input": f"note {i}", "target": label} for label in LABELS for i in range(20)]
  file = tmp_path / "sorted.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  fields = {"kind": "classification", "labels": LABELS, "multi_label": several}
  task = Task.from_dict("t", {**fields, **dict.fromkeys(("train", "validation", "test"), str(file))})
  evaluator = evaluator_of(max_examples=6, samples=6)
  found = evaluate_task(evaluator, task, "test")
  assert [sample["target"] for sample in found.samples] == [label for label in LABELS for _ in range(2)]
  assert found.parts.shape[1] == found.calibration.rows == 6
  if several:
    assert 0.5 not in found.calibration.thresholds.values()  # as that of a label stays that no row has
  else:
    scores = evaluator.label_scores(task, [render(task, row)[0] for row in found.samples])["sum"]
    expected = calibration.fit(scores, np.repeat(range(3), 2), "sum", 0.0)
    assert found.calibration.temperature == pytest.approx(expected.temperature, rel=1e-3)
  assert baselines(task, limit=6)["majority"]["subset_accuracy" if several else "accuracy"] == pytest.approx(2 / 6)
  domain = Domain("d", texts_of(["a"]), texts_of(["b"]), {"t": task})
  measured = build_skills(evaluator.config, Materials(evaluator.tokenizer, domain, None, None, {})).digests["t"]
  rows = [{key: sample[key] for key in ("input", "target")} for sample in found.samples]
  assert measured == hash_of(*(json.dumps(row, sort_keys=True) for row in rows))


def test_what_takes_long_says_how_far_it_is(tmp_path, one_device, monkeypatch, capsys):
  task, evaluator = task_of(tmp_path), evaluator_of(batch_size=2)
  evaluator.classify(task, ["a"] * 5)
  assert "left" not in capsys.readouterr().err
  monkeypatch.setattr(train.evaluator, "PROGRESS_SECONDS", -1)
  evaluator.classify(task, ["a"] * 5)
  answers(evaluator, ["b"] * 3, Wish(room=2))
  said = capsys.readouterr()
  lines = [line for line in said.err.splitlines() if " left" in line]
  assert [line.split(",")[0] for line in lines] == ["t: 2/5", "t: 4/5", "prompts: 2/3"] and not said.out


def test_a_decoders_prompt_leaves_its_answer_room_in_the_row(one_device):
  frame = frame_of(None, byte_tokenizer())
  for architecture, answer, expected in (("gpt", 6, 122), ("gpt", 1000, 64), ("t5", 6, 128)):
    evaluator = evaluator_of(architecture)
    [(_, prompts)] = evaluator.batches(["x" * 500, "y"], frame, answer)
    assert prompts["tokens"].shape[1] == evaluator.longest_prompt(answer) == expected
    assert len(evaluator.cut) == 1


def test_a_prompt_that_is_cut_counts_once(tmp_path, one_device):
  task, evaluator = task_of(tmp_path), evaluator_of("t5")
  evaluator.row = 18
  evaluate_task(evaluator, task, "test")  # asked twice on test, thrice on validation
  # "t: How urgent?\n" has 15 bytes, and EOS: inputs of 2 bytes fit, 3 and more do not
  assert len(evaluator.cut) == len({text for text, _ in ROWS if len(text) > 2})


@pytest.mark.parametrize(
  ("settings", "fields", "message"),
  [
    ({"label_score": "max"}, {}, r"config.evaluate.label_score must be one of \['sum', 'mean', 'pmi'\], got 'max'"),
    ({}, {"label_score": "max"}, "task 't': `label_score` must be one of .*got 'max'"),
    ({"beams": 0}, {}, "config.evaluate: beams must be 1 .greedy. or more, got 0"),
    ({"length_penalty": 1.5}, {}, "config.evaluate: length_penalty is of beams: set more than one, got .* 1.5"),
    ({"candidates": 0}, {}, "config.evaluate: candidates must be 1 or more"),
    ({"temperature": 0.5}, {}, "config.evaluate: .* temperature is of their draws: set more than one, got 1 .* 0.5"),
    ({"candidates": 4, "beams": 2}, {}, "config.evaluate: beams go without temperature"),
    ({"candidates": 4, "temperature": 0.0}, {}, "config.evaluate: 4 samples need a temperature"),
    ({"repetition_penalty": 0.0}, {}, "config.evaluate: .* repetition_penalty above 0"),
    ({"target_accuracy": 1.5}, {}, "target_accuracy must be 0 .never abstain. to 1, got 1.5"),
    ({}, {"kind": "generation", "label_score": "sum"}, "task 't': `label_score` is for classification"),
    ({}, {"kind": "generation", "metrics": ["meteor"]}, "task 't': `metrics` names .'meteor'.; known are"),
  ],
)
def test_what_cannot_be_measured_is_refused_before_a_run(tmp_path, settings, fields, message):
  config = get_config()
  config.evaluate.update(settings)
  with pytest.raises(ValueError, match=message):
    check_evaluation(config.evaluate, {"t": task_of(tmp_path, **{"kind": "classification", **fields})})


def test_labels_that_tie_are_not_measured(tmp_path, one_device):
  evaluator = evaluator_of()
  evaluator.tokenizer = blind_tokenizer()
  with pytest.raises(ValueError, match="task 't': the labels .'routine', 'urgent', 'now'. are the same tokens"):
    evaluate_all(evaluator, {"t": task_of(tmp_path)}, {}, "test")


@pytest.mark.parametrize("fields", [{"metrics": "chrf"}, {"metrics": [1]}, {"label_score": 3}])
def test_malformed_fields_are_named(tmp_path, fields):
  with pytest.raises(ValueError, match=f"task 't': `{next(iter(fields))}` must be"):
    task_of(tmp_path, **fields)


def test_what_is_measured_does_not_shape_what_is_learned(tmp_path):
  task = task_of(tmp_path, "generation")
  other = dataclasses.replace(task, metrics=("chrf",), label_score="pmi")
  digests = {Answers(one, read_task_rows(one, "train")).digest() for one in (task, other)}
  assert len(digests) == 1 and other.as_dict() != task.as_dict()
  assert Task.from_dict("t", json.loads(json.dumps(other.as_dict()))).metrics == ("chrf",)


def test_a_prompt_is_asked_in_both_directions_where_it_was_taught_so(tmp_path, one_device):
  task, evaluator = task_of(tmp_path), evaluator_of()
  evaluator.config.data.bidirectional_prefix = True
  texts = [render(task, {"input": text})[0] for text, _ in ROWS]
  scores = evaluator.classify(task, texts)
  layout = Layout("gpt", 0, 128, evaluator.tokenizer.start_id, evaluator.tokenizer.eos_id, bidirectional_prefix=True)
  frame = frame_of(task, evaluator.tokenizer)
  for text, row in zip(texts, scores, strict=True):
    prompt = frame.prompt(evaluator.tokenizer.encode(text), 128)
    pairs = [Example(np.array(prompt), np.array(frame.answer(evaluator.tokenizer.encode(label)))) for label in LABELS]
    batch = decoder_only([[pair] for pair in pairs], layout)
    logits = evaluator.model.features(evaluator.params, batch) @ evaluator.model.head(evaluator.params)
    found = jax.nn.log_softmax(logits[..., : evaluator.tokenizer.vocab_size])
    found = np.take_along_axis(np.asarray(found), batch["decoder_target_tokens"][..., None], 2)[..., 0]
    np.testing.assert_allclose(row, (found * batch["decoder_loss_weights"]).sum(axis=1), atol=2e-4)


def test_learned_positions_are_not_run_over(one_device):
  tokenizer = byte_tokenizer()
  config = get_config()
  config.architecture, config.data.decoder_length = "gpt", 64
  model = MODELS["gpt"]("tiny-gpt2", tokenizer.vocab_size, layers=1, max_length=40)
  evaluator = Evaluator(config, model, distinct_params(model), tokenizer)
  assert evaluator.longest_prompt(16) == 24  # of a row of 64 it would be 48
  with pytest.raises(ValueError, match="up to 40 tokens .*learned positions for 40 tokens in all"):
    evaluator.longest_prompt(40)
  with pytest.raises(ValueError, match="decoder_length is 64, but the model has learned positions for rows of 40"):
    with config.unlocked():
      config.model.size = "tiny-gpt2"
      config.model.overrides.update({"layers": 1, "max_length": 40})
    check_config(config, tokenizer)


@pytest.mark.parametrize("path", ["cudnn", "splash"])
def test_a_model_that_learned_on_another_device_is_asked_here(one_device, path):
  plain = evaluator_of()
  model = MODELS["gpt"]("tiny", plain.tokenizer.vocab_size, **SMALL["gpt"], attention=path)
  other = Evaluator(plain.config, model, plain.params, plain.tokenizer)
  assert other.model.config.attention == "auto"
  assert other.model is Evaluator(plain.config, model, plain.params, plain.tokenizer).model
  assert answers(other, ["sob"], Wish()) == answers(plain, ["sob"], Wish())
