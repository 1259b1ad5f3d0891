"""Baselines against answers that anyone can check, and their speed at the size of a real task."""

import time

import numpy as np
import pytest

from data.tasks import load_domain
from train.baselines import baselines, constant, copied_input, linear, majority, measure_baselines, nearest_neighbour

TRAIN = [
  {"input": "red apple", "target": "fruit"},
  {"input": "green pea", "target": "plant"},
  {"input": "yellow pear", "target": "fruit"},
]
TEST = [{"input": "a green leaf", "target": "plant"}, {"input": "yellow pear tree", "target": "plant"}]


def test_answers_by_hand():
  assert majority(TRAIN, TEST) == ["fruit", "fruit"]
  assert nearest_neighbour(TRAIN, TEST) == ["plant", "fruit"]


def test_ties_go_to_the_first_row():
  rows = [{"input": "same", "target": "first"}, {"input": "same", "target": "second"}]
  assert majority(rows, TEST[:1]) == nearest_neighbour(rows, [{"input": "same"}]) == ["first"]


def test_a_linear_classifier_sees_pairs_of_words():
  rows = [{"input": f"{a} {b}", "target": f"{a} {b}"} for a in ("no", "some") for b in ("pain", "fever")]
  assert linear(rows, rows) == [row["target"] for row in rows]
  assert linear(TRAIN[:1], TEST) == ["fruit", "fruit"]  # one label only


def test_always_the_commonest_labels_is_what_a_model_of_several_labels_has_to_beat():
  rows = [{"input": "x", "target": text} for text in ("none", "none", "none", "a, b", "b, c", "a, b")]
  found = measure_baselines("multi_label", rows, rows, ["a", "b", "c"])
  assert found["majority"]["value"] == 0
  assert found["frequent_labels"]["value"] == pytest.approx(2 * 5 / (12 + 6))  # a, b: of 12 that are said 5 are right


def test_the_typical_target_and_the_input_itself():
  assert constant(TRAIN, TEST) == ["fruit", "fruit"]
  assert constant([{"target": text} for text in ("a b", "b", "c d e")], TEST) == ["b", "b"]
  assert copied_input(TRAIN, TEST) == [row["input"] for row in TEST]


def test_classification_has_three_baselines():
  found = measure_baselines("classification", TRAIN, TEST, ("fruit", "plant"))
  assert set(found) == {"majority", "nearest_neighbour", "linear"}
  assert found["majority"]["value"] == found["majority"]["accuracy"] == 0
  assert found["nearest_neighbour"]["value"] == 0.5
  assert found["nearest_neighbour"]["confusion"] == [[0, 0], [1, 1]]


def test_generation_has_no_majority():
  found = measure_baselines("generation", TRAIN, TEST)
  assert set(found) == {"constant", "copied_input", "nearest_neighbour"}
  assert found["nearest_neighbour"]["value"] == found["nearest_neighbour"]["rougeL"] == 0.5


def test_a_row_from_training_finds_itself_across_blocks():
  rows = [{"input": f"shared words and number{i}", "target": str(i)} for i in range(1100)]
  assert nearest_neighbour(rows, rows) == [row["target"] for row in rows]


def test_no_training_rows_and_unknown_kinds_are_errors():
  for kind in ("generation", "classification"):
    with pytest.raises(ValueError, match="got none"):
      measure_baselines(kind, [], TEST)
  with pytest.raises(
    ValueError, match=r"'ranking' has no baselines; kinds are \['classification', 'generation', 'multi"
  ):
    measure_baselines("ranking", TRAIN, TEST)


def test_four_thousand_rows_against_five_hundred_are_quick():
  rng = np.random.default_rng(0)
  words = np.array([f"w{i}" for i in range(20_000)])
  rows = [
    {"input": " ".join(words[rng.zipf(1.3, 60) % len(words)]), "target": str(rng.integers(5))} for _ in range(4500)
  ]
  nearest_neighbour(rows[:2], rows[:2])  # the library's first import is not the baseline's time
  began = time.process_time()
  nearest_neighbour(rows[:4000], rows[4000:])
  assert time.process_time() - began < 2


def test_a_task_is_read_from_its_files(shared):
  task = load_domain(shared / "data" / "medical").tasks["note_section"]
  found = baselines(task)
  assert found["majority"]["n"] == found["nearest_neighbour"]["n"] == sum(map(sum, found["majority"]["confusion"]))
  assert found["nearest_neighbour"]["accuracy"] > found["majority"]["accuracy"] + 0.1
  assert found["linear"]["accuracy"] > found["nearest_neighbour"]["accuracy"] + 0.05


def test_words_without_spaces_are_told_apart():
  train = [{"input": "昨日起发热咳嗽", "target": "感冒"}, {"input": "胸口疼痛两天", "target": "心脏"}]
  assert nearest_neighbour(train, [{"input": "走路时胸口很疼", "target": ""}]) == ["心脏"]
