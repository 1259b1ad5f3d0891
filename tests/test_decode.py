"""Decoding finds what an exhaustive search finds, goes on where it stopped, and writes what may be written."""

import itertools

import jax
import numpy as np
import pytest

from models import beam, decode
from models.sharding import make_mesh, on_mesh
from tests.conftest import distinct_params, small_model
from train.evaluator import padded

EOS, PAD = 1, 0
ENDS = {"eos_id": EOS, "pad_id": PAD}
PROMPTS = [[3, 4, 2], [2]]


def ready(form, vocab_size=6, prompts=PROMPTS):
  model = small_model(form, vocab_size)
  return model, distinct_params(model), on_mesh(model.prompts(prompts, 4, 0))


def everything(vocab_size, room):
  """Every text: up to its EOS, or without one at full length."""
  others = [token for token in range(vocab_size) if token != EOS]
  ended = ([*text, EOS] for length in range(room) for text in itertools.product(others, repeat=length))
  return [*ended, *map(list, itertools.product(others, repeat=room))]


@pytest.mark.parametrize("form", ["gpt2", "t5"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
def test_beam_search_with_room_for_all_is_exhaustive(form, length_penalty, one_device):
  model, params, prompts = ready(form, vocab_size=4)
  texts, room = everything(4, 3), 3
  tokens, weights = padded(texts, room)
  sums = np.asarray(jax.jit(lambda: decode.score(model, params, prompts, tokens, weights))())
  scores = sums / np.array([len(text) for text in texts]) ** length_penalty
  settings = {"beams": len(texts), "room": room, "length_penalty": length_penalty, **ENDS}
  found, found_scores = jax.jit(lambda: beam.search(model, params, prompts, **settings))()
  order = np.argsort(-scores, axis=1)
  np.testing.assert_allclose(found_scores, np.take_along_axis(scores, order, 1), atol=1e-4)
  np.testing.assert_array_equal(found[:, 0], tokens[order[:, 0]])


@pytest.mark.parametrize("form", ["gemma2", "t5"])
def test_one_beam_is_greedy_and_beams_do_not_depend_on_the_mesh(form):
  made = []
  for sizes, count in (({}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 8)):
    with jax.set_mesh(make_mesh(sizes, jax.devices()[:count])):
      model, params, prompts = ready(form, 20, PROMPTS * 4)
      run = jax.jit(lambda p, x, b, m=model: beam.search(m, p, x, beams=b, room=6, **ENDS), static_argnums=2)
      made.append(np.asarray(run(params, prompts, 3)[0]))
  np.testing.assert_array_equal(made[0], made[1])
  with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
    model, params, prompts = ready(form, 20, PROMPTS * 4)
    greedy = jax.jit(lambda: decode.write(model, params, prompts, room=6, **ENDS))()
    np.testing.assert_array_equal(
      jax.jit(lambda: beam.search(model, params, prompts, beams=1, room=6, **ENDS))()[0][:, 0], greedy
    )


@pytest.mark.parametrize("form", ["gpt2", "t5"])
def test_pieces_are_the_whole(form, one_device):
  model, params, prompts = ready(form, 20)
  choice, key = decode.Choice(temperature=1.3, top_p=0.9, repetition_penalty=1.5), jax.random.key(2)
  whole = jax.jit(lambda: decode.write(model, params, prompts, key, room=7, choice=choice, **ENDS))()
  carry = jax.jit(lambda: decode.begin(model, params, prompts, room=7, pad_id=PAD, choice=choice))()
  step = jax.jit(lambda c, n: decode.advance(model, params, c, key, n, choice=choice, **ENDS))
  for until in (2, 3, 7):
    carry = step(carry, until)
  np.testing.assert_array_equal(carry["written"], whole)


@pytest.mark.parametrize("form", ["gpt2", "t5"])
def test_the_repetition_penalty_counts_what_the_decoder_has_read(form, one_device):
  """A penalty that rules out all that was read: no token twice, and a GPT writes none of its prompt."""
  model, params, prompts = ready(form, 20)
  params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # logits above 0
  choice = decode.Choice(repetition_penalty=1e9)
  settings = {"room": 8, "choice": choice, "eos_id": -1, "pad_id": PAD}
  written = np.asarray(jax.jit(lambda: decode.write(model, params, prompts, jax.random.key(0), **settings))())
  for row, prompt in zip(written.tolist(), PROMPTS, strict=True):
    assert len(set(row)) == len(row)
    assert form == "t5" or not set(row) & set(prompt)


def test_an_end_that_was_read_is_not_penalised(one_device):
  """A task's prompt ends in EOS; the answer may end all the same."""
  prompt = [3, 4, 5, EOS]
  model, params, prompts = ready("gpt2", prompts=[prompt])
  params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # logits above 0
  first = {}
  for penalty in (1.0, 1e9):
    for token in prompt[:-1]:
      choice, trie = decode.Choice(repetition_penalty=penalty), decode.make_trie([[token, EOS], [EOS]], 128)
      written = decode.write(model, params, prompts, jax.random.key(0), room=2, choice=choice, trie=trie, **ENDS)
      first[penalty, token] = int(written[0, 0])
  assert any(first[1.0, token] != EOS for token in prompt[:-1])  # else the next line says nothing
  assert all(first[1e9, token] == EOS for token in prompt[:-1])


def test_only_what_the_trie_holds_is_written(one_device):
  labels = [[3, 4, EOS], [3, EOS], [5, 2, 2, EOS]]
  trie = decode.make_trie(labels, 128)
  for form in ("gpt2", "t5"):
    model, params, prompts = ready(form, prompts=[[3, 4, 2], [2], [5], [4, 4]])
    settings = {"room": 6, "choice": decode.Choice(temperature=3.0), "trie": trie, **ENDS}
    run = jax.jit(lambda key, m=model, p=params, x=prompts, s=settings: decode.write(m, p, x, key, **s))
    rows = {tuple(row) for seed in range(8) for row in np.asarray(run(jax.random.key(seed))).tolist()}
    assert rows == {(*label, *[PAD] * (6 - len(label))) for label in labels}


@pytest.mark.parametrize("labels", [[], [[]], [[3, EOS], [3, EOS, 4]]])
def test_labels_that_no_trie_can_hold_are_refused(labels):
  with pytest.raises(ValueError, match="none of which begins another"):
    decode.make_trie(labels, 8)


@pytest.mark.parametrize("settings", [{"repetition_penalty": 0.0}, {"temperature": -1.0}, {"top_k": 3}, {"top_p": 0.5}])
def test_choices_out_of_range_are_refused(settings):
  with pytest.raises(ValueError, match="got"):
    decode.check_choice(decode.Choice(**settings))
