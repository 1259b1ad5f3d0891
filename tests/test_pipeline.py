"""The stream: exact state, asked shares, every example once a pass, packing that fits."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.base import get_config
from data.components import cut_documents
from data.mixture import mixing_rate, mixture_shares
from data.objectives import OBJECTIVES
from data.pipeline import build_stream, held_out_batches
from data.sources import texts_of
from data.tasks import load_domain
from data.tokenizer import byte_tokenizer, load_tokenizer, train_tokenizer
from train.stage import check_same_input


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
  """A small domain: 60 documents, two tasks of 40 and 20 rows."""
  folder = tmp_path_factory.mktemp("domain")
  rng = np.random.default_rng(0)

  def text(words: int) -> str:
    return " ".join("".join(map(chr, rng.integers(97, 123, rng.integers(2, 7)))) for _ in range(words))

  write(folder / "corpus.jsonl", [{"text": text(int(rng.integers(3, 40)))} for _ in range(60)])
  tasks = {"kinds": {"kind": "classification", "labels": ["yes", "no"]}, "words": {"kind": "generation"}}
  (folder / "tasks.json").write_text(json.dumps(tasks))
  for name, count in (("kinds", 40), ("words", 20)):
    for split in ("train", "test"):
      rows = [{"input": text(4), "target": ("yes", "no")[i % 2] if name == "kinds" else text(3)} for i in range(count)]
      write(folder / name / f"{split}.jsonl", rows)
  return load_domain(folder)


def write(path, rows):
  path.parent.mkdir(exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(architecture="gpt", mixture=None, **data):
  config = get_config()
  config.architecture = architecture
  with config.unlocked():
    config.data.mixture = mixture or {"domain": 0.3, "tasks": 0.7}
  config.data.update({"encoder_length": 96, "decoder_length": 96, "batch_size": 4, "objective": "next_token", **data})
  return config


def stream_of(domain, *args, **data):
  return build_stream(config_of(*args, **data), byte_tokenizer(), domain, None, {})


def same(a, b) -> bool:
  return a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


@pytest.mark.parametrize("architecture", ["gpt", "t5"])
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_restored_at_any_point_it_gives_the_same_batches(domain, architecture, objective):
  straight = stream_of(domain, architecture, objective=objective)
  states, batches = [], []
  for _ in range(30):  # several passes over the tasks
    states.append(json.loads(json.dumps(straight.state())))
    batches.append(next(straight))
  assert any(state["pending"] for state in states)
  for at in (0, 1, 13, 29):
    resumed = stream_of(domain, architecture, objective=objective)
    resumed.restore(states[at])
    assert all(same(next(resumed), batch) for batch in batches[at:])
    assert resumed.state() == straight.state()


def test_every_example_once_a_pass(domain):
  stream = stream_of(domain, mixture={"words": 1.0}, packing=False, batch_size=5)
  for _ in range(3):
    seen = [tuple(row) for _ in range(4) for row in next(stream)["decoder_target_tokens"].tolist()]
    assert len(set(seen)) == 20
  assert stream.summary(stream.state())["words"]["passes"] == 3


def test_order_differs_between_passes_and_seeds(domain):
  stream = stream_of(domain, mixture={"words": 1.0}, packing=False, batch_size=20)
  first, second = next(stream), next(stream)
  assert not same(first, second)
  assert sorted(map(tuple, first["decoder_target_tokens"])) == sorted(map(tuple, second["decoder_target_tokens"]))
  config = config_of(mixture={"words": 1.0}, packing=False, batch_size=20)
  config.seed = 1
  assert not same(first, next(build_stream(config, byte_tokenizer(), domain, None, {})))


def test_hidden_spans_differ_between_passes(domain):
  stream = stream_of(domain, "t5", {"domain": 1.0}, packing=False, batch_size=1, objective="span_corruption")
  pieces = stream._components[0].size
  inputs = [tuple(next(stream)["encoder_input_tokens"][0].tolist()) for _ in range(2 * pieces)]
  assert len(set(inputs[:pieces]) & set(inputs[pieces:])) < pieces / 2


def test_shares_are_achieved(domain):
  stream = stream_of(domain, mixture={"domain": 0.5, "kinds": 0.3, "words": 0.2})
  for _ in range(150):
    next(stream)
  summary = stream.summary(stream.state())
  total = sum(summary[name]["examples"] for name in stream.task_names)
  for name, share in (("domain", 0.5), ("kinds", 0.3), ("words", 0.2)):
    assert summary[name]["asked"] == pytest.approx(share)
    assert summary[name]["examples"] / total == pytest.approx(share, abs=0.02)
  assert summary["packing"]["efficiency"] > 0.9


@pytest.mark.parametrize("packing", [True, False])
def test_task_normalisation_gives_each_its_share_of_the_loss(domain, packing):
  """By a factor of each source alone, the same in packed rows as in rows of one example."""
  shares, got = {"domain": 0.5, "kinds": 0.3, "words": 0.2}, {}
  for kind in ("token", "task"):
    stream = stream_of(domain, "t5", shares, packing=packing, objective="span_corruption", loss_normalisation=kind)
    batches = [next(stream) for _ in range(150 if packing else 400)]
    sums = [sum((b["decoder_loss_weights"] * (b["task_ids"] == n)).sum() for b in batches) for n in range(3)]
    got[kind] = {name: weight / sum(sums) for name, weight in zip(stream.task_names, sums, strict=True)}
  assert got["token"]["kinds"] < 0.1  # a label is short
  assert got["task"] == pytest.approx(shares, abs=0.025)
  for batch in batches[:5]:
    for number, usual in enumerate(stream._usual):
      weights = batch["decoder_loss_weights"][batch["task_ids"] == number]
      assert (weights == np.float32(1 / usual)).all()
  again = stream_of(domain, "t5", shares, packing=packing, objective="span_corruption", loss_normalisation="task")
  assert again._usual == stream._usual and again._usual[1] == pytest.approx(3.5)  # "yes", "no", and EOS


def test_tasks_share_is_split_by_size(domain):
  split = mixture_shares(config_of(mixture={"tasks": 0.6}), domain.tasks, {})
  assert {name: share[0] for name, share in split.items()} == pytest.approx({"kinds": 0.4, "words": 0.2})
  capped = mixture_shares(config_of(mixture={"tasks": [1.0, 0.5]}, task_limit=20), domain.tasks, {})
  assert capped == {"kinds": (0.5, 0.25), "words": (0.5, 0.25)}


def test_a_share_of_tasks_that_no_task_gets_is_refused(domain):
  named = {"kinds": 0.3, "words": 0.2, "tasks": 0.5}
  with pytest.raises(ValueError, match=r"mixture.tasks is 0.5, but all of \['kinds', 'words'\] are named themselves"):
    mixture_shares(config_of(mixture=named), domain.tasks, {})
  assert set(mixture_shares(config_of(mixture=named | {"tasks": 0}), domain.tasks, {})) == {"kinds", "words"}


@pytest.mark.parametrize(
  ("settings", "rate"),
  [({}, 3), ({"scale": 27}, 81), ({"scale": 27, "temperature": 2.0}, 9.0)]
  + [({"scale": 27, "temperature": 0.5, "limit": 50.5}, 2550.25)],
)
def test_mixing_rate_vectors(settings, rate):
  assert mixing_rate(3, **settings) == pytest.approx(rate)


@pytest.mark.parametrize("architecture", ["gpt", "t5"])
def test_loss_falls_on_targets_only_and_segments_do_not_overlap(domain, architecture):
  batch = next(stream_of(domain, architecture))
  assert ((batch["decoder_loss_weights"] > 0) <= (batch["decoder_segment_ids"] > 0)).all()
  assert ((batch["task_ids"] >= 0) == (batch["decoder_segment_ids"] > 0)).all()
  steps = np.diff(batch["decoder_segment_ids"], axis=1)
  assert ((steps >= 0) | (batch["decoder_segment_ids"][:, 1:] == 0)).all()


def test_overlong_examples_are_refused_skipped_or_truncated(domain):
  with pytest.raises(ValueError, match=r"words/train.jsonl:\d+: the example has .*raise data.encoder_length"):
    stream_of(domain, mixture={"words": 1.0}, decoder_length=40)
  skipped = stream_of(domain, mixture={"words": 1.0}, decoder_length=46, overlong="skip")
  count = skipped.summary(skipped.state())["words"]["skipped"]
  assert 0 < count < 20 and f"{count} skipped" in skipped.about()[0]
  cut = stream_of(domain, mixture={"words": 1.0}, decoder_length=46, overlong="truncate")
  summary = cut.summary(cut.state())["words"]
  assert summary["truncated"] == count and "skipped" not in summary
  assert next(cut)["decoder_loss_weights"].sum() > 0


def test_long_documents_are_cut_never_cut_off():
  pieces = cut_documents([10, 3, 0, 9], 4, shortest=2)
  assert [int(end - begin) for begin, end, _ in pieces] == [4, 4, 2, 3, 4, 3, 2]
  assert pieces[:, 2].tolist() == [0, 0, 1, 1, 0, 0, 1]


@given(st.lists(st.integers(0, 200), max_size=20), st.integers(2, 70), st.integers(1, 20))
def test_pieces_cover_the_text_in_order(lengths, longest, shortest):
  pieces = cut_documents(lengths, longest, shortest)
  assert pieces[:, 0].tolist() == [0, *pieces[:-1, 1].tolist()][: len(pieces)]
  assert (pieces[-1, 1] if len(pieces) else 0) == sum(lengths)
  sizes = pieces[:, 1] - pieces[:, 0]
  assert ((sizes > 0) & (sizes <= longest)).all()
  ends = [int(end) for _, end, last in pieces if last]
  assert ends == [int(total) for total, length in zip(np.cumsum(lengths), lengths, strict=True) if length]
  cut = [size for size, end in zip(sizes, pieces[:, 1], strict=True) if int(end) in ends]
  long = [length > longest for length in lengths if length]
  assert all(size >= min(shortest, longest // 2) for size, was_cut in zip(cut, long, strict=True) if was_cut)


def test_bad_mixtures_name_what_is_known(domain):
  for mixture, message in (
    ({"wards": 1}, "'wards'.*kinds"),
    ({"kinds": -1}, "0 or more"),
    ({"kinds": [1, "x"]}, "0 or more"),
    ({"kinds": 0}, "nothing"),
    ({"kinds": 1, "genral": 0}, "genral"),
  ):
    with pytest.raises(ValueError, match=message):
      stream_of(domain, mixture=mixture)


def test_fingerprint_changes_with_what_shapes_the_stream(domain):
  plain = stream_of(domain).fingerprint()
  assert plain == stream_of(domain).fingerprint()
  for changed in (stream_of(domain, batch_size=5), stream_of(domain, "t5"), stream_of(domain, mixture={"kinds": 1})):
    assert changed.fingerprint() != plain


@pytest.mark.parametrize(("architecture", "objective"), [("gpt", "next_token"), ("t5", "span_corruption")])
def test_held_out_text_is_measured_whole_and_the_same_way(domain, architecture, objective):
  config = config_of(architecture, objective=objective)
  batches, size, _ = held_out_batches(domain.corpus_test, byte_tokenizer(), config)
  again, *_ = held_out_batches(domain.corpus_test, byte_tokenizer(), config)
  assert all(same(a, b) for a, b in zip(batches, again, strict=True))
  hidden = sum(len(text) for text in domain.corpus_test)
  assert size == hidden if objective == "next_token" else 0.1 * hidden < size < 0.3 * hidden


@pytest.mark.parametrize(("architecture", "lengths"), [("gpt", (0, 1024)), ("t5", (512, 114))])
def test_real_mixture_packs_tightly(shared, architecture, lengths):
  sizes = {"encoder_length": lengths[0], "decoder_length": lengths[1], "batch_size": 16, "objective": "span_corruption"}
  config = config_of(architecture, {"tasks": 0.9, "domain": 0.1}, overlong="truncate", **sizes)
  tokenizer = load_tokenizer(str(shared / "tokenizers" / "sentencepiece-c4-32k"))
  stream = build_stream(config, tokenizer, load_domain(shared / "data" / "medical"), None, {})
  batches = [next(stream) for _ in range(40)]
  side = "encoder" if architecture == "t5" else "decoder"
  assert np.mean([batch[f"{side}_segment_ids"] > 0 for batch in batches]) > 0.95


def test_shares_of_supervised_tokens_are_exact(domain):
  asked = {"domain": 0.2, "kinds": 0.5, "words": 0.3}
  stream = stream_of(domain, mixture=asked, mixture_unit="tokens")
  for _ in range(100):
    next(stream)
  summary = stream.summary(stream.state())
  total = sum(summary[name]["supervised_tokens"] for name in asked)
  waiting = sum(len(example.targets) for example in stream._pending.values())
  for name, share in asked.items():
    assert summary[name]["asked"] == pytest.approx(share)
    assert abs(summary[name]["supervised_tokens"] - share * total) <= waiting + 96


def test_a_share_may_change_over_the_stage(domain):
  config = config_of(mixture={"domain": [0.6, 0.0], "words": [0.4, 1.0]})
  config.train.steps = 60
  stream = build_stream(config, byte_tokenizer(), domain, None, {})
  drawn = []
  for _ in range(60):
    next(stream)
    drawn.append(stream.state()["mixture"]["drawn"])
  domain_share = [np.diff([drawn[a], drawn[b]], axis=0)[0] for a, b in ((0, 20), (20, 40), (40, 59))]
  shares = [counts[0] / counts.sum() for counts in domain_share]
  assert shares == pytest.approx([0.5, 0.3, 0.1], abs=0.05)
  assert stream.summary(stream.state())["domain"]["asked"] == pytest.approx(0.3, abs=0.01)
  longer = config.copy_and_resolve_references()
  longer.train.steps = 61
  assert build_stream(longer, byte_tokenizer(), domain, None, {}).fingerprint() != stream.fingerprint()


def test_what_was_asked_is_weighed_as_what_was_achieved(domain):
  config = config_of(mixture={"domain": [0.9, 0.1], "words": [0.1, 0.9]})
  config.train.steps = 400
  stream = build_stream(config, byte_tokenizer(), domain, None, {})
  for _ in range(400):
    next(stream)
  asked, achieved = stream.shares(stream.state()).values()
  assert asked["domain"] < 0.49  # batches of short examples hold more of them; a mean over the steps would be 0.5
  assert achieved == pytest.approx(asked, abs=0.005)
  other = build_stream(config, byte_tokenizer(), domain, None, {})
  other.restore(stream.state())
  assert other.shares(other.state()) == stream.shares(stream.state())


@pytest.mark.parametrize(
  ("mixture", "data", "message"),
  [
    ({"domain": [1.0, 0.0]}, {}, "shares are all 0 at step 9"),
    ({"domain": [1, 0, 0], "words": [0, 0, 1]}, {}, "shares are all 0 at step"),
    ({"tasks": 1}, {"task_temperature": 0.0}, "task_temperature above 0"),
    ({"tasks": 1}, {"task_temperature": 1e-3}, "too near 0"),
    ({"tasks": 1}, {"task_limit": -5}, "task_limit must be 0"),
  ],
)
def test_mixtures_that_cannot_be_are_refused_before_the_first_step(domain, mixture, data, message):
  config = config_of(mixture=mixture)
  config.data.update(data)
  config.train.steps = 10 if len(mixture) == 1 else 11
  with pytest.raises(ValueError, match=message):
    build_stream(config, byte_tokenizer(), domain, None, {})


@pytest.mark.parametrize("architecture", ["gpt", "t5"])
def test_rows_of_held_out_text_do_not_depend_on_the_batch(domain, architecture):
  config = config_of(architecture, objective="span_corruption")
  texts = texts_of([text for text in domain.corpus_test for _ in range(9)])
  found = []
  for rows in (3, 8, 64):
    batches, *_ = held_out_batches(texts, byte_tokenizer(), config, rows)
    assert {len(batch["decoder_target_tokens"]) for batch in batches} == {rows}
    whole = np.concatenate([batch["decoder_target_tokens"] for batch in batches])
    found.append(whole[(whole > 0).any(axis=1)])
  assert len(found[0]) > 3
  for other in found[1:]:
    np.testing.assert_array_equal(found[0], other)


def test_the_order_of_tasks_shapes_the_stream(domain):
  turned = dataclasses.replace(domain, tasks=dict(reversed(domain.tasks.items())))
  here, there = (stream_of(some, mixture={"tasks": 1.0}).fingerprint() for some in (domain, turned))
  assert len(domain.tasks) > 1 and here["order"] == there["order"][::-1]
  with pytest.raises(ValueError, match="order: "):
    check_same_input(here, there, Path("checkpoints"))
  check_same_input({key: value for key, value in here.items() if key != "order"}, there, Path("checkpoints"))


def test_spans_without_sentinels_are_refused_before_a_run(domain):
  config = config_of("gpt", {"domain": 1}, objective="fill_in_the_middle")
  none = train_tokenizer(list(domain.corpus), 300, sentinels=0)
  with pytest.raises(ValueError, match="'fill_in_the_middle' puts sentinel tokens.*config.tokenizer.sentinels"):
    build_stream(config, none, domain, None, {})
  config.data.objective = "next_token"
  build_stream(config, none, domain, None, {})
