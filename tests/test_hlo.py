"""The reader of optimised programs and the estimates, on a module small enough to check by hand."""

import pytest

from train import hlo
from train.chips import CHIPS, Chip
from train.estimate import KERNEL_SHARE, Torus, estimate

# A loop of 4 rounds (0, 2, 4, 6 below 8), each with a product, a gather begun before it and ended after it, and a
# product that carries a slice of the gather; then a reduce-scatter in a fusion, an all-reduce, an update in place, a
# kernel, and a batched product in the form of a convolution.
TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[64,128]{1,0:T(8,128)})->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%product (p: bf16[64,128], q: bf16[128,256]) -> bf16[64,256] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %dot.1 = bf16[64,256]{1,0:T(8,128)(2,1)} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%started (s: bf16[32,256]) -> (bf16[32,256], bf16[128,256]) {
  %s = bf16[32,256]{1,0} parameter(0)
  %all-gather.1 = bf16[128,256]{1,0} all-gather(%s), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %both = (bf16[32,256]{1,0}, bf16[128,256]{1,0}) tuple(%s, %all-gather.1)
}

%all-reduce-scatter.1 (g: f32[64,128]) -> f32[16,128] {
  %g = f32[64,128]{1,0} parameter(0)
  %all-reduce.2 = f32[64,128]{1,0} all-reduce(%g), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[16,128]{1,0} dynamic-slice(%all-reduce.2, %zero, %zero), dynamic_slice_sizes={16,128}
}

%updated (a: f32[1024,128], b: f32[8,128]) -> f32[1024,128] {
  %a = f32[1024,128]{1,0} parameter(0)
  %b = f32[8,128]{1,0} parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %dus = f32[1024,128]{1,0} dynamic-update-slice(%a, %b, %zero.1, %zero.1)
}

%sliced (c: f32[1024,128]) -> f32[8,128] {
  %c = f32[1024,128]{1,0} parameter(0)
  %zero.2 = s32[] constant(0)
  %slice.1 = f32[8,128]{1,0} dynamic-slice(%c, %zero.2, %zero.2), dynamic_slice_sizes={8,128}
  ROOT %neg = f32[8,128]{1,0:S(1)} negate(%slice.1)
}

%condition (c.1: (s32[], bf16[64,128], bf16[32,256])) -> pred[] {
  %c.1 = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[32,256]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  %limit = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%body (b.1: (s32[], bf16[64,128], bf16[32,256])) -> (s32[], bf16[64,128], bf16[32,256]) {
  %b.1 = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[32,256]{1,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%b.1), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)S(6)} add(%i.2, %two), backend_config={"estimated_cycles":"0"}
  %p.1 = bf16[64,128]{1,0} get-tuple-element(%b.1), index=1
  %s.1 = bf16[32,256]{1,0} get-tuple-element(%b.1), index=2
  %async-collective-start = (bf16[32,256]{1,0}, bf16[128,256]{1,0}) fusion(%s.1), kind=kCustom, calls=%started
  %q.1 = bf16[128,256]{1,0:S(1)} get-tuple-element(%async-collective-start), index=1
  %fusion.1 = bf16[64,256]{1,0} fusion(%p.1, %q.1), kind=kOutput, calls=%product, estimated_cycles=30
  %async-collective-done = bf16[128,256]{1,0} fusion(%q.1), kind=kCustom, calls=%product
  ROOT %out = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[32,256]{1,0}) tuple(%next, %p.1, %s.1)
}

ENTRY %main (x0: bf16[64,128], x1: bf16[32,256], x2: f32[64,128], x3: f32[1024,128], x4: f32[8,128]) -> f32[] {
  %x0 = bf16[64,128]{1,0} parameter(0)
  %x1 = bf16[32,256]{1,0} parameter(1)
  %x2 = f32[64,128]{1,0} parameter(2)
  %x3 = f32[1024,128]{1,0} parameter(3)
  %x4 = f32[8,128]{1,0} parameter(4)
  %zero.3 = s32[]{:T(128)} constant(0)
  %tuple = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[32,256]{1,0}) tuple(%zero.3, %x0, %x1)
  %while = (s32[]{:T(128)}, bf16[64,128]{1,0}, bf16[32,256]{1,0}) while(%tuple), condition=%condition, body=%body
  %fusion.2 = f32[16,128]{1,0} fusion(%x2), kind=kCustom, calls=%all-reduce-scatter.1
  %all-reduce.3 = f32[16,128]{1,0} all-reduce(%fusion.2), channel_id=4, replica_groups=[2,2]<=[4], to_apply=%add
  %fusion.3 = f32[1024,128]{1,0} fusion(%x3, %x4), kind=kLoop, calls=%updated, backend_config={"estimated_cycles":"7"}
  %fusion.4 = f32[8,128]{1,0:S(1)} fusion(%fusion.3), kind=kLoop, calls=%sliced, backend_config={"estimated_cycles":"5"}
  %k = bf16[2,4,64,8]{3,2,1,0} bitcast(%x0)
  %splash_mha_fwd.1 = bf16[2,4,64,8]{3,2,1,0} custom-call(%k, %k, %k), custom_call_target="tpu_custom_call"
  %l = f32[4,64,128]{2,1,0:S(1)} bitcast(%x2)
  %r = f32[4,128,32]{2,1,0:S(1)} bitcast(%x3)
  ROOT %convolution.1 = f32[4,64,32]{2,1,0:S(1)} convolution(%l, %r), WINDOW, backend_config={"estimated_cycles":"11"}
}
""".replace("WINDOW", "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf")
CHIP = Chip("toy", hbm_gib=1, peak=1e9, hbm_bandwidth=1e6, link=1e6, clock=1e3, wraps=4)
LINE = Torus([(0, 0), (0, 1), (1, 0), (1, 1)], (False, False), CHIP.link)


@pytest.fixture(scope="module")
def module():
  return hlo.parse(TEXT)


def test_operations_keep_names_types_and_operands(module):
  fusion = module.computations["main"].by_name["fusion.3"]
  assert module.entry == "main" and len(module.computations) == 9
  assert (fusion.kind, fusion.operands, fusion.called(), fusion.number("estimated_cycles")) == (
    "fusion",
    ("x3", "x4"),
    "updated",
    7,
  )
  assert module.computations["main"].root.kind == "convolution"


def test_a_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("HloModule empty\n")


def test_bytes_know_narrow_types_and_memories():
  assert hlo.array_bytes("(bf16[8,128]{1,0}, pred[3], u4[6], f8e4m3fn[2], s32[], token[])") == 2048 + 3 + 3 + 2 + 4
  assert hlo.array_bytes("(f32[2]{0:T(128)S(1)}, f32[3]{0:T(128)})", hbm_only=True) == 12


def test_loops_start_step_and_end(module):
  main = module.computations["main"]
  assert hlo.trip_count(module, main, main.by_name["while"]) == 4  # 0, 2, 4, 6
  for old, new, rounds in [
    ("direction=LT", "direction=LE", 5),
    ("%two = s32[]{:T(128)} constant(2)", "%two = s32[]{:T(128)} constant(3)", 3),
    ("%zero.3 = s32[]{:T(128)} constant(0)", "%zero.3 = s32[]{:T(128)} constant(4)", 2),
    ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}', 9),
    ("direction=LT", "direction=NE", None),
  ]:
    other = hlo.parse(TEXT.replace(old, new))
    assert hlo.trip_count(other, other.computations["main"], other.computations["main"].by_name["while"]) == rounds


def test_flops_of_products_and_of_batched_ones_without_the_holes(module):
  assert hlo.matrix_flops(module, "product") == 2 * 64 * 256 * 128
  main = module.computations["main"]
  # Four products of [64,128] and [128,32]; a plain convolution of that window would have 16.
  assert hlo.op_flops(main, main.root) == 4 * 2 * 64 * 128 * 32


def test_updates_in_place_and_slices_cost_what_they_touch(module):
  main = module.computations["main"]
  assert hlo.moved_bytes(module, main, main.by_name["fusion.3"]) == 2 * 8 * 128 * 4  # reads b, writes it
  assert hlo.moved_bytes(module, main, main.by_name["fusion.4"]) == 8 * 128 * 4  # reads a slice; the result is on chip


def test_collectives_are_counted_by_kind_and_exposure():
  found = estimate(TEXT, CHIP, LINE).collectives
  gathered, scattered, reduced = 128 * 256 * 2, 64 * 128 * 4, 16 * 128 * 4
  # Two lines of two chips, one link each: 3/4 of the array over two lanes; a group of two has one lane.
  assert found == {
    ("all-gather", "overlapped"): (4, 4 * gathered, pytest.approx(4 * gathered * 0.75 / 2e6)),
    ("reduce-scatter", "exposed"): (1, scattered, pytest.approx(scattered * 0.75 / 2e6)),
    ("all-reduce", "exposed"): (1, reduced, pytest.approx(2 * reduced * 0.5 / 1e6)),
  }


def test_three_estimates_add_up():
  found = estimate(TEXT, CHIP, LINE)
  gather = 128 * 256 * 2 * 0.75 / 2e6
  assert gather < 0.030  # a product of 30 cycles hides it
  exposed = 64 * 128 * 4 * 0.75 / 2e6 + 16 * 128 * 4 / 1e6
  assert found.exposed == pytest.approx(exposed) and found.hidden == pytest.approx(4 * gather)
  assert found.matrix_cyc == pytest.approx(4 * 0.030 + 0.011)
  assert found.other_cyc == pytest.approx(0.007 + 0.005)
  kernel_flops = 2 * 2 * (2 * 4 * 64 * 8) * 64
  assert found.kernels == pytest.approx(max(kernel_flops / (1e9 * KERNEL_SHARE), 4 * 2 * 4 * 64 * 8 * 2 / 1e6))
  assert found.flops == pytest.approx(4 * 2 * 64 * 256 * 128 + 4 * 2 * 64 * 128 * 32 + kernel_flops)
  assert found.cyc == pytest.approx(found.matrix_cyc + found.other_cyc + found.kernels + exposed)
  assert found.mid == pytest.approx(
    max(found.matrix_cyc, found.matrix_roof) + min(found.other_cyc, found.other_roof / 0.8) + found.kernels + exposed
  )
  assert found.roof >= found.hbm_bytes / 1e6 and not found.unknown


def test_a_gather_that_outlasts_the_work_is_exposed_for_the_rest():
  short = TEXT.replace("estimated_cycles=30", "estimated_cycles=10")
  long, brief = estimate(TEXT, CHIP, LINE), estimate(short, CHIP, LINE)
  assert brief.exposed - long.exposed == pytest.approx(4 * (128 * 256 * 2 * 0.75 / 2e6 - 0.010))


def test_what_cannot_be_priced_is_named():
  text = TEXT.replace("splash_mha_fwd.1", "my_kernel.1").replace("direction=LT", "direction=NE")
  found = estimate(text, CHIP, LINE).unknown
  assert sum(found.values()) == 2 and any("my_kernel.1" in what for what in found)
  priced = text.replace('"tpu_custom_call"', '"tpu_custom_call", backend_config={"cost_estimate":{"flops":4096}}')
  assert not any("my_kernel" in what for what in estimate(priced, CHIP, LINE).unknown)


def test_rings_are_twice_as_fast_as_lines():
  coordinates = [(x, y) for x in range(4) for y in range(4)]
  ring, line = (Torus(coordinates, (closed, closed), 1e9) for closed in (True, False))
  assert line.seconds("all-gather", 1e9, None) == pytest.approx(2 * ring.seconds("all-gather", 1e9, None))
  along_a_side = ring.seconds("all-gather", 1e9, range(4))
  assert along_a_side == pytest.approx(0.75 / 2) and ring.seconds("all-reduce", 1e9, range(4)) == 2 * along_a_side
  assert ring.seconds("all-gather", 1e9, [3]) == 0
  assert ring.seconds("all-gather", 1e9, range(2)) == pytest.approx(0.5)  # half of a ring is a line
  # Every byte of an all-to-all goes over one link of a ring of four on average, there in two directions, on two links.
  assert ring.seconds("all-to-all", 1e9, range(4)) == pytest.approx(0.5)
  assert ring.seconds("collective-permute", 1e9, [0, 1]) == 1


def test_chips_do_their_peak_in_their_cycles():
  # FLOPs a cycle are those of whole 128 × 128 units, so the clock is right to a few parts in a thousand.
  for chip in CHIPS.values():
    units = chip.peak / chip.clock / (2 * 128 * 128)
    assert units == pytest.approx(round(units), abs=0.03)
