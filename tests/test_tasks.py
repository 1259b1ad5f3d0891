"""Domain folders and templates: clear errors with file and line, and templates that cannot reach further."""

import json

import pytest

from data.prompts import check_tasks, fill, render, template_fields, unframed
from data.sources import texts_of
from data.tasks import Task, hold_out, load_domain, read_task_rows
from tests.conftest import blind_tokenizer


def make(folder, tasks=None, rows=None, corpus='{"text": "a note"}\n'):
  """Writes a domain folder with one classification task."""
  (folder / "t").mkdir(parents=True, exist_ok=True)
  (folder / "corpus.jsonl").write_text(corpus * 40)
  tasks = {"t": {"kind": "classification", "labels": ["a", "b"]}} if tasks is None else tasks
  (folder / "tasks.json").write_text(tasks if isinstance(tasks, str) else json.dumps(tasks))
  for split in ("train", "test"):
    (folder / "t" / f"{split}.jsonl").write_text(
      rows or '{"input": "x", "target": "a"}\n{"input": "y", "target": "b"}\n'
    )
  return folder


def test_a_good_folder(tmp_path):
  domain = load_domain(make(tmp_path / "ward"))
  assert domain.name == "ward" and (len(domain.corpus), len(domain.corpus_test)) == (38, 2)
  assert sorted(domain.tasks["t"].files) == ["test", "train"]
  assert [row["target"] for row in read_task_rows(domain.tasks["t"], "test")] == ["a", "b"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"rows": '{"input": "x", "target": "a"}\n{"input": \n'}, r"train.jsonl:2: not a line of JSON"),
    ({"rows": '["x"]\n'}, r"train.jsonl:1: expected an object"),
    ({"rows": '{"input": "x"}\n'}, r"train.jsonl:1: field 'target'"),
    ({"rows": '{"input": 3, "target": "a"}\n'}, r"train.jsonl:1: field 'input' .* got 3"),
    ({"rows": '{"input": " ", "target": "a"}\n'}, r"train.jsonl:1: field 'input'"),
    ({"rows": '{"input": "x", "target": "c"}\n'}, r"train.jsonl:1: the label is none of .* got 'c'"),
    ({"rows": "\n"}, "holds no rows"),
    ({"tasks": "{"}, "tasks.json: not JSON"),
    ({"tasks": []}, "object of objects"),
    ({"tasks": {"t": {"kind": "ranking"}}}, "`kind` must be one of"),
    ({"tasks": {"t": {"kind": "classification", "labels": ["a"]}}}, "at least two"),
    ({"tasks": {"t": {"kind": "generation", "labels": "ab"}}}, "list of non-empty strings"),
    ({"tasks": {"../t": {"kind": "generation"}}}, "a name is letters"),
    ({"tasks": {"tasks": {"kind": "generation"}}}, "a name is letters"),
    ({"tasks": {"t": {"kind": "generation", "templates": [{"input": "{input}"}]}}}, "exactly `input` and `target`"),
    (
      {"tasks": {"t": {"kind": "generation", "templates": [{"input": "{ward}", "target": "{target}"}]}}},
      "needs the fields .'ward'",
    ),
    (
      {
        "tasks": {"t": {"kind": "generation", "templates": [{"input": "{age}", "target": "{target}"}]}},
        "rows": '{"input": "x", "target": "a", "age": 7}\n',
      },
      "needs the fields .'age'. as strings, got .*'age': 'int'",
    ),
  ],
)
def test_malformed_parts_say_where_and_what(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    load_domain(make(tmp_path, **change))


def test_labels_with_brackets_are_whole_in_the_reason_that_is_counted(tmp_path):
  tasks = {"t": {"kind": "classification", "labels": ["praise (kind)", "b"]}}
  folder = make(tmp_path, tasks=tasks, rows="".join(f'{{"input": "x", "target": "{x}"}}\n' for x in "abcb"))
  rows = read_task_rows(load_domain(folder, bad_rows="skip").tasks["t"], "train")
  assert len(rows) == 2 and rows.skipped == {"the label is none of ['praise (kind)', 'b']": 2}


def test_a_bad_document_is_named_when_it_is_read(tmp_path):
  domain = load_domain(make(tmp_path, corpus='{"text": "x"}\n{"body": "x"}\n'))
  with pytest.raises(ValueError, match=r"corpus.jsonl:2: field 'text'"):
    list(domain.corpus)


@pytest.mark.parametrize("missing", ["corpus.jsonl", "tasks.json", "t/train.jsonl", "t/test.jsonl"])
def test_missing_parts_are_named(tmp_path, missing):
  (make(tmp_path) / missing).unlink()
  with pytest.raises(FileNotFoundError, match=missing.replace(".", r"\.")):
    load_domain(tmp_path)


def test_a_small_corpus_is_measured_too(tmp_path):
  corpus, held = hold_out(texts_of([f"{number}" for number in range(4)]), "here")
  assert list(corpus) == ["0", "1", "2"] and list(held) == ["3"]
  with pytest.raises(ValueError, match=r"here is one document.*corpus_validation.jsonl"):
    hold_out(texts_of(["all"]), "here")


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    load_domain(tmp_path / "nowhere")


@pytest.mark.parametrize(
  "template", ["{input.__class__}", "{input[0]}", "{input!r}", "{input:>9}", "{}", "{0}", "{input", "}"]
)
def test_templates_take_plain_field_names_only(template):
  with pytest.raises(ValueError, match="plain"):
    template_fields(template, "here")


def test_values_are_not_expanded_again():
  assert fill("{a} {{a}}", {"a": "{b} {{c}}"}) == "{b} {{c}} {a}"


def test_default_and_own_templates():
  task = Task("t", "generation", "Do it.")
  assert render(task, {"input": "x", "target": "y"}) == ("t: Do it.\nx", "y")
  own = Task.from_dict(
    "t", {"kind": "generation", "templates": [{"input": "{ward}/{input}", "target": "<{target}>"}] * 2}
  )
  assert render(own, {"input": "x", "target": "y", "ward": "A"}, 1) == ("A/x", "<y>")


def test_task_round_trip():
  task = Task.from_dict(
    "t", {"kind": "classification", "labels": ["a", "b"], "instruction": "Which?", "train": "x.jsonl"}
  )
  assert Task.from_dict("t", json.loads(json.dumps(task.as_dict()))) == task


def test_the_real_domain_loads(shared):
  domain = load_domain(shared / "data" / "medical")
  assert len(domain.corpus) == 4648 and len(domain.corpus_test) == 917
  assert len(domain.tasks["note_section"].labels) == 20
  assert len(read_task_rows(domain.tasks["write_question"], "test")) == 472


def test_unknown_fields_of_a_task_are_refused(tmp_path):
  fields = {"kind": "generation", "instruction": "Write.", "rows": {"train": 3}}
  assert Task.from_dict("t", fields).instruction == "Write."
  with pytest.raises(ValueError, match=r"unknown .'instructions'.*is 'instruction' meant"):
    Task.from_dict("t", {"kind": "generation", "instructions": "Write."})


def test_labels_that_are_the_same_tokens_are_refused(tmp_path):
  folder = tmp_path / "ward"
  make(folder)
  fields = {"kind": "classification", "labels": ["是", "否"], "train": str(folder / "none.jsonl")}
  for more in ({}, {"multi_label": True}):
    with pytest.raises(ValueError, match="the labels .'是', '否'. are the same tokens"):
      check_tasks({"t": Task.from_dict("t", {**fields, **more})}, blind_tokenizer())


def test_a_rows_own_instruction_stands_where_the_task_has_none():
  row = {"instruction": "Translate.", "input": "cat", "target": "chat"}
  assert render(Task("t", "generation", ""), row)[0] == "t: Translate.\ncat"
  assert render(Task("t", "generation", "Do it."), row)[0] == "t: Do it.\ncat"


def test_an_answer_is_read_out_of_its_template():
  own = [{"input": "{input}", "target": "{ward}: {target} ({task})"}, {"input": "{input}", "target": "{target}"}]
  task = Task.from_dict("t", {"kind": "generation", "templates": own})
  row = {"input": "x", "target": "rest, and water", "ward": "A"}
  for template in (0, 1):
    assert unframed(task, row, template, render(task, row, template)[1]) == "rest, and water"
  assert unframed(task, row, 0, "something else") == "something else"
  assert unframed(task, {"input": "x"}, 0, "A: rest (t)") == "A: rest (t)"  # a request without the answer's fields
