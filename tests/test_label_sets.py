"""Several labels for one text: one answer for a set, probabilities of labels as sums over sets, thresholds by F1."""

import itertools
import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, hamming_loss

from data import inspect
from data.label_sets import as_text, from_text
from data.prompts import render
from data.tasks import Task, load_domain, read_task_rows
from data.tokenizer import byte_tokenizer
from tests.test_evaluate import evaluator_of
from tests.test_tasks import make
from train import calibration, label_sets, report, serve
from train.baselines import baselines
from train.calibration import LabelSets, softmax
from train.evaluate import check_evaluation, evaluate_task
from train.metrics import VALUES, indicators, multi_label_metrics
from train.report_html import render as page
from train.statistics import figure

LABELS = ("asthma", "copd", "cold")
FIELDS = {"kind": "classification", "multi_label": True, "labels": list(LABELS), "instruction": "Which?"}
ROWS = [("wheeze", ["cold", "asthma"]), ("smoker", ["copd"]), ("well", []), ("sneeze", ["cold"]), ("all", list(LABELS))]


def task_of(folder, rows=ROWS, **more) -> Task:
  fields = {**FIELDS, **more}
  for split in ("train", "validation", "test"):
    file = folder / f"{split}.jsonl"
    file.write_text("".join(json.dumps({"input": text, "target": target}) + "\n" for text, target in rows))
    fields[split] = str(file)
  return Task.from_dict("ills", fields)


def test_a_set_has_one_answer_and_an_answer_one_set():
  for size in range(4):
    for chosen in itertools.combinations(LABELS, size):
      text = as_text(chosen[::-1], LABELS, "none")
      assert from_text(text, LABELS, "none") == (frozenset(chosen), True)
  for text in ("", "asthma,", "asthma, asthma", "asthma, flu", "none, cold", "asthma copd"):
    assert not from_text(text, LABELS, "none")[1]


def test_rows_have_lists_or_text_and_the_same_answer(tmp_path):
  task = task_of(tmp_path)
  assert [row["target"] for row in read_task_rows(task, "train")][:3] == ["asthma, cold", "copd", "none"]
  (tmp_path / "table.csv").write_text("input,target\nwheeze,cold;asthma\nwell,\nwell,nothing\n")
  own = {**FIELDS, "separator": ";", "none": "nothing", "train": str(tmp_path / "table.csv")}
  task = Task.from_dict("ills", own)
  assert [row["target"] for row in read_task_rows(task, "train")] == ["asthma, cold", "nothing", "nothing"]
  assert render(task, read_task_rows(task, "train")[0])[1] == "asthma, cold"
  again = Task.from_dict("ills", json.loads(json.dumps(task.as_dict())))
  assert again == task and again.kind == "multi_label"
  plain = Task.from_dict("t", {"kind": "classification", "labels": ["a", "b"]})
  assert "multi_label" not in plain.as_dict() and "none" not in plain.as_dict()  # the digests of others stay


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    (
      '{"input": "x", "target": ["cold"]}\n{"input": "x", "target": ["flu"]}\n',
      r"train.jsonl:2: a label is none .* 'flu'",
    ),
    ('{"input": "x", "target": ["cold", "cold"]}\n', r"train.jsonl:1: a label stands twice, got 'cold'"),
    ('{"input": "x", "target": "cold|flu"}\n', r"train.jsonl:1: a label is none .* 'flu'"),
    ('{"input": "x", "target": 3}\n', r"train.jsonl:1: field 'target' must be a list of labels, or text with '\|'"),
    ('{"input": "x"}\n', r"train.jsonl:1: field 'target' must be a list"),
  ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
  with pytest.raises(ValueError, match=message):
    load_domain(make(tmp_path, {"t": FIELDS}, rows))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"labels": ["a, b", "c"]}, "a label holds no ','"),
    ({"labels": ["none", "c"]}, "is not 'none'"),
    ({"labels": ["a|b", "c"]}, r"no '\|' \(`separator`\)"),
    ({"kind": "generation", "labels": []}, "`multi_label` is for classification"),
    ({"multi_label": "yes"}, "must be true or false"),
    ({"multi_label": False, "none": "no"}, "`none` is for tasks with `multi_label`"),
    ({"separator": ""}, "`separator` must be a non-empty string"),
  ],
)
def test_bad_fields_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    Task.from_dict("t", {**FIELDS, **change})


def test_metrics_are_scikit_learns():
  rng = np.random.default_rng(0)
  right, found = (rng.random((40, 3)) < share for share in (0.4, 0.5))
  texts = [
    [as_text([x for x, i in zip(LABELS, row, strict=True) if i], LABELS, "none") for row in a] for a in (found, right)
  ]
  metrics, parts = multi_label_metrics(*texts, LABELS)
  assert metrics["micro_f1"] == pytest.approx(f1_score(right, found, average="micro"))
  assert metrics["macro_f1"] == pytest.approx(f1_score(right, found, average="macro"))
  assert metrics["subset_accuracy"] == pytest.approx(accuracy_score(right, found))
  assert metrics["hamming_loss"] == pytest.approx(hamming_loss(right, found))
  assert figure(parts[None], VALUES["micro_f1"]) == pytest.approx(metrics["micro_f1"])
  nothing, _ = multi_label_metrics(["none"], ["none"], LABELS)
  assert (nothing["subset_accuracy"], nothing["hamming_loss"], nothing["micro_f1"]) == (1, 0, 0)


def test_labels_probabilities_are_those_of_their_sets(tmp_path, one_device):
  """By hand, from the log-probability of each of the 8 answers on its own."""
  task, evaluator = task_of(tmp_path), evaluator_of("t5", batch_size=4)
  sets = label_sets.candidates(task)
  assert len(sets) == len(set(sets)) == 8 and "asthma, copd, cold" in sets and "none" in sets
  prompts = [render(task, {"input": text})[0] for text, _ in ROWS]
  found = label_sets.answers(evaluator, task, prompts, 0, LabelSets(sets, dict.fromkeys(LABELS, 0.5)))
  alone = np.stack([label_sets.score(evaluator, task, [one], prompts, 0)[:, 0] for one in sets], axis=1)
  shares = softmax(alone)
  for row, answer in zip(shares, found, strict=True):
    for label in LABELS:
      expected = sum(share for share, one in zip(row, sets, strict=True) if label in one.split(", "))
      assert answer["probabilities"][label] == pytest.approx(expected, abs=1e-4)
      assert (label in answer["labels"]) == (answer["probabilities"][label] >= 0.5)


def test_a_free_answer_that_is_no_set_is_not_the_right_one(tmp_path, monkeypatch, one_device):
  task, evaluator = task_of(tmp_path), evaluator_of()
  written = ["cold, asthma", "copd, pain", "nothing of the kind", "cold, cold", "asthma"]  # ROWS, in turn
  monkeypatch.setattr(label_sets.generate, "answers", lambda *_: [[text] for text in written])
  rows = list(read_task_rows(task, "test"))
  found = label_sets.answer_freely(evaluator, task, rows, ["x"] * 5, 0, label_sets.candidates(task))
  assert found == {"valid": 2 / 5, "micro_f1": pytest.approx(2 * 5 / (5 + 7)), "subset_accuracy": 1 / 5}


def test_of_many_labels_the_commonest_sets_are_scored(tmp_path):
  labels = [f"l{number:03d}" for number in range(100)]
  rows = [("x", labels[n : n + 2]) for n in range(99) for _ in range(1 + (n == 50))] + [("x", labels[:3])] * 3
  task = task_of(tmp_path, rows + [("x", labels[n : n + 4]) for n in range(90)], labels=labels)
  sets = label_sets.candidates(task)
  assert len(sets) == label_sets.MOST and sets[:2] == ["none", "l000"]
  assert sets[101:103] == ["l000, l001, l002", "l050, l051"]
  assert indicators(sets, labels).any(axis=0).all()  # no label's probability is 0 by design
  with pytest.raises(ValueError, match="300 labels; .* at most 255"):
    check_evaluation(evaluator_of().config.evaluate, {"t": Task("t", "multi_label", "", tuple(map(str, range(300))))})


def test_the_doctor_counts_each_label(tmp_path):
  task = task_of(tmp_path, [("x", ["cold", "asthma"]), ("y", [])])
  found = [finding.what for finding in inspect.labels(task, byte_tokenizer())]
  assert found == ["labels without a training row: ['copd']"]


def test_thresholds_and_temperature_come_from_validation():
  sets = ["none", "a", "b", "a, b"]
  scores = np.log([[0.6, 0.3, 0.05, 0.05], [0.55, 0.35, 0.05, 0.05], [0.9, 0.05, 0.04, 0.01], [0.1, 0.1, 0.4, 0.4]])
  plain = LabelSets(sets, {"a": 0.5, "b": 0.5})
  fitted = label_sets.fit(plain, scores, ["a", "a", "none", "b"])
  chosen = fitted.choose(fitted.probabilities(scores))
  assert chosen[:3] == [["a"], ["a"], []] and "b" in chosen[3]
  assert fitted.rows == 4 and fitted.temperature != 1 and fitted.thresholds["a"] < 0.5
  before, after = (calibration.nll(scores, np.array([1, 1, 0, 2]), t) for t in (1.0, fitted.temperature))
  assert after <= before
  unseen = label_sets.fit(plain._replace(sets=sets[:3]), scores[:, :3], ["a", "a, b", "none", "b"])
  assert "1 of 4 validation rows have sets that are not scored" in unseen.note
  assert label_sets.choose_threshold(np.array([0.2, 0.9]), np.array([False, False])) == 0.5


@pytest.mark.parametrize("architecture", ["gpt"])
def test_a_task_is_measured_and_asked(tmp_path, one_device, architecture):
  templates = [{"input": "{task}: {input}", "target": "So: {target}."}, {"input": "{input}?", "target": "{target}"}]
  task, evaluator = task_of(tmp_path, templates=templates), evaluator_of(architecture)
  found = evaluate_task(evaluator, task, "test")
  assert found.metrics["metric"] == "micro_f1" and found.metrics["n"] == 5 and found.parts.shape == (2, 5, 2)
  assert found.metrics["label_sets"]["rows"] == 10 and found.metrics["label_sets"]["sets"] == 8
  assert found.metrics["generated"].keys() == {"valid", "micro_f1", "subset_accuracy"}
  assert "nothing was fitted" in evaluate_task(evaluator, task, "validation").calibration.note
  (tmp_path / "calibration.json").write_text(json.dumps({"ills": found.calibration._asdict()}))
  stored = calibration.read(tmp_path / "calibration.json")
  loaded = serve.Loaded(tmp_path, evaluator, {"ills": task}, stored)
  prompts = [render(task, row)[0] for row in read_task_rows(task, "test")]
  answers = loaded.classify(task, prompts)
  # As they were measured: the first template's answers are the samples'.
  assert [as_text(answer["labels"], LABELS, "none") for answer in answers] == [s["output"] for s in found.samples]
  assert answers[0]["thresholds"] == dict(found.calibration.thresholds)
  with pytest.raises(ValueError, match="calibration.json says nothing of task 'ills'"):
    loaded._replace(calibrations={}).classify(task, prompts)
  known = baselines(task)
  assert known["nearest_neighbour"]["value"] == 1 and known["majority"].keys() >= {"hamming_loss", "micro_f1"}
  shown = {"stages": [{"name": "a"}], "matrix": {"a": {"ills": found.metrics}}, "baselines": {"ills": known}}
  shown["skills"] = [{"name": "ills", "kind": "multi_label", "metric": "micro_f1", "labels": list(LABELS)}]
  html = page(report.plain(shown))
  for part in (
    "Label by label",
    "sets that are right",
    "Hamming loss",
    "8 sets are scored; fitted on 10 validation rows",
  ):
    assert part in html


def test_a_threshold_is_the_best_of_all(tmp_path):
  rng = np.random.default_rng(0)
  probability = rng.choice(np.linspace(0, 1, 23), 200)
  right = rng.random(200) < probability
  found = label_sets.choose_threshold(probability, right)

  def f1(edge: float) -> float:
    chosen = probability >= edge
    return 2 * (chosen & right).sum() / (chosen.sum() + right.sum())

  assert f1(found) == pytest.approx(max(f1(edge) for edge in np.linspace(0, 1, 400)))


def test_sets_that_are_all_unknown_are_said_to_be():
  plain = LabelSets(["none", "a"], {"a": 0.5})
  fitted = label_sets.fit(plain, np.log([[0.4, 0.6]] * 3), ["b"] * 3)
  assert "3 of 3" in fitted.note and "is right" not in fitted.note and fitted.temperature == 1
