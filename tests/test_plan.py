"""Planning: formulas by hand, candidates, the search, users' mistakes; with libtpu, the real step on four chips."""

import importlib.util
import json
import math
import types

import jax
import pytest

from configs.base import get_config
from models.sharding import make_mesh
from scripts import flags
from scripts import plan as verb
from tests.conftest import small_model
from train import plan, plan_report, plan_search, programs
from train.chips import CHIPS
from train.compiler import temporary_bytes
from train.estimate import Estimate
from train.flops import attention_pairs, matrix_parameters, model_flops
from train.plan_search import Candidate, Trial

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
SMALL = {
  "gpt": {"layers": 1, "embed_dim": 256, "heads": 2, "kv_heads": 2, "head_dim": 128, "mlp_dim": 512},
  "t5": {"encoder_layers": 1, "decoder_layers": 1, "embed_dim": 256, "heads": 2, "head_dim": 128, "mlp_dim": 512},
}


def small_config(architecture: str = "gpt", **fields):
  """A config that compiles in seconds: one layer, four chips of fsdp, eight rows of 128."""
  config = get_config()
  config.architecture, config.model.dtype = architecture, "bfloat16"
  config.mesh.update({"data": 1, "fsdp": 4})
  config.data.update({"batch_size": 8, "encoder_length": 128, "decoder_length": 128})
  with config.unlocked():
    config.model.overrides = {**SMALL[architecture], **fields}
  return config.lock()


def made_plan(mid: float = 2.0, total: int = 1) -> plan.Plan:
  """A plan of a thousand tokens a step on ten chips."""
  numbers = dict.fromkeys(Estimate._fields, 0.0) | {"cyc": 2 * mid, "mid": mid, "roof": mid / 2, "flops": 4e9}
  estimate = Estimate(**numbers | {"collectives": {("all-gather", "exposed"): (3, 2.0**30, 0.5)}, "unknown": {"x": 2}})
  return plan.Plan(
    topology="v5e:2x5",
    chips=10,
    mesh={"data": 2, "fsdp": 5, "tensor": 1},
    architecture="gpt",
    size="tiny",
    dtype="bfloat16",
    optimizer="adamw",
    remat="full",
    attention="xla",
    rows=10,
    tokens=1000,
    parameters=7,
    memory=plan.Memory(total, 0, 0, 0, 0, 0, 16 * plan.GIB),
    model_flops=int(2e10),
    peak=1e9,
    estimate=estimate,
    compile_seconds=0.0,
  )


def test_memory_of_a_tpu_program_is_what_it_needs_at_the_worst_moment():
  """MaxText's llama2-7b on v6e, in MiB: temporaries add up to more than the chip's 32 GiB, and it fits."""
  stats = types.SimpleNamespace(argument_size_in_bytes=310, output_size_in_bytes=300, alias_size_in_bytes=299)
  stats.temp_size_in_bytes, stats.peak_memory_in_bytes = 35_932, 23_757
  assert temporary_bytes(stats, "tpu") == 23_757 - 310 - 1
  assert temporary_bytes(stats, "cpu") == 35_932  # whose peak leaves them out


def test_flops_of_a_gpt_by_hand():
  model = small_model("gpt-grouped")  # 2 layers, D 32, 4 heads of 8 on 2 kv heads, F 64, untied
  params = jax.eval_shape(model.init, jax.random.key(0))
  layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
  assert matrix_parameters(model, params) == {"encoder": 0, "decoder": 2 * layer + 100 * 32}
  pairs = 2 * (10 * 11 // 2)
  assert model_flops(model, params, 3, 0, 10) == 6 * (2 * layer + 3200) * 30 + 12 * 4 * 8 * 3 * pairs


def test_a_tied_head_counts_like_an_untied_one():
  tied, untied = (small_model("gpt", tied=tied) for tied in (True, False))
  counts = [matrix_parameters(model, jax.eval_shape(model.init, jax.random.key(0))) for model in (tied, untied)]
  assert counts[0] == counts[1]


def test_windows_see_fewer_pairs():
  assert attention_pairs(small_model("gpt"), 0, 5) == (2 * 15, 2 * 25)
  assert attention_pairs(small_model("mistral"), 0, 5) == (2 * (1 + 2 + 3 + 3 + 3), 2 * 25)  # window 3, both layers
  assert attention_pairs(small_model("gemma3"), 0, 5)[0] == 12 + 15  # one layer of each
  assert attention_pairs(small_model("mistral"), 0, 2)[0] == 2 * 3  # rows shorter than the window


def test_flops_of_a_t5_by_hand():
  model = small_model("t5")  # 2 + 2 layers, D 32, 4 heads of 8, F 64
  params = jax.eval_shape(model.init, jax.random.key(0))
  attention, mlp = 4 * 32 * 32, 3 * 32 * 64
  encoder = 2 * (attention + mlp) + 2 * 2 * 32 * 32  # and the decoder's cross keys and values
  decoder = 2 * (attention + mlp) + 2 * 2 * 32 * 32 + 100 * 32
  assert matrix_parameters(model, params) == {"encoder": encoder, "decoder": decoder}
  assert attention_pairs(model, 6, 4) == (2 * 36 + 2 * 10 + 2 * 24, 2 * 36 + 2 * 16 + 2 * 24)
  expected = 6 * (encoder * 18 + decoder * 12) + 12 * 32 * 3 * (2 * 36 + 2 * 10 + 2 * 24)
  assert model_flops(model, params, 3, 6, 4) == expected


@pytest.mark.parametrize(
  ("name", "says"),
  [("v5e", "CHIP:SIDExSIDE"), ("v5e:16", "CHIP:SIDExSIDE"), ("v9:2x2", "v4, v5e, v5p, v6e"), ("h100:8", "only TPU")],
)
def test_bad_topologies_say_what_is_expected(name, says):
  with pytest.raises(ValueError, match=says):
    plan.open_topology(name)


def test_a_missing_libtpu_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'argot\[plan\]'"):
    plan.open_topology("v5e:2x2")


def test_a_batch_that_does_not_divide_says_what_would():
  config = small_config()
  config.data.batch_size, config.train.accumulation_steps = 10, 3
  mesh = make_mesh(config.mesh, jax.devices()[:4])
  with pytest.raises(ValueError, match="is 10: expected a multiple of 12.*batch_size=12"):
    programs.batch_like(config, plan.vocabulary(config), mesh)


@pytest.mark.parametrize("architecture", ["gpt", "t5"])
def test_planned_batches_have_the_form_of_real_ones(architecture):
  config = small_config(architecture)
  like = programs.batch_like(config, plan.vocabulary(config), make_mesh(config.mesh, jax.devices()[:4]))
  assert like["decoder_loss_weights"].shape == (8, 128) and ("encoder_positions" in like) == (architecture == "t5")
  assert plan.bytes_of(like) == len(like) * 2 * 128 * 4  # two rows on each of four devices


def test_a_tokenizer_still_to_be_trained_has_its_size():
  config = small_config()
  config.tokenizer.path, config.tokenizer.vocab_size = "train", 777
  assert plan.vocabulary(config).vocab_size == 777


def test_runs_are_steps_times_estimates():
  found = plan_report.run_of(made_plan(mid=2.0), "mid", 43_200)
  assert found == {
    "step_seconds": 2.0,
    "mfu": pytest.approx(1.0),
    "tokens_per_second": 500.0,
    "days": 1.0,
    "chip_hours": 240.0,
  }
  config = get_config()
  assert plan_report.planned_steps(config, made_plan(), 0) == config.train.steps
  assert plan_report.planned_steps(config, made_plan(), 2001) == 3


def test_tables_name_estimates_and_what_is_not_priced():
  text = "\n".join(plan_report.lines(made_plan(), 10))
  for part in ("ESTIMATES, nothing ran", "NOT PRICED, 2 ×: x", "all-gather", "1.000 GiB", "10 steps, 10,000 tokens"):
    assert part in text
  assert "fits" in text and "DOES NOT FIT" in "\n".join(plan_report.lines(made_plan(total=17 * plan.GIB), 1))
  json.dumps(plan_report.as_dict(made_plan(), 10))


def test_candidates_fit_divide_and_start_from_the_most_rows():
  config = small_config(layers=4)
  shapes = plan_search.shapes_of(config)
  lines, left_out = plan_search.candidates(shapes, CHIPS["v5e"], 4, [1, 8, 1 << 20], {"model.remat": ["full", "none"]})
  assert all([setting.rows for setting in line] == [8, 1] for line in lines)
  assert left_out == len(lines)  # a million rows a chip: the layers' inputs alone are more than 16 GiB
  found = {line[0].mesh for line in lines}
  assert (1, 4, 1, 1) in found and (2, 1, 1, 2) in found and not any(mesh[3] == 4 for mesh in found)  # two heads


def test_the_lower_bound_grows_with_rows_and_shrinks_with_fsdp():
  shapes = plan_search.shapes_of(small_config())

  def least(fsdp: int, rows: int, remat: str = "full") -> int:
    return plan_search.least_bytes(shapes, Candidate((1, fsdp, 1, 1), rows, (("model.remat", remat),)))

  state = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.params)) * 4 * 3  # parameters, two moments
  assert state < least(1, 1) < 2 * state
  assert least(4, 1) < least(1, 1) and least(1, 1 << 16) > 2 * least(1, 1 << 14)
  assert least(1, 1 << 16, "none") > least(1, 1 << 16)
  by_name = [least(1, 1 << 16, remat) for remat in ("full", "key", "qkv", "qkv+attention", "qkv+attention+gate")]
  assert by_name == sorted(set(by_name))


def test_the_lower_bound_is_of_what_is_trained_and_of_a_microbatch():
  config, setting = small_config(), Candidate((1, 1, 1, 1), 8, (("model.remat", "full"),))
  whole = plan_search.least_bytes(plan_search.shapes_of(config), setting)
  with config.unlocked():
    config.lora.rank = 2
  shapes = plan_search.shapes_of(config)
  assert plan_search.least_bytes(shapes, setting) < whole
  with config.unlocked():
    config.lora.rank, config.optimizer.schedule, config.optimizer.decay_steps = 0, "wsd", 10
    config.train.steps = 1000  # of which a schedule may need to know
  long = setting._replace(rows=1 << 16)
  by_steps = {}
  for steps in (1, 8):
    config.train.accumulation_steps = steps
    by_steps[steps] = plan_search.least_bytes(plan_search.shapes_of(config), long)
  varied = long._replace(varied=(("model.remat", "full"), ("train.accumulation_steps", 8)))
  config.train.accumulation_steps = 1
  assert by_steps[8] < by_steps[1] / 4
  assert plan_search.least_bytes(plan_search.shapes_of(config), varied) == by_steps[8]


def test_a_search_takes_the_most_rows_that_fit_and_ranks_by_token():
  def line(fsdp: int) -> list[Candidate]:
    return [Candidate((1, fsdp, 1, 1), rows, ()) for rows in (8, 4, 2)]

  def run(candidate: Candidate, seconds: float) -> Trial:
    tried.append((candidate.mesh[1], candidate.rows))
    fits = candidate.rows <= 4
    return Trial(candidate, made_plan(mid=candidate.mesh[1]) if fits else None, "" if fits else "too much")

  tried, said = [], []
  found = plan_search.search([line(3), line(2)], run, 60, said.append)
  assert tried == [(3, 8), (3, 4), (2, 8), (2, 4)]
  assert [trial.candidate.mesh[1] for trial in found[:2]] == [2, 3] and found[-1].plan is None
  assert "too much" in said[0] and "MFU" in said[1] and "s left" in said[1]


@pytest.mark.parametrize(("stop", "says"), [(KeyboardInterrupt, "stopped"), (TimeoutError, "are over")])
def test_a_search_that_is_stopped_keeps_what_it_has(stop, says):
  def run(candidate: Candidate, seconds: float) -> Trial:
    if candidate.mesh[1] == 2:
      raise stop
    return Trial(candidate, made_plan())

  said = []
  found = plan_search.search([[Candidate((1, n, 1, 1), 1, ())] for n in (1, 2, 3)], run, 60, said.append)
  assert len(found) == 1 and says in said[-1]


def test_a_compiling_process_that_ends_is_a_reason_and_not_the_end():
  with plan_search.compiler(small_config(), "v5e:3x3") as run:  # no such shape: the process fails at once
    found = [run(Candidate((1, 4, 1, 1), rows, ()), 120) for rows in (2, 1)]
  assert [trial.reason for trial in found] == ["the compiling process ended with exit code 1"] * 2
  assert all(trial.plan is None for trial in found)


def test_the_best_setting_comes_back_through_the_command_line(tmp_path):
  setting = Candidate((2, 4, 1, 1), 4, (("model.remat", "full"), ("model.scan_unroll", 2)))
  lines = plan_search.flag_lines(setting).split()
  values = flags.new()
  flags.config(values)
  config = flags.parse(values, "train", "", ["--config=configs/base.py", *lines], []).config
  assert config == setting.apply(get_config())
  assert config.mesh.to_dict() == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1, "slices": 0}
  assert (config.data.batch_size, config.model.remat, config.model.scan_unroll) == (32, "full", 2)


@pytest.mark.parametrize("text", ["model.remats=full", "model.remat", "model=1", "model.scan_unroll=two"])
def test_what_cannot_be_varied_is_refused(text):
  with pytest.raises(ValueError, match="--vary="):
    plan_search.parse_vary(text, get_config())


@pytest.mark.parametrize("arguments", [["--apply=x"], ["--rows=2"], ["--search", "--hlo=x"], ["--search", "--rows=0"]])
def test_flags_that_would_be_ignored_are_refused(arguments):
  with pytest.raises(ValueError, match="--(apply|rows|hlo)"):
    verb.main(["--config=configs/base.py", "--topology=v5e:2x2", *arguments])


@needs_libtpu
@pytest.mark.parametrize(
  # "xla" computes all pairs, more than the formula counts; the kernel only those that may be seen.
  ("architecture", "attention", "least"),
  [("gpt", "xla", 0.98), ("t5", "xla", 0.98), ("gpt", "splash", 0.93)],
)
def test_the_real_step_on_four_chips(architecture, attention, least, tmp_path):
  config = small_config(architecture)
  config.model.attention = attention
  found = plan.plan(config, plan.open_topology("v5e:2x2"), str(tmp_path / "program.txt"))
  assert (tmp_path / "program.txt").read_text().startswith("HloModule jit_step")
  assert found.tokens == 8 * (256 if architecture == "t5" else 128) and found.chips == 4
  # Everything the formula counts is in the program, and nothing is computed again.
  assert least < found.estimate.flops / (found.model_flops / 4) < 1.3
  assert found.memory.optimizer == pytest.approx(2 * found.memory.params, rel=0.02)  # AdamW
  bound = plan_search.least_bytes(plan_search.shapes_of(config), Candidate((1, 4, 1, 1), 2, ()))
  assert bound <= found.memory.total < plan.GIB
  gathered = sum(size for (kind, _), (_, size, _) in found.estimate.collectives.items() if kind == "all-gather")
  assert gathered >= 2 * found.parameters  # each weight at least once, in bfloat16
  assert 0 < found.estimate.roof <= found.estimate.mid <= found.estimate.cyc and not found.estimate.unknown


@needs_libtpu
def test_a_step_that_does_not_fit_says_so():
  config = small_config()
  config.data.batch_size = 1 << 20
  with pytest.raises(plan.DoesNotFit, match=r"does not fit in a chip of v5e:2x2: the compiler needs .*iB of 15.*iB"):
    plan.plan(config, plan.open_topology("v5e:2x2"))


@needs_libtpu
def test_shapes_that_libtpu_has_not_are_refused():
  with pytest.raises(ValueError, match="v5e:3x3: .*expected CHIP:SIDExSIDE"):
    plan.open_topology("v5e:3x3")


def test_a_program_that_jax_cannot_read_is_a_clear_error():
  class Unreadable:
    def as_text(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nmore")

  with pytest.raises(ValueError, match="cannot read the program .*INTERNAL: RET_CHECK failure.*newer jax"):
    plan.program_text(Unreadable())
