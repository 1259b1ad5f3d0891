"""Texts as they are asked for."""

import jax
import numpy as np
import pytest

from data.tasks import Task
from models.decode import Choice
from models.sharding import make_mesh, param_shardings
from tests.test_evaluate import LABELS, evaluator_of, task_of
from train import generate
from train.evaluator import Evaluator
from train.generate import Wish
from train.text_metrics import GENERATION

PROMPTS = ["sob", "a fall, and a rash", ""]


@pytest.fixture(scope="module")
def writers():
  return {architecture: evaluator_of(architecture, batch_size=4, max_new_tokens=24) for architecture in ("gpt", "t5")}


@pytest.mark.parametrize("architecture", ["gpt", "t5"])
def test_what_is_not_asked_for_is_greedy_and_a_stream_is_the_text(writers, architecture, one_device):
  evaluator = writers[architecture]
  plain = [text for [text] in generate.answers(evaluator, PROMPTS, Wish())]
  assert "".join(generate.stream(evaluator, PROMPTS[0], Wish())).strip() == plain[0]
  stop = plain[0][len(plain[0]) // 2 :][:2]
  stopped = Wish(stops=(stop, "never written"))
  [[text]] = generate.answers(evaluator, PROMPTS[:1], stopped)
  assert text == plain[0][: plain[0].index(stop)].strip() and stop
  assert "".join(generate.stream(evaluator, PROMPTS[0], stopped)).strip() == text


def test_a_gpt_of_texts_goes_on_with_a_prompt(one_device, monkeypatch):
  evaluator = evaluator_of(max_new_tokens=24)
  assert evaluator.frame(None).after  # span corruption asks with a sentinel, and EOS
  evaluator.config.data.objective = "next_token"
  [[whole]] = generate.answers(evaluator, ["x"], Wish())
  assert len(set(whole[5:10])) > 1
  [[text]] = generate.answers(evaluator, ["x" + whole[:5]], Wish())
  assert text.startswith(whole[5:10])
  assert "".join(generate.stream(evaluator, "x" + whole[:5], Wish())) == text
  monkeypatch.setattr(generate, "_text", lambda *_: " upon a time ")
  [[text]] = generate.answers(evaluator, ["Once"], Wish())
  assert text == " upon a time "  # spaces are its own where it goes on
  evaluator.config.architecture = "t5"
  assert evaluator.frame(None).after  # what an encoder reads has an end


def test_several_draws_differ_and_a_seed_repeats_them(writers, one_device):
  wish = Wish(Choice(temperature=2.0), samples=3, seed=5)
  first, again = (generate.answers(writers["gpt"], PROMPTS, wish) for _ in range(2))
  assert first == again and all(len(set(several)) == 3 for several in first)
  assert first != generate.answers(writers["gpt"], PROMPTS, wish._replace(seed=6))


@pytest.mark.parametrize("samples", [2, 6])  # several prompts at once, and more than one turn
@pytest.mark.parametrize(("devices", "size"), [(1, 4), (8, 4), (8, 32)])  # more devices than rows, too
@pytest.mark.parametrize("architecture", ["gpt", "t5"])
def test_draws_are_their_own_prompts(writers, architecture, devices, size, samples, monkeypatch):
  shrunk, unfinished = [], generate._unfinished
  monkeypatch.setattr(generate, "_unfinished", lambda done: shrunk.append(unfinished(done)) or shrunk[-1])
  monkeypatch.setattr(generate, "SHRINK_EVERY", 3)
  monkeypatch.setattr(generate, "SMALLEST", 2)
  mesh = make_mesh({"data": devices}, jax.devices()[:devices])
  evaluator, cold = writers[architecture], Choice(temperature=1e-5)  # so that every draw is the likeliest
  config = evaluator.config.copy_and_resolve_references()
  config.evaluate.batch_size = size
  with jax.set_mesh(mesh):
    placed = jax.device_put(evaluator.params, param_shardings(evaluator.params, mesh))
    here = Evaluator(config, evaluator.model, placed, evaluator.tokenizer)
    plain = [text for [text] in generate.answers(here, PROMPTS, Wish())]
    for count in (3, 1):  # one prompt is half of a batch or less: the rest is left out
      found = generate.answers(here, PROMPTS[:count], Wish(cold, samples=samples))
      assert found == [[text] * samples for text in plain[:count]]
    several = generate.answers(here, PROMPTS[:1], Wish(Choice(temperature=2.0), samples=samples))
  assert len(set(plain)) == 3 and len(set(several[0])) == samples
  assert any(kept is not None for kept in shrunk) == (samples == 2 and (devices, size) != (8, 4))


def test_beams_give_the_best_first(writers, one_device):
  found = generate.answers(writers["t5"], PROMPTS, Wish(beams=3, samples=2, length_penalty=0.5, room=4))
  assert [len(several) for several in found] == [2, 2, 2]


def test_a_consensus_is_the_draw_that_scores_best_against_all_others(writers, one_device):
  wish = Wish(Choice(temperature=1.5), samples=7)
  drawn = generate.answers(writers["gpt"], PROMPTS, wish)
  for metric in ("rougeL", "bleu", "repetition_rate"):
    measure, found = GENERATION[metric], generate.answers(writers["gpt"], PROMPTS, wish._replace(consensus=metric))
    for several, [kept] in zip(drawn, found, strict=True):
      expected = []
      for place, text in enumerate(several):
        others = several[:place] + several[place + 1 :]
        values = measure.value(measure.parts([text] * len(others), others, [""] * len(others)))
        expected.append(measure.better * values.mean())
      assert expected[several.index(kept)] == pytest.approx(max(expected)) and len(set(several)) > 1
  assert generate.consensus(["a b", "c", "c", "a b d"], "exact_match") == "c"
  assert generate.consensus(["a b", "c", "c", "a b d"], "rouge1", [9, 1, 1, 3]) == "a b d"  # what "a b" expects is less
  assert generate.consensus(["one", "two"], "exact_match") == "one"


def test_short_texts_that_a_metric_does_not_see_are_told_apart_by_how_often_they_were_drawn():
  assert generate.consensus(["give one", "take two", "take two"], "bleu") == "take two"
  assert generate.consensus(["one", "two", "two"], "rouge2") == "two"


@pytest.mark.parametrize(
  ("pieces", "stops", "whole"),
  [
    (["wait x", "\ufffd", "é!"], ("xé",), "wait "),
    (["x", "END", "."], ("END.", "D"), "xEN"),
    (["one", ". ", "two"], (" three", ". "), "one"),
  ],
)
def test_nothing_is_shown_that_a_stop_string_takes_back(pieces, stops, whole):
  text, shown = "", ""
  for piece in pieces:  # as a tokenizer decodes them: half a character is a mark, until its rest is there
    text = text.removesuffix("\ufffd") + piece
    kept = generate.cut(text, stops)
    shown = max(shown, kept[: len(kept) - generate.withheld(kept, stops)], key=len)
    assert kept.startswith(shown)
  assert generate.cut(text, stops) == whole and whole.startswith(shown)


@pytest.mark.parametrize(
  ("pieces", "expected"),
  [
    (["Ans", "wer:", " take", " A.", " Then", " B", ".", " "], "take A. Then B"),
    (["Answer", ": rest"], "rest"),
    (["An", " answer."], "An answer"),
    (["Answer:", "."], ""),
    ([], ""),
  ],
)
def test_an_answer_is_without_what_its_template_puts_around_it(writers, one_device, monkeypatch, pieces, expected):
  task = Task("t", "generation", "", templates=({"input": "{input}", "target": "Answer: {target}."},))
  looks = [np.tile(np.arange(end + 1), (4, 1)) for end in range(len(pieces) + 1)]  # 4 rows are a batch here
  monkeypatch.setattr(generate, "_pieces", lambda *_, **__: iter(looks))
  monkeypatch.setattr(generate, "_text", lambda evaluator, frame, tokens: "".join(pieces[: len(tokens) - 1]))
  row, shown = {"input": "sob"}, list(generate.stream(writers["gpt"], "sob", Wish(), task, {"input": "sob"}))
  assert "".join(shown).strip() == expected
  assert len(shown) > 1 or len(pieces) < 8  # piece by piece
  assert generate.answers(writers["gpt"], ["sob"], Wish(), task, [row]) == [[expected]]
  framed = "".join(pieces).strip()
  assert generate.answers(writers["gpt"], ["sob"], Wish(), task) == [[framed]]


def test_a_consensus_is_of_bare_answers(writers, one_device, monkeypatch):
  task = Task("t", "generation", "", templates=({"input": "{input}", "target": "Answer: {target}."},))
  asked = []
  monkeypatch.setattr(generate, "_text", lambda *_: "Answer: rest.")
  monkeypatch.setattr(generate, "consensus", lambda texts, metric, weights=None: asked.extend(texts) or "")
  generate.answers(writers["gpt"], ["sob"], Wish(Choice(2.0), samples=2, consensus="rouge1"), task, [{"input": "sob"}])
  assert asked == ["rest", "rest"]


def test_a_label_is_written_whole_however_little_room_is_asked_for(writers, tmp_path, one_device):
  task = task_of(tmp_path)
  found = generate.answers(writers["gpt"], PROMPTS, Wish(room=1, held=True), task)
  assert {text for [text] in found} <= set(LABELS)


def test_where_short_texts_are_drawn_too_often_a_consensus_makes_up_for_it(writers, one_device, monkeypatch):
  """A loss that weighs each example 1 makes texts of n tokens 1/n times as likely as they are right."""
  evaluator, asked = writers["gpt"], []
  monkeypatch.setattr(generate, "consensus", lambda texts, metric, weights=None: asked.append((texts, weights)) or "")
  wish = Wish(Choice(temperature=2.0), samples=3, consensus="rouge1", room=9)
  config = evaluator.config.copy_and_resolve_references()
  weighing = Evaluator(config, evaluator.model, evaluator.params, evaluator.tokenizer)
  for kind in ("token", "task", "example"):
    config.data.loss_normalisation = kind
    generate.answers(weighing, PROMPTS, wish)
  plain, weighed = asked[:6], asked[6:]
  assert all(weights is None for _, weights in plain)
  assert [texts for texts, _ in weighed] == [texts for texts, _ in plain[:3]]
  assert all(len(weights) == 3 and set(weights) <= set(range(1, 10)) for _, weights in weighed)
  rng = np.random.default_rng(0)
  right = {"a": 0.4, "b": 0.1, "a b c d": 0.5}  # and so often they are drawn where tokens are words:
  drawn = np.array([share / len(text.split()) for text, share in right.items()])
  texts = list(rng.choice(list(right), 400, p=drawn / drawn.sum()))
  monkeypatch.undo()
  assert generate.consensus(texts, "rouge1") == "a"
  assert generate.consensus(texts, "rouge1", [len(text.split()) for text in texts]) == "a b c d"


@pytest.mark.parametrize("architecture", ["gpt", "t5"])
def test_answers_held_to_labels_are_labels(writers, architecture, tmp_path, one_device):
  task = task_of(tmp_path)
  found = generate.answers(writers[architecture], PROMPTS, Wish(Choice(temperature=2.0), held=True, samples=4), task)
  assert {text for several in found for text in several} <= set(LABELS)


@pytest.mark.parametrize(
  ("wish", "message"),
  [
    (Wish(beams=2, choice=Choice(temperature=1.0)), "beams go without"),
    (Wish(samples=2), "need a temperature"),
    (Wish(length_penalty=2.0), "more than one"),
    (Wish(held=True), "no task"),
    (Wish(stops=("",)), "empty"),
    (Wish(samples=0), "1 or more"),
    (Wish(consensus="rougeL"), "several samples, by one of .*got 'rougeL' of 1"),
    (Wish(Choice(temperature=1.0), samples=2, consensus="meteor"), "got 'meteor' of 2"),
    (Wish(Choice(temperature=1.0), samples=2, consensus="length_ratio"), "got 'length_ratio' of 2"),
  ],
)
def test_wishes_that_do_not_go_together_are_refused(wish, message):
  with pytest.raises(ValueError, match=message):
    generate.check(wish)
