"""Runs compared: the same rows are tested, other rows are not, settings that differ are named."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs.base import get_config
from tests.test_report import STAGES, Page, make_report, planted_scores
from train import compare, report_compare
from train.compare import Run, compare_runs, lines, settings_that_differ
from train.recipe import read_scores, write_scores
from train.report import plain
from train.stage import write_json

ROWS = {"domain": "d", "triage": "t", "costs_$x^2$": "c"}


def make_run(folder: Path, accuracy: float = 0.9, rows: dict | None = None, seed: int = 0, weights: str = "") -> Path:
  """Writes what a finished recipe leaves that a comparison reads; `accuracy` is multitask's on triage."""
  report, scores = make_report(), planted_scores()
  report["matrix"]["multitask"]["triage"]["value"] = accuracy
  scores["multitask"]["triage"][0, :, 0] = np.arange(1000) < 1000 * accuracy
  write_json(folder / "report.json", plain(report))
  config = get_config()
  with config.unlocked():
    config.seed = seed
  for stage in STAGES:
    place = folder / "stages" / stage
    write_json(place / "evaluation.json", {"rows": ROWS if rows is None else rows})
    config.init_from = weights if stage == "base" else str(folder / "stages" / "base")
    write_json(place / "config.json", json.loads(config.to_json()))
    write_scores(place, scores[stage])
  return folder


def make_comparison() -> dict:
  """The comparison of two runs in memory."""
  scores, settings = planted_scores(), dict.fromkeys(STAGES, {"seed": 0, "optimizer.learning_rate": 0.01})
  first = Run("first", Path("first"), make_report(), scores, dict.fromkeys(STAGES, ROWS), settings)
  other = dict.fromkeys(STAGES, {"seed": 1, "optimizer.learning_rate": 0.01})
  second = first._replace(name="second", settings=other, rows=dict.fromkeys(STAGES, {**ROWS, "domain": "other"}))
  return compare.comparison_of([first, second])


def test_runs_on_the_same_rows_are_tested(tmp_path):
  folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", accuracy=0.95, seed=1)]
  found = plain(compare_runs([str(folder) for folder in folders]))
  assert [run["name"] for run in found["runs"]] == ["a", "b"] and found["stages"] == list(STAGES)
  assert found["unlike"] == {"b": {}}
  change = found["changes"]["b"]["multitask"]["triage"]
  assert change["from"] == "a" and change["absolute"] == pytest.approx(0.05) and change["verdict"] == "gained"
  assert change["n"] == 1000 and change["low"] > 0 and change["p"] < 0.001
  assert found["changes"]["b"]["continued"]["triage"]["verdict"] == "kept"  # the same rows right
  assert found["settings"] == [{"key": "seed", "stages": list(STAGES), "values": {"a": 0, "b": 1}}]
  assert "multitask, triage: a 0.900, b 0.950: better, p < 0.001" in lines(found)
  page = Page(report_compare.render(found))
  for shown in ("0.950", "▲ better", "+0.050", "seed", "multitask_without_continued"):
    assert shown in page.text
  assert not {"script", "img", "link"} & set(page.tags)


def test_runs_on_other_rows_are_not(tmp_path):
  rows = {**ROWS, "triage": "other"}
  folders = [
    make_run(tmp_path / "a"),
    make_run(tmp_path / "b", accuracy=0.95, rows=rows),
    make_run(tmp_path / "c", rows={}),
  ]
  found = compare_runs([str(folder) for folder in folders])
  assert set(found["unlike"]["b"]) == {"triage"} and "other test rows" in found["unlike"]["b"]["triage"]
  assert "triage" not in found["changes"]["b"]["multitask"] and "domain" in found["changes"]["b"]["multitask"]
  assert found["values"]["multitask"]["triage"]["b"]["value"] == 0.95
  assert set(found["unlike"]["c"]) == set(ROWS) and "earlier version" in found["unlike"]["c"]["domain"]
  assert any(
    "triage: a 0.900, b 0.950: not tested: it was measured on other test rows" in line for line in lines(found)
  )
  page = Page(report_compare.render(plain(found))).text
  assert "Not tested for b: triage: it was measured on other test rows" in page


def test_tokens_and_metrics_that_differ_are_named(tmp_path):
  folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
  place = folders[1] / "stages" / "base"
  scores = planted_scores()["base"]
  scores["domain"] = scores["domain"] * np.array([1.0, 1.01])  # the same text in other tokens
  write_scores(place, scores)
  report = json.loads((folders[1] / "report.json").read_text())
  report["skills"][2]["metric"] = "chrf"
  write_json(folders[1] / "report.json", report)
  found = compare_runs([str(folder) for folder in folders])["unlike"]["b"]
  assert set(found) == {"domain", "costs_$x^2$"}
  assert "other tokens" in found["domain"] and "metric rougeL and chrf" in found["costs_$x^2$"]


@pytest.mark.parametrize(
  ("folders", "error", "message"),
  [
    (["a"], ValueError, "two or more different runs"),
    (["a", "a"], ValueError, "two or more different runs"),
    (["a", "nowhere"], FileNotFoundError, "nowhere/report.json is missing: expected the workdir"),
    (["a", "unmeasured"], FileNotFoundError, "stages/base/evaluation.json is missing: run the recipe again"),
    (["a", "other"], ValueError, "no skill in common .*a: domain, triage.*other: else"),
  ],
)
def test_what_cannot_be_compared_is_refused(folders, error, message, tmp_path):
  make_run(tmp_path / "a")
  write_json(tmp_path / "unmeasured" / "report.json", {"stages": [{"name": "base"}], "skills": []})
  write_json(tmp_path / "other" / "report.json", {"stages": [], "skills": [{"name": "else", "kind": "generation"}]})
  with pytest.raises(error, match=message):
    compare_runs([str(tmp_path / folder) for folder in folders])


def test_another_way_of_asking_is_a_setting_that_differs(tmp_path):
  folders = [make_run(tmp_path / name) for name in ("a", "b")]
  for folder, words in zip(folders, ("How urgent?", "Urgent?"), strict=True):
    for stage in STAGES:
      file = folder / "stages" / stage / "evaluation.json"
      write_json(file, {**json.loads(file.read_text()), "asked": {"triage": {"instruction": words}}})
  found = compare_runs([str(folder) for folder in folders])["settings"]
  assert [(row["key"], row["values"]) for row in found] == [
    ("task triage.instruction", {"a": "How urgent?", "b": "Urgent?"})
  ]


def test_a_skill_may_have_any_name(tmp_path):
  parts = {"file": np.ones((1, 2, 2)), "allow_pickle": np.zeros((1, 2, 2))}
  write_scores(tmp_path, parts)
  found = read_scores(tmp_path)
  assert set(found) == set(parts) and all((found[name] == parts[name]).all() for name in parts)


def test_the_weights_that_runs_began_with_are_a_setting(tmp_path):
  runs = [make_run(tmp_path / name, weights=f"hf:{name}/gpt2") for name in ("a", "b")]
  found = compare_runs([str(run) for run in runs])["settings"]
  assert found == [{"key": "init_from", "stages": ["base"], "values": {"a": "hf:a/gpt2", "b": "hf:b/gpt2"}}]


def test_a_setting_is_listed_with_the_stages_in_which_it_differs():
  settings = {
    "a": {"base": {"seed": 0, "train.steps": 5}, "continued": {"seed": 0, "train.steps": 9}, "only_x": {"seed": 3}},
    "b": {"base": {"seed": 0, "train.steps": 6}, "continued": {"seed": 0, "train.steps": 6, "new": [1]}},
  }
  assert settings_that_differ(settings) == [
    {"key": "new", "stages": ["continued"], "values": {"a": None, "b": [1]}},
    {"key": "train.steps", "stages": ["base"], "values": {"a": 5, "b": 6}},
    {"key": "train.steps", "stages": ["continued"], "values": {"a": 9, "b": 6}},
  ]
