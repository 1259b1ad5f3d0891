"""Metrics against figures worked out by hand, and against the libraries that define them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.tasks import Task
from train.metrics import (
  METRICS,
  VALUES,
  check_metrics,
  chosen,
  classification_metrics,
  generation_metrics,
  headline,
  higher_is_better,
)
from train.text_metrics import GENERATION


def values(outputs, targets, inputs=None, names=()):
  return generation_metrics(outputs, targets, inputs or [""] * len(outputs), names)[0]


def texts(seed: int, count: int = 40) -> list[str]:
  """Texts of a few words, some empty, with punctuation and other scripts."""
  rng = np.random.default_rng(seed)
  words = np.array(["take", "two", "red", "pills", "daily,", "rest.", "naïve", "β-blocker", "10", "mg"])
  return [" ".join(rng.choice(words, rng.integers(0, 9))) for _ in range(count)]


def test_classification_by_hand():
  metrics, parts = classification_metrics(["a", "a", "b", "a"], ["a", "b", "b", "a"], ["a", "b", "never"])
  assert metrics["accuracy"] == 0.75 and metrics["n"] == 4
  # a: precision 2/3, recall 1 -> 0.8; b: precision 1, recall 1/2 -> 2/3
  assert metrics["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
  assert metrics["confusion"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
  assert metrics["per_class"]["a"] == pytest.approx({"precision": 2 / 3, "recall": 1.0, "f1": 0.8, "n": 2})
  assert metrics["per_class"]["b"] == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "n": 2})
  assert metrics["per_class"]["never"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 0}
  assert parts.tolist() == [[1, 1], [0, 1], [1, 1], [1, 1]]


def test_macro_f1_counts_a_label_that_is_only_predicted():
  metrics, _ = classification_metrics(["a", "b"], ["a", "a"], ["a", "b", "never"])
  assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_confusion_follows_the_order_of_the_labels():
  metrics, _ = classification_metrics(["z", "a"], ["z", "z"], ["z", "a"])
  assert metrics["confusion"] == [[1, 1], [0, 0]]


@pytest.mark.parametrize(("predictions", "targets", "role"), [(["x"], ["a"], "predictions"), (["a"], ["x"], "targets")])
def test_a_label_that_is_unknown_is_an_error_not_a_lost_row(predictions, targets, role):
  with pytest.raises(ValueError, match=rf"{role} among .*'x'"):
    classification_metrics(predictions, targets, ["a", "b"])


def test_generation_by_hand():
  metrics = values(["take two pills", "rest"], ["take two red pills", "rest"])
  # first: 3 of 3 words right, 3 of 4 found -> 6/7; one bigram of 2 right, of 3 found -> 0.4; a lone word has no bigram
  assert metrics["rouge1"] == pytest.approx((6 / 7 + 1) / 2)
  assert metrics["rougeL"] == pytest.approx((6 / 7 + 1) / 2)
  assert metrics["rouge2"] == pytest.approx(0.4 / 2)
  assert metrics["token_f1"] == pytest.approx((6 / 7 + 1) / 2)
  assert metrics["exact_match"] == 0.5 and metrics["n"] == 2
  assert metrics["length_ratio"] == 4 / 5


def test_rouge_l_minds_the_order_and_rouge_does_not_stem():
  metrics = values(["c b a"], ["a b c"])
  assert metrics["rouge1"] == 1 and metrics["rougeL"] == pytest.approx(1 / 3)
  assert values(["walking"], ["walks"])["rouge1"] == 0


@pytest.mark.parametrize(
  ("output", "target", "expected"),
  [
    ("Принимайте одну таблетку", "принимайте одну пилюлю", 2 / 3),
    ("每天吃药", "每天喝药", 3 / 4),  # without spaces each character is a word
    ("रोगी की दवा", "रोगा का दवा", 1 / 3),  # vowel signs are part of a word
    ("cafe\u0301 зелёный", "café зеленый", 1 / 2),  # however an accent is written
  ],
)
def test_rouge_knows_other_scripts(output, target, expected):
  assert values([output, "b 2"], [target, "a 2"])["rouge1"] == pytest.approx((expected + 0.5) / 2)
  assert values([output], [target])["rouge1"] == pytest.approx(expected)
  assert values([target], [target])["rougeL"] == 1


def test_a_perfect_text_has_no_more_than_all_of_it():
  assert values(["take two red pills daily"] * 4, ["take two red pills daily"] * 4)["bleu"] == 1.0


def test_words_without_spaces_are_counted_too():
  said = "每天吃药两次。"
  found = values([said * 3], [said], [f"医生说：{said}"])
  assert found["length_ratio"] == 3 and found["repetition_rate"] > 0.5 and found["copy_rate"] > 0.5
  assert values(["每天吃药"], ["每天喝药"], names=("token_f1",))["token_f1"] == pytest.approx(3 / 4)


def test_bleu_and_chrf_are_those_of_sacrebleu():
  import sacrebleu

  outputs, targets = texts(0), texts(1)
  outputs[:10] = targets[:10]
  found = values(outputs, targets)
  assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(outputs, [targets]).score / 100, abs=1e-12)
  assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(outputs, [targets]).score / 100, abs=1e-12)
  assert 0.2 < found["bleu"] < 0.9 and 0.2 < found["chrf"] < 0.9  # a case that says something


def test_rouge_is_the_mean_of_the_librarys():
  from rouge_score.rouge_scorer import RougeScorer

  outputs, targets = texts(2), texts(3)
  found = values(outputs, targets)
  for name in ("rouge1", "rouge2", "rougeL"):
    scorer = RougeScorer([name])
    pairs = zip(targets, outputs, strict=True)
    assert found[name] == pytest.approx(np.mean([scorer.score(*pair)[name].fmeasure for pair in pairs]))


@pytest.mark.parametrize(
  ("output", "target", "expected"),
  [
    ("The cat, sat!", "a cat sat", 1.0),  # case, punctuation and articles do not count
    ("cat cat", "cat", 2 / 3),  # precision 1/2, recall 1
    ("dog", "cat", 0.0),
    ("", "", 1.0),
    ("", "cat", 0.0),
  ],
)
def test_token_f1_by_hand(output, target, expected):
  assert values([output], [target])["token_f1"] == pytest.approx(expected)


def test_repetition_counts_what_stood_there_before():
  # "a b c d" thrice: 9 4-grams, 4 different ones -> 5 of 9; the short one has none, the last 1 new one
  found = values(["a b c d " * 3, "a b c", "p q r s"], ["x"] * 3)
  assert found["repetition_rate"] == pytest.approx(5 / 10)
  assert values(["a b c"], ["x"])["repetition_rate"] == 0


def test_copies_are_looked_for_in_their_own_input():
  # 3-grams: "a b c" stands in the input, "b c x" does not; the second output's stands in the first input only
  found = values(["A b c x", "a b c"], ["t"] * 2, ["so a B c", "nothing like it"])
  assert found["copy_rate"] == pytest.approx(1 / 3)


def test_a_perfect_answer_scores_one_and_an_empty_one_nothing():
  judges = [name for name in GENERATION if GENERATION[name].better > 0]
  perfect = values(["take two red pills"], ["take two red pills"], names=judges)
  assert all(perfect[name] == pytest.approx(1) for name in judges)
  empty = values([""], ["take two red pills"])
  assert all(empty[name] == 0 for name in GENERATION)


def test_a_task_chooses_its_metrics_and_the_first_is_its_headline():
  outputs, targets = texts(4), texts(5)
  found, parts = generation_metrics(outputs, targets, targets, ["chrf", "exact_match"])
  assert set(found) == {"chrf", "exact_match", "n"}
  assert VALUES["chrf"](parts.sum(axis=0)) == pytest.approx(found["chrf"])
  assert headline("generation", ["chrf"]) == "chrf" and headline("generation") == "rougeL"
  assert headline("classification") == "accuracy" and headline("perplexity") == "perplexity"
  names = ("accuracy", "rougeL", "repetition_rate", "perplexity")
  assert [higher_is_better(name) for name in names] == [True, True, False, False]
  assert chosen(()) == tuple(GENERATION)


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["meteor"], r"names \['meteor'\]; known are \['rougeL', "),
    (["bleu", "bleu"], "names one twice"),
    (["copy_rate", "bleu"], "begins with 'copy_rate', which only describes; put one of .'rougeL'"),
  ],
)
def test_metrics_that_cannot_be_are_named(names, message):
  task = Task.from_dict("t", {"kind": "generation", "metrics": names})
  with pytest.raises(ValueError, match=f"task 't': .*{message}"):
    check_metrics(task)


def test_classification_has_no_choice_of_metrics():
  task = Task.from_dict("t", {"kind": "classification", "labels": ["a", "b"], "metrics": ["bleu"]})
  with pytest.raises(ValueError, match="`metrics` are for generation"):
    check_metrics(task)


@pytest.mark.parametrize("measure", [lambda p, t: classification_metrics(p, t, ["a", "b"]), values])
@pytest.mark.parametrize(("predictions", "targets"), [([], []), (["a"], ["a", "b"])])
def test_unequal_or_no_examples_are_an_error(measure, predictions, targets):
  with pytest.raises(ValueError, match="one prediction for each target"):
    measure(predictions, targets)


@pytest.mark.parametrize("kind", METRICS)
def test_the_headlines_parts_give_its_value(kind):
  rows = [{"input": "x", "target": "a"}, {"input": "x", "target": "b"}]
  found, parts = METRICS[kind](["a", "a"], rows, ["a", "b"], [])
  name = headline(kind)
  assert len(parts) == 2 and VALUES[name](parts.sum(axis=0)) == found[name] == 0.5


def test_metrics_baselines_and_report_load_neither_jax_nor_heavy_libraries():
  heavy = "{'jax', 'transformers', 'sklearn', 'scipy', 'rouge_score', 'sacrebleu', 'matplotlib'}"
  modules = "train.metrics, train.baselines, train.calibration, train.statistics, train.report"
  code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
  root = Path(__file__).resolve().parent.parent
  done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"
