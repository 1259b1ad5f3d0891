"""The stream where things go wrong, and what its counts and fingerprint are worth."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from configs import base
from data.components import Component, corpus_component
from data.features import Layout
from data.pipeline import MANY_PASSES, Stream, build_stream
from data.sources import texts_of
from data.tasks import Domain, Task
from data.tokenizer import byte_tokenizer

LAYOUT = Layout("gpt", 0, 10, start_id=0, eos_id=1)


def numbered(size: int, broken: tuple[int, ...] = ()) -> Component:
  """Example k is k + 100, five times; those in `broken` raise."""

  def make(k: int, rng: np.random.Generator):
    if k in broken:
      raise ValueError(f"example {k} is bad")
    return np.zeros(0, np.int32), np.full(5, 100 + k, np.int32)

  return Component("numbered", size, make, "", str, {})


def settings(mixture: dict, architecture: str = "gpt", **data):
  """A config of four rows of 96 tokens."""
  config = base.get_config()
  with config.unlocked():
    config.architecture = architecture
    config.data.mixture.update(mixture)
    config.data.update({"objective": "next_token", "encoder_length": 96, "decoder_length": 96, "batch_size": 4, **data})
  return config


def task_of(folder: Path, rows: list[dict], **fields) -> Task:
  file = folder / "task.jsonl"
  file.write_text("\n\n".join(json.dumps(row) for row in rows))  # blank lines: rows are not lines
  return Task("job", "generation", "Do it.", files={"train": str(file)}, **fields)


def stream_of(task: Task, config) -> Stream:
  return build_stream(
    config, byte_tokenizer(), Domain("d", texts_of(["some text"]), texts_of([]), {"job": task}), None, {}
  )


def test_an_error_leaves_the_stream_where_it_was():
  broken = Stream([numbered(8, broken=(3,))], [(1.0,)], LAYOUT, 4, seed=0)
  whole = Stream([numbered(8)], [(1.0,)], LAYOUT, 4, seed=0)
  states = [whole.state()]
  with pytest.raises(ValueError, match="example 3 is bad"):
    while True:
      next(broken)
      next(whole)
      states.append(whole.state())
  assert broken.state() == states[-1]
  with pytest.raises(ValueError, match="example 3 is bad"):  # it does not go on past the bad example
    next(broken)


def test_a_state_stays_as_it_was_taken():
  stream = Stream([numbered(8)], [(1.0,)], LAYOUT, 4, seed=0)
  next(stream)
  state = stream.state()
  before = json.dumps(state)
  next(stream)
  assert json.dumps(state) == before


def test_packing_neither_loses_nor_repeats_an_example():
  stream = Stream([numbered(60)], [(1.0,)], LAYOUT, 4, seed=0)
  seen: Counter = Counter()
  for _ in range(30):
    seen.update(next(stream)["decoder_target_tokens"].reshape(-1, 5)[:, 0].tolist())
  state = stream.state()
  held = Counter(100 + stream._mixture.item(*key) for key in state["pending"])
  asked = Counter(100 + stream._mixture.item(0, number) for number in range(state["mixture"]["drawn"][0]))
  assert seen + held == asked


@pytest.mark.parametrize(("architecture", "objective"), [("t5", "span_corruption"), ("gpt", "span_corruption")])
def test_nothing_of_a_document_is_dropped(architecture, objective):
  config = settings({}, architecture, objective=objective)
  component = corpus_component("text", texts_of(["a" * 500, "b", "c" * 97]), byte_tokenizer(), config)
  rng = np.random.default_rng(0)
  tokens = np.concatenate([side for k in range(component.size) for side in component.make(k, rng)])
  assert [int((tokens == ord(letter) + 3).sum()) for letter in "abc"] == [500, 1, 97]


def test_counts_are_those_of_the_batches(tmp_path):
  task = task_of(tmp_path, [{"input": "in", "target": f"out {k}"} for k in range(9)])
  stream = stream_of(task, settings({"job": 0.5, "domain": 0.5}))
  batches = [next(stream) for _ in range(10)]
  summary = stream.summary(stream.state())
  for number, name in enumerate(stream.task_names):
    tokens = sum(((batch["task_ids"] == number) * batch["decoder_loss_weights"]).sum() for batch in batches)
    assert summary[name]["supervised_tokens"] == tokens > 0
  filled = np.mean([batch["decoder_segment_ids"] > 0 for batch in batches])
  assert summary["packing"]["efficiency"] == pytest.approx(filled)


@pytest.mark.parametrize("architecture", ["t5", "gpt"])
def test_an_overlong_example_is_named_by_file_and_line(tmp_path, architecture):
  task = task_of(tmp_path, [{"input": "x", "target": "y"}, {"input": "long " * 50, "target": "y"}])
  with pytest.raises(ValueError, match=r"task\.jsonl:3: the example has 263 \+ 2 tokens, a row holds"):
    stream_of(task, settings({"job": 1.0}, architecture))


def test_targets_are_never_cut(tmp_path):
  task = task_of(tmp_path, [{"input": "x", "target": "y"}, {"input": "x", "target": "long " * 50}])
  stream = stream_of(task, settings({"job": 1.0}, overlong="truncate"))
  assert stream.summary(stream.state())["job"]["skipped"] == 1
  assert stream.about() == ["job: 2 rows read, 1 skipped (longer than a row: 1); 1 examples in a pass"]


def test_every_template_is_used(tmp_path):
  templates = tuple({"input": letter + " {input}", "target": "{target}"} for letter in "AB")
  stream = stream_of(task_of(tmp_path, [{"input": "x", "target": "y"}], templates=templates), settings({"job": 1.0}))
  assert set(next(stream)["decoder_target_tokens"][:, 0] - 3) == {ord("A"), ord("B")}


def test_bad_rows_are_skipped_counted_and_told_where_that_was_asked_for(tmp_path):
  rows = [{"input": "x", "target": "a"}, {"input": "x", "target": "c"}, {"input": "x", "target": "d"}, {"input": ""}]
  task = task_of(tmp_path, rows, labels=("a", "b"), bad_rows="skip")
  stream = stream_of(task, settings({"job": 1.0}))
  counts = stream.summary(stream.state())["job"]
  reasons = {"skipped: the label is none of ['a', 'b']": 2, "skipped: field 'input' must be a non-empty string": 1}
  assert {key: n for key, n in counts.items() if key.startswith(("read", "skipped"))} == {
    "read": 4,
    "skipped": 3,
    **reasons,
  }
  assert stream.about()[0].startswith("job: 4 rows read, 3 skipped (")
  with pytest.raises(ValueError, match=r"task.jsonl:3: the label is none of .*got 'c'"):
    stream_of(task_of(tmp_path, rows, labels=("a", "b")), settings({"job": 1.0}))


def test_labels_that_begin_others_are_reported(tmp_path):
  task = task_of(tmp_path, [{"input": "x", "target": "in"}], labels=("in", "info", "out"))
  assert "label 'in' begins label 'info'" in stream_of(task, settings({"job": 1.0})).about()[1]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"overlong": "drop"}, "known: .'error', 'skip', 'truncate'"),
    ({"loss_normalisation": "row"}, "known: .'token', 'example', 'task'"),
    ({"loss_normalisation": "task", "mixture_unit": "tokens"}, "'task', which gives .* change one of the two"),
    ({"noise_density": 1.5}, "between 0 and 1"),
    ({"mean_span_length": 0.0}, "at least 1"),
    ({"objective": "cloze"}, "known: .'fill_in_the_middle', 'masked_lm'"),
  ],
)
def test_bad_settings_name_what_is_known(tmp_path, changes, message):
  task = task_of(tmp_path, [{"input": "x", "target": "y"}])
  with pytest.raises(ValueError, match=message):
    stream_of(task, settings({"job": 0.5, "domain": 0.5}, **changes))


def test_the_fingerprint_shows_which_data_changed(tmp_path):
  config = settings({"job": 0.5, "domain": 0.5})
  before = stream_of(task_of(tmp_path, [{"input": "x", "target": "y"}]), config).fingerprint()
  after = stream_of(task_of(tmp_path, [{"input": "x", "target": "z"}]), config).fingerprint()
  assert [key for key in before if before[key] != after[key]] == ["source.job"]


def test_many_passes_are_warned_of_once(capsys):
  stream = Stream([numbered(8)], [(1.0,)], LAYOUT, 4, seed=0)
  for _ in range(2 * MANY_PASSES):
    next(stream)
  assert capsys.readouterr().out.count("'numbered' has been read 64 times") == 1
