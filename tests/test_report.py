"""The report: what its numbers are said to mean, and a page that shows all of them and fetches nothing."""

import copy
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from train import calibration, report_labels, report_plots
from train.report import completed, plain, write_report
from train.report_html import render
from train.report_verdict import percent, verdict
from train.retention import against_multitask, changes

STAGES = {  # name: (from, kind, perplexity, accuracy, ROUGE-L)
  "base": ("", "main", 20.0, 0.30, 0.01),
  "continued": ("base", "main", 8.0, 0.302, 0.02),
  "multitask": ("continued", "main", 9.0, 0.90, 0.60),
  "only_triage": ("continued", "arm", 30.0, 0.91, 0.00),
  "multitask_without_continued": ("base", "arm", 15.0, 0.80, 0.595),
}


def make_report() -> dict:
  """A finished recipe on two tasks, with names and texts that try to break the page."""
  report = {
    "domain": "clinic & <b>ward</b>",
    "architecture": "gpt",
    "size": "tiny",
    "parameters": 1_234_567,
    "created": "2026-01-02T03:04:05+00:00",
    "stages": [],
    "matrix": {},
    "mixture": {},
    "skills": [
      {"name": "domain", "kind": "perplexity", "metric": "perplexity", "higher_is_better": False},
      {
        "name": "triage",
        "kind": "classification",
        "metric": "accuracy",
        "higher_is_better": True,
        "labels": ["<now>", "later"],
      },
      {"name": "costs_$x^2$", "kind": "generation", "metric": "rougeL", "higher_is_better": True},
    ],
  }
  for name, (source, kind, perplexity, accuracy, rouge) in STAGES.items():
    loss = [[step, 5.0 / step] for step in range(10, 110, 10)]
    report["stages"].append(
      {"name": name, "init_from": source, "kind": kind, "steps": 100, "tokens": 51_000, "seconds": 75.2, "loss": loss}
    )
    report["matrix"][name] = {
      "domain": {"value": perplexity, "perplexity": perplexity, "bits_per_byte": 1.25, "n": 4000},
      "triage": {
        "value": accuracy,
        "accuracy": accuracy,
        "macro_f1": accuracy,
        "n": 40,
        "confusion": [[17, 3], [2, 18]],
      },
      "costs_$x^2$": {"value": rouge, "rougeL": rouge, "rouge1": rouge, "exact_match": 0.0, "n": 40},
    }
    report["mixture"][name] = {
      "domain": {"asked": 1.0, "examples": 10, "supervised_tokens": 300, "passes": 70.5},
      "packing": {"efficiency": 0.9},
    }
  report["mixture"]["only_triage"]["triage"] = {"asked": 3.0, "examples": 30, "supervised_tokens": 100, "passes": 1.0}
  report["baselines"] = {
    "triage": {"majority": {"value": 0.5, "accuracy": 0.5}, "nearest_neighbour": {"value": 0.7, "accuracy": 0.7}},
    "costs_$x^2$": {"nearest_neighbour": {"value": 0.4}},
  }
  attack = "<script>alert('x')</script><img src=https://example.org/a.png>"
  report["samples"] = {
    "triage": [{"input": attack, "target": "later", "outputs": dict.fromkeys(STAGES, "later")}],
    "costs_$x^2$": [{"input": "in", "target": "out", "outputs": dict.fromkeys(STAGES, attack + "y" * 2000)}],
  }
  return report


def rendered(report: dict, scores: dict | None = None) -> str:
  return render(plain(completed(report, scores)))


def planted_scores() -> dict:
  """Parts of every headline whose values are those of `STAGES`: the right rows of a better stage are a superset."""
  scores = {}
  for name, (_, _, perplexity, accuracy, rouge) in STAGES.items():
    rows = np.linspace(0.9, 1.1, 40)  # a packed row's nats a token, by the mean's
    parts = {
      "domain": np.stack([100 * rows * np.log(perplexity), np.full(40, 100.0)], axis=1),
      "triage": np.stack([(np.arange(1000) < 1000 * accuracy).astype(float), np.ones(1000)], axis=1),
      "costs_$x^2$": np.stack([np.full(1000, rouge), np.ones(1000)], axis=1),
    }
    scores[name] = {skill: found[None] for skill, found in parts.items()}
  return scores


def make_calibration() -> dict:
  """A classification task's calibration, made of planted probabilities."""
  rng = np.random.default_rng(0)
  scores, targets = rng.normal(size=(200, 2)) * 3, rng.integers(2, size=200)
  scores[np.arange(200), targets] += 3.0
  fitted = calibration.Calibration("sum", 2.5, 120, "", 0.95, 0.8)
  return calibration.measure(fitted, scores, targets)


class Page(HTMLParser):
  """Collects a page's tags, attributes and visible text; checks that tags close in order."""

  VOID = ("meta", "br", "wbr")

  def __init__(self, page: str):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], ""
    self.feed(page)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(name, value or "") for name, value in attrs]
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(name, value or "") for name, value in attrs]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if "style" not in self.open:
      self.text += data


def test_a_bars_interval_is_seen_whole(monkeypatch):
  report = make_report()
  report["matrix"]["multitask"]["domain"] |= {"value": 10.0, "interval": [5.0, 400.0]}
  monkeypatch.setattr(report_plots, "svg", lambda figure, title: figure)
  skill = next(skill for skill in report["skills"] if skill["name"] == "domain")
  assert report_plots._bars(report, skill).axes[0].get_xlim()[1] > 400


def test_counts_over_several_templates_are_means():
  report = make_report()
  report["matrix"]["multitask"]["triage"]["confusion"] = [[32 / 3, 7 / 3], [0.0, 1234.0]]
  page = report_labels.confusions(report)
  assert ">10.7<" in page and ">2.3<" in page and ">1234<" in page and ">13<" in page and ">·<" in page


def test_the_spread_over_templates_is_shown():
  report = make_report()
  report["matrix"]["multitask"]["triage"]["templates"] = [0.25, 0.75]
  assert "0.250 to 0.750 by template" in rendered(report)


def test_changes_know_which_direction_is_better():
  found = changes(make_report())
  assert set(found) == set(STAGES) - {"base"}
  assert found["continued"]["domain"] == {"from": "base", "absolute": -12.0, "relative": -0.6, "verdict": "gained"}
  assert found["continued"]["triage"]["verdict"] == "kept"  # 0.300 -> 0.302 is within 2 %
  assert found["multitask"]["domain"]["verdict"] == "forgotten" and found["multitask"]["domain"]["absolute"] == 1.0
  assert found["multitask"]["triage"]["verdict"] == "gained"
  assert found["only_triage"]["costs_$x^2$"]["verdict"] == "forgotten"
  assert found["only_triage"]["costs_$x^2$"]["relative"] == -1.0
  assert found["multitask_without_continued"]["domain"]["from"] == "base"


@pytest.mark.parametrize(
  ("before", "after", "expected"),
  [
    (8.0, float("nan"), "forgotten"),
    (float("inf"), 8.0, "gained"),
    (None, float("nan"), "kept"),
  ],
)
def test_a_value_that_is_not_finite_is_the_worst(before, after, expected):
  report = make_report()
  report["matrix"]["base"]["domain"]["value"], report["matrix"]["continued"]["domain"]["value"] = before, after
  found = changes(report)["continued"]["domain"]
  assert found == {"from": "base", "absolute": None, "relative": None, "verdict": expected}
  assert "not finite" in rendered(report)


def test_a_rise_from_zero_has_no_relative_size():
  report = make_report()
  report["matrix"]["continued"]["triage"]["value"] = 0.0
  assert changes(report)["multitask"]["triage"] == {
    "from": "continued",
    "absolute": 0.9,
    "relative": None,
    "verdict": "gained",
  }


def test_json_round_trip(tmp_path):
  report = make_report()
  untouched = copy.deepcopy(report)
  write_report(report, tmp_path / "new")
  text = (tmp_path / "new" / "report.json").read_text(encoding="utf-8")
  read = json.loads(text)
  assert report == untouched  # the caller's dict is not written to
  assert read == plain(completed(report)) and set(read) >= set(report)
  assert list(read) == sorted(read) and list(read["matrix"]) == sorted(STAGES)
  write_report(dict(reversed(report.items())), tmp_path / "new")
  assert (tmp_path / "new" / "report.json").read_text(encoding="utf-8") == text
  assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json"]


def test_a_written_report_renders_again_to_the_same_page(tmp_path):
  write_report(make_report(), tmp_path)
  read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
  assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(read)


def test_nan_and_numpy_become_json(tmp_path):
  report = make_report()
  report["matrix"]["base"]["domain"]["value"] = np.float32("nan")
  report["matrix"]["base"]["triage"] |= {"value": np.float64(0.25), "confusion": np.eye(2, dtype=np.int64)}
  report["stages"][0]["loss"] = [(10, np.inf), (np.int32(20), 4.0)]
  write_report(report, tmp_path)
  read = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
  assert read["matrix"]["base"]["domain"]["value"] is None
  assert read["matrix"]["base"]["triage"]["value"] == 0.25
  assert read["matrix"]["base"]["triage"]["confusion"] == [[1, 0], [0, 1]]
  assert read["stages"][0]["loss"] == [[10, None], [20, 4.0]]


def test_what_json_cannot_hold_is_named_and_the_old_report_stays(tmp_path):
  write_report(make_report(), tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  with pytest.raises(TypeError, match=r"report\.domain: .* got a set"):
    write_report({**make_report(), "domain": {1}}, tmp_path)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_page_shows_every_stage_skill_and_value():
  page = Page(rendered(make_report()))
  for name in [*STAGES, "domain", "triage", "costs_$x^2$", "majority", "nearest neighbour", "<now>", "later"]:
    assert name in page.text
  numbers = ("20.0", "0.302", "0.600", "0.910", "1.25 bits a byte", "75.0%", "70.50", "1 min 15 s", "1.2 M parameters")
  for shown in numbers:
    assert shown in page.text, shown
  assert page.tags.count("svg") == 7  # main line, arms, two tasks; texts and tasks over the stages; what they read
  assert "(1,1" in page.text and "more characters)" in page.text  # what is cut is counted


def test_the_best_stage_of_each_skill_is_bold():
  page = rendered(make_report())
  best = re.findall(r'<td class="best"[^>]*>([^<]*)<', page)
  assert sorted(best) == ["0.600", "0.910", "8.000"]


def test_text_is_escaped_and_nothing_is_fetched():
  page = rendered(make_report())
  parsed = Page(page)
  assert not {"script", "img", "link", "iframe"} & set(parsed.tags)
  assert page.count("<script") == 0 and "&lt;script&gt;" in page
  assert "<b>ward" not in page
  for name, value in parsed.attributes:
    if not name.startswith("xmlns"):
      assert "//" not in value, (name, value)
    if name in ("src", "href", "xlink:href"):
      assert value.startswith("#"), (name, value)
  assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", page) and "@import" not in page
  assert "default-src 'none'" in page


def test_ids_occur_once():
  ids = [value for name, value in Page(rendered(make_report())).attributes if name == "id"]
  shared = {value for value in ids if ids.count(value) > 1}
  assert not shared


@pytest.mark.parametrize(
  "missing", ["domain", "architecture", "parameters", "created", "matrix", "baselines", "samples", "mixture"]
)
def test_optional_keys_may_be_missing(missing, tmp_path):
  report = make_report()
  del report[missing]
  write_report(report, tmp_path)
  assert "multitask" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


def test_stages_and_skills_may_be_bare():
  report = {
    "stages": [{"name": "base"}, {"name": "continued", "init_from": "base"}],
    "skills": [{"name": "domain", "kind": "perplexity"}, {"name": "t", "kind": "classification"}],
    "matrix": {"base": {"domain": {"value": 4.0}}, "continued": {"t": {"value": 0.5}}},
  }
  page = Page(rendered(report))
  assert "continued" in page.text and "4.000" in page.text and "0.500" in page.text


def test_a_recipe_that_has_only_begun_is_not_judged():
  report = make_report()
  report["stages"] = report["stages"][:1]
  assert verdict(report) == ["Too few stages have been measured to compare them yet."]
  Page(rendered(report))


def test_the_verdict_says_what_the_numbers_say():
  said = " ".join(verdict(make_report()))
  assert "Continued pre-training took domain perplexity from 20.0 to 8.000 (−60 %)" in said
  assert "Fine-tuning on the tasks then took domain perplexity from 8.000 to 9.000 (+12 %)" in said
  assert "triage 0.900 and costs_$x^2$ 0.600" in said
  assert "beats the best baseline that needs no language model on both" in said
  assert "Tuned on triage alone" in said and "costs_$x^2$: 0.000 instead of 0.600" in said
  assert "loses on triage (0.800 instead of 0.900) and changes little on costs_$x^2$ (0.595 instead of 0.600)" in said


def test_the_verdict_turns_with_the_numbers():
  report = make_report()
  report["baselines"]["triage"]["nearest_neighbour"]["value"] = 0.95
  report["matrix"]["multitask_without_continued"]["triage"]["value"] = 0.97
  report["matrix"]["only_triage"]["costs_$x^2$"]["value"] = 0.7
  report["matrix"]["continued"]["domain"]["value"] = 25.0
  report["stages"][3]["steps"] = 50
  said = " ".join(verdict(report))
  assert "from 20.0 to 25.0 (+25 %)" in said
  assert "does not do all of them yet" in said and "triage (0.900 against 0.950)" in said
  assert "beats" not in said
  assert "(50 steps, the one model 100)" in said and "loses nothing on the other task." in said
  assert "gains on triage (0.970 instead of 0.900)" in said and "loses on" not in said


def test_baselines_on_other_rows_are_not_compared_in_silence():
  report = make_report()
  assert "compare the two with care" not in " ".join(verdict(report))
  report["baselines"]["triage"]["majority"]["n"] = 524
  assert "(40 against 524 on triage): compare the two with care" in " ".join(verdict(report))
  assert "on 524 rows" in Page(rendered(report)).text


def test_the_verdict_says_what_chance_can_do():
  # 1.96 * sqrt(0.25 / 40) = 0.155
  assert "With 40 test rows an accuracy is sure to about ±0.15 only." in verdict(make_report())


def test_a_text_that_was_lost_is_said():
  report = make_report()
  report["matrix"]["multitask"]["domain"]["value"] = float("inf")
  assert "domain perplexity from 8.000 to no finite number" in " ".join(verdict(plain(report)))


def test_an_empty_answer_shows():
  report = make_report()
  report["samples"]["costs_$x^2$"][0]["outputs"]["base"] = ""
  assert "(nothing)" in rendered(report) and "(nothing)" not in rendered(make_report())


@pytest.mark.parametrize(("share", "shown"), [(-0.9995, "÷2,000"), (-0.9, "−90 %"), (0.004, "±0 %"), (144, "×145")])
def test_percent(share, shown):
  assert percent(share) == shown


def test_a_dollar_in_a_name_is_drawn_as_it_is():
  name = r"from_$\frac$"  # as a formula it would be an error
  report = make_report()
  report["stages"].append({**report["stages"][-1], "name": name})
  pictures = rendered(report).split("Every task, stage by stage")[1].split("Side by side")[0]
  assert pictures.count(name) == 3  # two bar charts and the arms' curves


def test_changes_are_tested_on_the_same_examples():
  found = changes(make_report(), planted_scores())
  near = found["continued"]["triage"]  # 2 rows of 1,000 gained, none lost: within 2 % of 0.3
  assert near["verdict"] == "kept" and near["low"] <= near["absolute"] <= near["high"] and near["p"] > 0.3
  assert found["multitask"]["triage"]["verdict"] == "gained" and found["multitask"]["triage"]["p"] < 0.001
  assert found["continued"]["domain"]["verdict"] == "gained" and found["continued"]["domain"]["high"] < 0
  assert found["multitask"]["domain"]["verdict"] == "forgotten"
  for skills in found.values():
    for name, change in skills.items():
      assert set(change) == {"from", "absolute", "relative", "verdict", "low", "high", "p", "n"}
      middle = change["relative" if name == "domain" else "absolute"]
      assert change["low"] - 1e-9 <= middle <= change["high"] + 1e-9


def test_a_perplexity_that_falls_far_is_compared_by_factors():
  report, scores = make_report(), planted_scores()
  rng = np.random.default_rng(0)
  for name, nats in (("base", 8.0), ("continued", 1.0)):
    report["matrix"][name]["domain"]["value"] = np.exp(nats)
    scores[name]["domain"] = np.stack([100 * (nats + rng.normal(0, 0.5, 40)), np.full(40, 100.0)], axis=1)[None]
  found = changes(report, scores)["continued"]["domain"]
  assert -1 < found["low"] < np.expm1(-7.0) < found["high"] < -0.99  # never less than nothing is left
  assert found["verdict"] == "gained" and re.search(r"÷1,\d+ to ÷\d{3}", Page(rendered(report, scores)).text)


def test_few_rows_cannot_tell_what_many_can():
  report, scores = make_report(), planted_scores()
  rng = np.random.default_rng(0)
  for name, accuracy in (("base", 0.5), ("continued", 0.55)):
    report["matrix"][name]["triage"]["value"] = accuracy
    right = np.zeros(40)
    right[rng.permutation(40)[: round(40 * accuracy)]] = 1
    scores[name]["triage"] = np.stack([right, np.ones(40)], axis=1)[None]
  assert changes(report)["continued"]["triage"]["verdict"] == "gained"  # by the values alone
  assert changes(report, scores)["continued"]["triage"]["verdict"] == "cannot tell"
  assert "? cannot tell" in Page(rendered(report, scores)).text


def test_examples_that_differ_are_not_paired():
  report, scores = make_report(), planted_scores()
  scores["continued"]["triage"] = scores["continued"]["triage"][:, :500]
  scores["continued"]["domain"] = scores["continued"]["domain"] * np.array([1.0, 1.01])  # other rows: other tokens
  found = changes(report, scores)["continued"]
  assert "p" not in found["triage"] and "p" not in found["domain"] and "p" in found["costs_$x^2$"]


def test_arms_are_tested_against_the_one_model():
  found = against_multitask(make_report(), planted_scores())
  assert set(found) == {"only_triage", "multitask_without_continued"}
  assert all(change["from"] == "multitask" for skills in found.values() for change in skills.values())
  assert found["only_triage"]["costs_$x^2$"]["verdict"] == "forgotten"
  assert found["multitask_without_continued"]["triage"]["verdict"] == "forgotten"
  assert found["multitask_without_continued"]["costs_$x^2$"]["verdict"] == "kept"
  report = make_report()
  report["stages"] = report["stages"][:2]
  assert against_multitask(report, planted_scores()) == {}


def test_the_verdict_does_not_say_what_the_tests_could_not():
  report = make_report()
  report["matrix"]["only_triage"]["costs_$x^2$"]["value"] = 0.58
  change = {"from": "multitask", "absolute": -0.02, "relative": -0.03, "low": -0.1, "high": 0.06, "p": 0.6}
  arms = {"only_triage": {"costs_$x^2$": {**change, "verdict": "cannot tell"}}}
  arms["multitask_without_continued"] = {
    name: {**change, "verdict": "cannot tell"} for name in ("triage", "costs_$x^2$")
  }
  said = " ".join(verdict({**report, "arms": arms}))
  assert "and loses nothing that the test rows could show on the other task." in said
  assert "makes no difference that the test rows could show on triage (0.800 instead of 0.900)" in said
  assert "loses on" not in said and "falls behind" not in said


def test_the_page_shows_intervals_tests_and_every_metric():
  report = make_report()
  report["matrix"]["multitask"]["triage"] |= {"interval": [0.881, 0.919], "accuracies": {"sum": 0.9, "pmi": 0.123}}
  report["matrix"]["multitask"]["triage"]["generated"] = {"valid": 0.777, "accuracy": 0.666}
  report["matrix"]["multitask"]["costs_$x^2$"] |= {"chrf": 0.555, "copy_rate": 0.444}
  page = Page(rendered(report, planted_scores()))
  for shown in ("0.881 to 0.919", "p < 0.001", "accuracy by pmi", "0.123", "0.777", "0.666", "chrF", "0.555", "0.444"):
    assert shown in page.text, shown
  assert "against base" in page.text and "▼ worse" in page.text and "▲ gained" in page.text


def test_the_page_draws_each_tasks_curves():
  report = make_report()
  assert "Whose gradient it is" not in render(report) and "Loss of each source" not in render(report)
  for stage in report["stages"]:
    both = stage["name"] != "only_triage"
    found = {"triage": 0.3, "costs_$x^2$": 0.7} if both else {"triage": 1.0}
    stage["task_gradients"] = [[step, found] for step in range(10, 110, 10)] + [[110, {"triage": None}]]
  page = render(report)
  assert "Loss of each source" not in page
  report["stages"][2]["task_loss"] = [[10, {"triage": 2.0, "costs_$x^2$": 3.0}], [20, {"triage": 1.0}]]
  assert render(report).count("<h3>Loss of each source: the main line") == 1
  assert "Whose gradient it is" in page and "norm: the main line, stage after stage" in page
  assert "norm: multitask_without_continued" in page and "norm: only_triage" not in page  # one alone is all of it
  assert page.count(">costs_$x^2$</text>") == 2 + render(make_report()).count(">costs_$x^2$</text>")  # the legends
  ids = re.findall(r'\bid="([^"]*)"', page)
  assert len(ids) == len(set(ids))


def test_the_page_rings_the_best_step():
  report = make_report()
  report["stages"][2] |= {"validation": [[50, {"triage": 0.9}], [100, {"triage": 0.8}]]}
  without = render(report)
  report["stages"][2]["best"] = {"step": 50, "skill": "triage", "value": 0.9}
  page = render(report)
  assert "Validation: the main line, stage after stage" in without and "Whose gradient" not in page
  assert "100<small>the best: 50</small>" in page and "the best:" not in without
  assert len(page) > len(without) + 100 and page.count("<figure") == without.count("<figure")


def test_the_page_draws_reliability_and_coverage():
  report = make_report()
  found = make_calibration()
  report["matrix"]["multitask"]["triage"]["calibration"] = found
  page = Page(rendered(report))
  assert page.tags.count("svg") == 7 + 2
  assert "temperature 2.500, from 120 validation rows" in page.text
  assert f"{found['ece']['before']:.3f} before, {found['ece']['after']:.3f} after" in page.text
  assert "abstains below a probability of 0.800" in page.text and f"it labels {found['coverage']:.0%}" in page.text
  assert "temperature 2.50" in page.text.split("triage: reliability")[1]  # the legend


@pytest.mark.parametrize(
  ("change", "shown"),
  [
    ({"rows": 0, "note": "the task has no validation split: nothing was fitted", "threshold": None}, "not fitted"),
    ({"threshold": 0.0}, "An accuracy of 0.950 is reached on validation without abstaining."),
    ({"coverage": 0.0, "accuracy": None}, "it labels 0% of the test rows, and none is right"),
  ],
)
def test_a_calibration_that_could_not_be_is_said(change, shown):
  report = make_report()
  report["matrix"]["multitask"]["triage"]["calibration"] = {**make_calibration(), **change}
  page = Page(rendered(report))
  assert shown in page.text
