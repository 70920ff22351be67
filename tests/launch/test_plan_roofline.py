"""The work and the least time that `lm plan` reads off a compiled program, against numbers worked out by hand."""

import numpy as np
import pytest

from launch.planning import hlo
from launch.planning.chips import Chip
from launch.planning.collectives import groups_of
from launch.planning.figures import costs
from launch.planning.kernel_bound import case_of, kernel_bound, rates
from launch.planning.liveness import kept_for_backward
from launch.planning.machines import find_machine
from launch.planning.matrix import product_of
from launch.planning.roofline import roofline
from launch.planning.work import Kernel, work_of

# A loop of three trips: a matrix product of weights that lie in on-chip memory, an update in place of a stack of what
# is kept, and an all-reduce of four devices; then the backward pass reads the stack, and a kernel is called.
PROGRAM = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%fused_update (p0: f32[3,8,128], p1: bf16[8,128], p2: s32[]) -> f32[3,8,128] {
  %p0 = f32[3,8,128]{2,1,0} parameter(0)
  %p1 = bf16[8,128]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %wide = f32[1,8,128]{2,1,0} convert(%p1)
  %zero = s32[] constant(0)
  ROOT %updated = f32[3,8,128]{2,1,0} dynamic-update-slice(%p0, %wide, %p2, %zero, /*index=4*/%zero)
}

%body (carry: (s32[], bf16[8,128], f32[3,8,128])) -> (s32[], bf16[8,128], f32[3,8,128]) {
  %carry = (s32[]{:T(128)}, bf16[8,128]{1,0}, f32[3,8,128]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %stack = f32[3,8,128]{2,1,0} get-tuple-element(%carry), index=2
  %w = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %product = bf16[8,128]{1,0:T(8,128)(2,1)} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %kept = f32[3,8,128]{2,1,0} fusion(%stack, %product, %i), kind=kLoop, calls=%fused_update
  %reduced = bf16[8,128]{1,0} all-reduce(%product), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %one = s32[] constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0}, f32[3,8,128]{2,1,0}) tuple(%next, %reduced, %kept)
}

%condition (carry.1: (s32[], bf16[8,128], f32[3,8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %carry.1 = (s32[]{:T(128)}, bf16[8,128]{1,0}, f32[3,8,128]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: bf16[8,128]) -> f32[8,8] {
  %x.1 = bf16[8,128]{1,0} parameter(0)
  %zero.1 = s32[] constant(0)
  %nothing = f32[] constant(0)
  %empty = f32[3,8,128]{2,1,0} broadcast(%nothing), dimensions={}
  %start = (s32[], bf16[8,128]{1,0}, f32[3,8,128]{2,1,0}) tuple(%zero.1, %x.1, %empty)
  %loop = (s32[], bf16[8,128]{1,0}, f32[3,8,128]{2,1,0}) while(%start), condition=%condition, body=%body
  %stacked = f32[3,8,128]{2,1,0} get-tuple-element(%loop), index=2
  %first = f32[8,128]{1,0} slice(%stacked), slice={[0:1], [0:8], [0:128]}
  %linear_scan_forward.1 = f32[8,128]{1,0} custom-call(%first, %first), custom_call_target="tpu_custom_call"
  ROOT %back = f32[8,8]{1,0} dot(%first, %linear_scan_forward.1), lhs_contracting_dims={1}, BACK
}
""".replace("BACK", 'rhs_contracting_dims={1}, metadata={op_name="transpose(jvp(f))/dot"}')
CHIP = Chip("v5e", 16, 1000.0, 2000.0, 100.0, 10.0, 1, 1, "ICI")   # of a thousand bytes and two thousand FLOPs a second


@pytest.fixture
def module():
    return hlo.parse(PROGRAM)


def named(work, name):
    return next(item for item in work.items if item.name == name)


def test_loops_are_counted_as_often_as_they_run(module):
    work = work_of(module, on_chip=True, devices=8, unknown_trips=1)
    product = named(work, "product")
    assert (product.times, product.flops) == (3, 2 * 8 * 128 * 128)
    assert not work.unknown
    assert sum(i.flops * i.times for i in work.items) == 3 * 2 * 8 * 128 * 128 + 2 * 8 * 8 * 128


def test_a_loop_whose_trips_are_computed_is_named(module):
    text = PROGRAM.replace("%limit = s32[]{:T(128)} constant(3)", "%limit = s32[]{:T(128)} parameter(1)")
    work = work_of(hlo.parse(text), on_chip=True, devices=8, unknown_trips=2.5)
    assert work.unknown == ["loop"] and named(work, "product").times == 2.5


def test_only_what_is_touched_in_the_large_memory_counts(module):
    work = work_of(module, on_chip=True, devices=8, unknown_trips=1)
    x = 8 * 128 * 2
    assert named(work, "product").bytes == 2 * x                       # the weights lie on the chip
    assert named(work, "kept").bytes == x + 4 + 8 * 128 * 4            # the update, not the stack; and its index
    assert named(work, "first").bytes == 2 * 8 * 128 * 4               # what is sliced
    everywhere = work_of(module, on_chip=False, devices=8, unknown_trips=1)
    assert named(everywhere, "product").bytes == 2 * x + 128 * 128 * 2


def test_collectives_have_their_bytes_and_groups(module):
    work = work_of(module, on_chip=True, devices=8, unknown_trips=1)
    (one,) = named(work, "reduced").collectives
    assert (one.kind, one.bytes, one.groups.tolist()) == ("all-reduce", 2048, [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert one.sent == 2 * 2048 * 3 / 4
    assert one.seconds(CHIP, [0] * 8) == 3072 / 100
    # Two slices that halve each group: 2 x 1/2 of the bytes within, the half of each device beyond, there and back.
    assert one.seconds(CHIP, [0, 0, 1, 1] * 2) == max(2048 / 100, 1024 / 10)


@pytest.mark.parametrize(("text", "groups"), [
    ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]), ("replica_groups={}", [[0, 1, 2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]), ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]])])
def test_groups_are_read_in_every_form(text, groups):
    assert groups_of(text, 4).tolist() == groups


def test_a_part_of_an_asynchronous_collective_counts_once():
    """On TPUs the program repeats it where it starts, in what runs beside it, and where it ends."""
    gather = "  %g = bf16[8,128]{1,0} all-gather(%p), channel_id=3, replica_groups={{0,1}}, dimensions={0}\n"
    part = lambda name, end: (f"%{name} (p: bf16[4,128]) -> bf16[8,128] {{\n  %p = bf16[4,128]{{1,0}} parameter(0)\n"
                              f"{gather}{end}}}\n\n")
    ends = {"starts": '  ROOT %c = bf16[8,128]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveStart"\n',
            "async_collective_fusion.1": "  ROOT %c = bf16[8,128]{1,0} copy(%g)\n",
            "ends": '  ROOT %c = bf16[8,128]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveDone"\n'}
    calls = "".join(f"  %f{n} = bf16[8,128]{{1,0}} fusion(%x), kind=kCustom, calls=%{name}\n"
                    for n, name in enumerate(ends))
    text = "".join(part(*pair) for pair in ends.items()) + \
        f"ENTRY %main (x: bf16[4,128]) -> bf16[8,128] {{\n  %x = bf16[4,128]{{1,0}} parameter(0)\n{calls}" \
        "  ROOT %r = bf16[8,128]{1,0} copy(%f2)\n}\n"
    work = work_of(hlo.parse(text), on_chip=True, devices=2, unknown_trips=1)
    (one,) = [sent for item in work.items for sent in item.collectives]
    assert (one.kind, one.bytes, one.shared, one.sent) == ("all-gather", 2048, True, 1024)


def test_convolutions_count_the_places_that_meet():
    """A batch of four products written as a convolution over four places, of which each meets one; and a real one."""
    def flops(line, *shapes):
        names = "".join(f"  %{name} = {shape} parameter({n})\n" for n, (name, shape) in enumerate(shapes))
        where = hlo.parse(f"ENTRY %main (a: f32[]) -> f32[] {{\n{names}  ROOT %c = {line}\n}}\n").computations["main"]
        return product_of(where, where.root).flops

    assert flops("f32[16,64]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", ("a", "f32[16,32]{1,0}"),
                 ("b", "f32[32,64]{1,0}")) == 2 * 16 * 32 * 64
    batched = "f32[4,16,64] convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf"
    assert flops(batched, ("a", "f32[4,16,32]"), ("b", "f32[4,32,64]")) == 4 * 2 * 16 * 32 * 64
    causal = "f32[2,10,8] convolution(%a, %b), window={size=3 pad=2_0}, dim_labels=b0f_0io->b0f"
    pairs = sum(0 <= o + k - 2 < 10 for o in range(10) for k in range(3))
    assert flops(causal, ("a", "f32[2,10,5]"), ("b", "f32[3,5,8]")) == 2 * 2 * 8 * 5 * pairs


def test_what_is_kept_for_the_backward_pass(module):
    """The slice of the stack, and what the kernel made of it, are alive where the first backward product runs."""
    assert kept_for_backward(module, on_chip=True) == 2 * 8 * 128 * 4
    forward = hlo.parse(PROGRAM.replace("transpose(jvp(f))", "f"))
    assert kept_for_backward(forward, on_chip=True) == 0


def test_the_least_time_of_a_step(module):
    found = roofline(work_of(module, on_chip=True, devices=8, unknown_trips=1), CHIP, [0] * 8)
    product, kept, reduce_, first = 2 * 8 * 128 * 128 / 2000, (2048 + 4 + 4096) / 1000, 2 * 2048 / 1000, 8192 / 1000
    back = max(2 * 8 * 8 * 128 / 2000, (2 * 4096 + 256) / 1000)
    empty, loop_adds = (3 * 8 * 128 * 4 + 4) / 1000, (2 * 4 + 4) / 1000
    (kernel,) = found.kernels
    assert (kernel.name, kernel.count) == ("linear_scan_forward", 1)
    assert found.busy == pytest.approx(3 * (product + kept + reduce_ + loop_adds) + first + back + empty
                                       + kernel.seconds)
    assert found.links == {"ICI": pytest.approx(3 * 30.72)}
    assert found.overlapped == pytest.approx(max(found.busy, 92.16))
    assert found.apart == pytest.approx(found.busy + 92.16)


def test_kernels_are_bound_by_their_own_work():
    """An eighth of the elements of the full-size case has an eighth of its work."""
    from pallas_kernels.aot.bound import bound
    from pallas_kernels.aot.targets import TARGETS
    case, direction = case_of("wkv4_backward")
    assert (case.name, direction) == ("wkv4", "backward")
    row = hlo.arrays("bf16[1,1024,2048]")[0]
    chip = find_machine("v5e-1").chip
    found = kernel_bound(Kernel("wkv4_backward", (row, row), (row, row, row), {}), chip)
    least = bound(case.work["backward"], TARGETS["v5e"], {"VALU": 4, "EUP": 1})
    assert case.elements == 8 * row.elements
    assert found.parts["vector"] == pytest.approx(least.parts["vector"] / TARGETS["v5e"].clock / 8)
    assert found.parts["bytes"] == 5 * row.bytes / chip.bandwidth
    assert found.seconds == max(found.parts.values())
    assert not kernel_bound(Kernel("someone_elses", (row,), (row,), {"flops": 10}), chip).known
    assert rates(find_machine("v6e-1").chip) == (0.0, 0.0)    # no published clock


def test_costs_of_a_run():
    """Half of the peak of four chips for a second a step; 3,600 steps are an hour of four chips."""
    machine = find_machine("v5e-4")
    found = costs(1.0, machine, tokens=1000, flops=2 * 197e12, steps=3600)
    assert found == dict(seconds=1.0, mfu=0.5, tokens_per_second=1000, days=1 / 24, chip_hours=4)


def test_shapes_are_read_with_their_tiles_and_spaces():
    one, two = hlo.arrays("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=5*/f8e4m3fn[3]{0})")
    assert (one.bytes, one.space, two.bytes, two.space) == (2048, 1, 3, 0)
    assert np.prod(hlo.arrays("pred[]")[0].dims) == 1
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")


def test_what_hosts_send_between_slices_goes_over_the_network():
    line = ('  %send.1 = (f32[256]{0}, u32[], token[]) send(%x, %after), channel_id=4, is_host_transfer=true, '
            'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}\n')
    text = ("ENTRY %main (x: f32[256]) -> f32[256] {\n  %x = f32[256]{0} parameter(0)\n  %after = token[] "
            f"after-all()\n{line}  ROOT %y = f32[256]{{0}} copy(%x)\n}}\n")
    work = work_of(hlo.parse(text), on_chip=True, devices=8, unknown_trips=1)
    (one,) = [sent for item in work.items for sent in item.collectives]
    assert (one.kind, one.groups.shape, one.sent) == ("all-reduce", (1, 2), 1024)
    found = roofline(work, CHIP, [0] * 4 + [1] * 4)
    assert found.links == {"DCN": 1024 / 10}
    with pytest.raises(ValueError, match="v4 between slices is not published"):
        roofline(work, find_machine("v4-8").chip, [0] * 4 + [1] * 4)


def test_kernels_of_gpus_have_the_name_in_their_metadata():
    """A call that is one of several of a direction is bound by its bytes alone, of a table by the rows it may read."""
    shapes = ("s32[512,128]{1,0}", "f32[65536,2,512]{2,1,0}", "bf16[512,512]{1,0}")
    given = "".join(f"  %p{n} = {shape} parameter({n})\n" for n, shape in enumerate(shapes))
    text = (f"ENTRY %main (p0: f32[]) -> f32[] {{\n{given}  ROOT %mpmd_map.1 = f32[512,128]{{1,0}} custom-call("
            '%p0, %p1, %p2), custom_call_target="mosaic_gpu_v2", '
            'metadata={op_name="jit(f)/peer_experts_forward_products/mpmd_map"}\n}\n')
    work = work_of(hlo.parse(text), on_chip=False, devices=1, unknown_trips=1)
    kernel = work.items[0].kernel
    assert kernel.name == "peer_experts_forward_products"
    chip = find_machine("A100").chip
    found = kernel_bound(kernel, chip)
    assert not found.known
    rows = 512 * 128 * 512 * 4          # one vector of each chosen row, as many as the table has
    assert found.parts == {"bytes": (rows + 2 * 512 * 128 * 4 + 512 * 512 * 2) / chip.bandwidth}


def test_a_scatter_touches_the_rows_that_it_adds_to():
    """Ids and updates read, and the rows read and written: not the table."""
    text = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%fused (t: f32[1000,16], i: s32[4,1], u: f32[4,16]) -> f32[1000,16] {
  %t = f32[1000,16]{1,0} parameter(0)
  %i = s32[4,1]{1,0} parameter(1)
  %u = f32[4,16]{1,0} parameter(2)
  ROOT %r = f32[1000,16]{1,0} scatter(%t, %i, %u), to_apply=%add
}

ENTRY %main (t.1: f32[1000,16], i.1: s32[4,1], u.1: f32[4,16]) -> f32[1000,16] {
  %t.1 = f32[1000,16]{1,0} parameter(0)
  %i.1 = s32[4,1]{1,0} parameter(1)
  %u.1 = f32[4,16]{1,0} parameter(2)
  ROOT %f = f32[1000,16]{1,0} fusion(%t.1, %i.1, %u.1), kind=kCustom, calls=%fused
}
"""
    (item,) = work_of(hlo.parse(text), on_chip=True, devices=1, unknown_trips=1).items
    assert item.bytes == 4 * 4 + 3 * 4 * 16 * 4
