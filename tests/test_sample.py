"""The embedded domain: reproducible, held-out combinations held out, and neither task given away."""

import re
from collections import Counter

import numpy as np
import pytest

from data.sample import draw_case, general_texts, instructions, is_held_out, write_domain
from data.sample_tables import DRUGS, LABELS
from data.tasks import load_domain, read_task_rows
from train.baselines import majority, nearest_neighbour
from train.metrics import generation_metrics


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sample")
  write_domain(folder, documents=800, train=1200, validation=60, test=200)
  return load_domain(folder)


def rows(domain, task, split):
  return read_task_rows(domain.tasks[task], split)


def test_the_seed_decides(tmp_path):
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    write_domain(tmp_path / name, seed, documents=40, train=10, validation=5, test=5)
  texts = {name: [p.read_bytes() for p in sorted((tmp_path / name).rglob("*.jsonl"))] for name in "abc"}
  assert texts["a"] == texts["b"] and all(x != y for x, y in zip(texts["a"], texts["c"], strict=True))


def test_splits_and_corpus_share_no_note(domain):
  inputs = [
    row["input"]
    for task in domain.tasks
    for split in ("train", "validation", "test")
    for row in rows(domain, task, split)
  ]
  assert len(set(inputs)) == len(inputs)
  corpus = "\n".join([*domain.corpus, *domain.corpus_test])
  assert not any(text in corpus for text in inputs)


def test_held_out_combinations_are_in_the_test_split_only(domain):
  seen, used = "\n".join(domain.corpus), {"train": set(), "test": set()}
  pattern = re.compile(r"Take ([a-z ]+?) (?:[\d.]+ m?g|\d puffs?|a thin layer) .*? for (\d+ \w+?)s?\.")
  for split, found in used.items():
    found.update(pair for row in rows(domain, "instructions", split) for pair in pattern.findall(row["target"]))
  assert len(used["test"]) > 50 and seen
  cases = [draw_case(np.random.default_rng(seed), held_out=bool(seed % 2)) for seed in range(200)]
  for number, case in enumerate(cases):
    for drug in case.drugs:
      name = next(full for _, full, _, _ in sorted(DRUGS, key=lambda d: -len(d[1])) if drug.plain.startswith(full))
      time = drug.short.split()[-1]
      code = next(word for word in drug.short.split() if word in ("OD", "BD", "TDS", "QDS", "nocte", "mane"))
      assert is_held_out(name, code, time) == bool(number % 2)


def test_labels_are_balanced_and_not_in_the_notes(domain):
  counts = Counter(row["target"] for row in rows(domain, "urgency", "train"))
  assert all(0.2 < count / 1200 < 0.5 for count in counts.values()) and set(counts) == set(LABELS)
  assert not any(label in row["input"].lower() for row in rows(domain, "urgency", "train") for label in LABELS)


def test_the_corpus_holds_no_prompt_and_no_answer(domain):
  corpus = "\n".join(domain.corpus)
  assert not any(text in corpus for text in ("urgency:", "instructions:", "Take ", *LABELS[::2]))


def test_the_majority_and_the_neighbour_do_not_do_the_tasks(domain):
  train, test = rows(domain, "urgency", "train"), rows(domain, "urgency", "test")
  for answers in (majority(train, test), nearest_neighbour(train, test)):
    assert np.mean([a == row["target"] for a, row in zip(answers, test, strict=True)]) < 0.8
  train, test = rows(domain, "instructions", "train"), rows(domain, "instructions", "test")
  inputs, targets = ([row[field] for row in test] for field in ("input", "target"))
  for answers, most in ((inputs, 0.4), (nearest_neighbour(train, test), 0.8)):
    assert generation_metrics(answers, targets, inputs)[0]["rougeL"] < most


def test_words_alone_do_not_decide_urgency(domain):
  from sklearn.feature_extraction.text import CountVectorizer
  from sklearn.naive_bayes import MultinomialNB

  train, test = rows(domain, "urgency", "train"), rows(domain, "urgency", "test")
  words = CountVectorizer(token_pattern=r"\S+")
  model = MultinomialNB().fit(words.fit_transform([r["input"] for r in train]), [r["target"] for r in train])
  assert model.score(words.transform([r["input"] for r in test]), [r["target"] for r in test]) < 0.95


def test_instructions_follow_from_the_note():
  for seed in range(50):
    case = draw_case(np.random.default_rng(seed))
    text = instructions(case)
    assert all(f"Take {drug.plain}." in text and drug.short in case.note for drug in case.drugs)
    assert text.count(".") == len(case.drugs) + 1 + len(case.advice)


def test_general_text_is_prose_and_held_out():
  train, held = general_texts()
  assert sum(map(len, train)) > 400_000 and sum(map(len, held)) > 20_000
  assert not set(train) & set(held)
  assert sum("the" in text.lower() for text in train) > 0.6 * len(train)
