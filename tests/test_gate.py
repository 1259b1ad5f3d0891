"""The gate and what was kept: rules that cannot be are refused, verdicts follow the numbers, BWT is the paper's."""

import math

import numpy as np
import pytest

from tests.test_report import make_report, planted_scores
from train import gate, statistics
from train.report import completed
from train.report_retention import gate_box
from train.report_verdict import verdict
from train.retention import backward_transfer, best_earlier, earlier_changes, lineage, retention
from train.text_metrics import ratio


def judged(rule: dict, report: dict | None = None, scores: dict | None = None) -> dict:
  """The outcome of one rule on the report of tests/test_report.py."""
  report = report or make_report()
  rules = gate.read_rules({"rule": rule}, report["stages"], report["skills"])
  found = gate.judge(rules, report, planted_scores() if scores is None else scores)
  assert found["passed"] == found["rules"]["rule"]["passed"]
  return found["rules"]["rule"]


@pytest.mark.parametrize(
  ("rule", "passed"),
  [
    ({"skill": "triage", "at_least": 0.9}, True),
    ({"skill": "triage", "at_least": 0.901}, False),
    ({"skill": "domain", "at_most": 9.0}, True),
    ({"skill": "domain", "at_most": 8.9}, False),
    ({"skill": "domain", "stage": "continued", "better_than": "base"}, True),
    ({"skill": "domain", "better_than": "continued"}, False),  # 9 is worse than 8: less is better
    ({"skill": "domain", "keeps": 0.88}, True),  # 8 / 9 = 0.889 of the best, which is continued, not base
    ({"skill": "domain", "keeps": 0.89}, False),
    ({"skill": "triage", "stage": "only_triage", "keeps": 3.0}, True),  # 0.91 of 0.302
    ({"skill": "triage", "stage": "only_triage", "keeps": 3.1}, False),
    ({"skill": "costs_$x^2$", "stage": "only_triage", "keeps": 0.1}, False),
    ({"skill": "tasks", "keeps": 1.0}, True),
    ({"skill": "*", "keeps": 1.0}, False),  # the domain's perplexity
    ({"skill": "texts", "at_most": 10}, True),
  ],
)
def test_rules_by_value(rule, passed):
  assert judged(rule)["passed"] is passed
  assert judged({**rule, "sure": False})["passed"] is passed


def test_a_rule_for_several_skills_has_a_check_for_each():
  checks = judged({"skill": "*", "keeps": 1.0})["checks"]
  assert [(check["skill"], check["passed"]) for check in checks] == [
    ("domain", False),
    ("triage", True),
    ("costs_$x^2$", True),
  ]
  assert checks[0]["needed"] == 8.0 and checks[0]["against"] == "continued" and "8.000" in checks[0]["said"]


def test_sure_asks_the_rows_and_not_the_value():
  report, scores = make_report(), planted_scores()
  report["matrix"]["multitask"]["triage"]["interval"] = [0.85, 0.95]
  rule = {"skill": "triage", "at_least": 0.88}
  assert judged(rule, report)["passed"] and not judged({**rule, "sure": True}, report)["passed"]
  assert judged({**rule, "at_least": 0.85, "sure": True}, report)["passed"]
  report["matrix"]["multitask"]["triage"]["interval"] = None
  assert "no interval" in judged({**rule, "sure": True}, report)["checks"][0]["said"]
  # 0.302 against 0.300 is better by its value; 2 rows of 1,000 do not show it.
  rule = {"skill": "triage", "stage": "continued", "better_than": "base"}
  assert judged(rule)["passed"] and not judged({**rule, "sure": True})["passed"]
  assert judged({**rule, "stage": "multitask", "sure": True})["passed"]
  # From 0.02 to 0.6; rows that all score the same have no spread, and the margin's ends are its value.
  rule = {"skill": "costs_$x^2$", "keeps": 29.0, "sure": True}
  assert judged(rule)["passed"] and not judged({**rule, "keeps": 31.0})["passed"]
  # Rows that are not the same are not paired, and what is not shown fails.
  scores["continued"]["triage"] = scores["continued"]["triage"][:, :500]
  assert not judged({"skill": "triage", "keeps": 1.0, "sure": True}, scores=scores)["passed"]
  assert (
    "row by row"
    in judged({"skill": "triage", "better_than": "continued", "sure": True}, scores=scores)["checks"][0]["said"]
  )


def test_the_margin_is_that_of_the_paired_bootstrap():
  rng = np.random.default_rng(0)
  before, after = (np.stack([rng.random(200) < rate, np.ones(200)], axis=-1)[None].astype(float) for rate in (0.6, 0.7))
  assert statistics.margin(after, before, ratio, 1.0) == pytest.approx(
    tuple(statistics.compare(before, after, ratio)[end] for end in ("low", "high"))
  )
  assert statistics.margin(after, before, ratio, 0.0) == pytest.approx(statistics.interval(after, ratio))


def test_what_is_not_finite_fails_and_what_is_not_measured_waits():
  report = make_report()
  report["matrix"]["multitask"]["domain"]["value"] = float("nan")
  for rule in ({"at_most": 1e9}, {"keeps": 0.01}, {"better_than": "base"}):
    assert judged({"skill": "domain", **rule}, report)["passed"] is False
  report = make_report()
  rules = gate.read_rules({"a": {"skill": "triage", "at_least": 0.1}}, report["stages"], report["skills"])
  del report["matrix"]["multitask"]
  assert gate.judge(rules, report, {})["passed"] is None
  rules |= gate.read_rules(
    {"b": {"skill": "triage", "stage": "base", "at_least": 0.9}}, report["stages"], report["skills"]
  )
  found = gate.judge(rules, report, {})
  assert found["passed"] is False and found["rules"]["a"]["passed"] is None
  assert gate.lines(found)[0] == "gate: FAILED" and any("pending a: " in line for line in gate.lines(found))
  page = gate_box({"gate": found})
  assert "Gate failed" in page and "0 of 2 rules" in page and gate_box({}) == ""


@pytest.mark.parametrize(
  ("rule", "message"),
  [
    ({"skill": "triag", "at_least": 0.9}, r"config.gate.rule.skill is 'triag'.*'triage'.*'\*'"),
    ({"at_least": 0.9}, "skill is None"),
    ({"skill": "retained", "at_least": 0.9}, "skill is 'retained'"),
    ({"skill": "triage", "stage": "multitsk", "at_least": 0.9}, "no stage 'multitsk'.*'multitask'"),
    ({"skill": "triage", "better_than": "nowhere"}, "no stage 'nowhere'"),
    ({"skill": "triage", "better_than": "multitask"}, "cannot be asked for better_than"),
    ({"skill": "triage"}, "exactly one of.*got none"),
    ({"skill": "triage", "at_least": 0.9, "at_most": 1.0}, "exactly one of"),
    ({"skill": "triage", "atleast": 0.9}, "unknown .'atleast'.*at_least"),
    ({"skill": "triage", "at_least": "0.9"}, "must be a number, got '0.9'"),
    ({"skill": "triage", "at_least": True}, "must be a number"),
    ({"skill": "triage", "keeps": 0}, "a share above 0"),
    ({"skill": "triage", "stage": "base", "keeps": 0.9}, "another one comes before"),
    ({"skill": "triage", "at_least": 0.9, "sure": "yes"}, "true or false, got 'yes'"),
    ("triage >= 0.9", "expected fields such as"),
  ],
)
def test_rules_that_cannot_be_are_refused(rule, message):
  report = make_report()
  with pytest.raises(ValueError, match=message):
    gate.read_rules({"rule": rule}, report["stages"], report["skills"])


def test_backward_transfer_of_a_line_of_tasks_is_the_papers():
  """Lopez-Paz and Ranzato, equation 3: the mean over i < T of R[T,i] - R[i,i]."""
  rng = np.random.default_rng(0)
  values_TI = rng.random((4, 4))
  names = [f"stage{t}" for t in range(4)]
  report = {
    "stages": [{"name": name, "init_from": names[t - 1] if t else ""} for t, name in enumerate(names)],
    "skills": [{"name": f"task{i}", "kind": "generation"} for i in range(4)],
    "matrix": {name: {f"task{i}": {"value": values_TI[t, i]} for i in range(4)} for t, name in enumerate(names)},
    "mixture": {name: {f"task{t}": {"examples": 10}, "packing": {}} for t, name in enumerate(names)},
  }
  found = backward_transfer(report)
  expected = np.mean([values_TI[3, i] - values_TI[i, i] for i in range(3)])
  assert found["stage3"]["tasks"]["backward"] == pytest.approx(expected)
  assert found["stage1"]["tasks"]["backward"] == pytest.approx(values_TI[1, 0] - values_TI[0, 0])
  assert "stage0" not in found and set(found["stage3"]["tasks"]["skills"]) == {"task0", "task1", "task2"}
  report["matrix"]["stage3"]["task0"]["value"] = float("nan")  # not a number that a mean could take
  assert set(backward_transfer(report)["stage3"]["tasks"]["skills"]) == {"task1", "task2"}


def test_backward_transfer_of_a_recipe():
  report = make_report()  # domain is trained from base on; its perplexity goes 20, 8, 9
  report["mixture"]["base"] = {"packing": {}}
  report["skills"].append({"name": "old/ward", "kind": "classification", "metric": "accuracy", "retained": True})
  for place, row in enumerate(report["matrix"].values()):
    row["old/ward"] = {"value": 0.8 - 0.1 * place}
  found = backward_transfer(report)["multitask"]
  assert found["texts"]["skills"] == {"domain": {"learned": "continued", "change": pytest.approx(-math.log(9 / 8))}}
  assert found["tasks"]["skills"] == {"old/ward": {"learned": "base", "change": pytest.approx(-0.2)}}
  assert found["tasks"]["backward"] == pytest.approx(-0.2)  # triage is learned by multitask itself


def test_old_skills_are_in_the_verdict():
  report = make_report()
  assert "old skill" not in " ".join(verdict(completed(report)))
  report["skills"] += [
    {"name": f"old/{n}", "kind": "classification", "metric": "accuracy", "retained": True} for n in "ab"
  ]
  for place, row in enumerate(report["matrix"].values()):
    row |= {"old/a": {"value": 0.8}, "old/b": {"value": 0.8 - 0.1 * place}}
  said = " ".join(verdict(completed(report)))
  assert "Of 2 old skills, measured and not trained, multitask has forgotten old/b (0.600 instead of 0.800)." in said
  assert "measured on 2 tasks" in said  # the old ones are not among the domain's
  for row in report["matrix"].values():
    row["old/b"]["value"] = 0.8
  assert "has forgotten none that could be shown" in " ".join(verdict(completed(report)))


def test_any_earlier_stage_is_compared():
  report = make_report()
  assert lineage(report, "only_triage") == ["continued", "base"] and lineage(report, "base") == []
  found = earlier_changes(report, planted_scores())
  assert set(found) == {"multitask", "only_triage"} and list(found["multitask"]) == ["base"]
  change = found["multitask"]["base"]["triage"]
  assert change["absolute"] == pytest.approx(0.6) and change["n"] == 1000 and change["verdict"] == "gained"
  domain = report["skills"][0]
  assert best_earlier(report, "multitask", domain) == "continued"
  assert best_earlier(report, "multitask_without_continued", domain) == "base"
  kept = retention(report)
  assert kept["multitask"]["domain"] == {"best": "continued", "share": pytest.approx(8 / 9)}
  assert kept["only_triage"]["costs_$x^2$"]["share"] == 0 and "base" not in kept


def test_better_than_nothing_is_not_sure():
  report = make_report()
  report["matrix"]["base"]["domain"]["value"] = float("nan")
  rule = {"skill": "domain", "better_than": "base"}
  assert judged(rule, report)["passed"] is True and judged({**rule, "sure": True}, report)["passed"] is False
