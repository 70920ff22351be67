"""Cycles are read right from schedules: small ones written here, in the compiler's form."""

import pytest

from pallas_kernels.aot.bound import bound
from pallas_kernels.aot.case import Work
from pallas_kernels.aot.schedule import parse, parse_utilization, read_schedules
from pallas_kernels.aot.targets import TARGETS, find_target

# Straight code, a grid of 6 steps pipelined in three stages (so 8 trips), a loop of 5 inside, another right after it
# whose bound is no constant, empty bundles that show no depth, a bundle inside with code from after the loop (it shows
# the lesser depth), and a comment over several lines.
BUNDLES = """
= control target key start
LB: loop body
     0   :  { %s1_s0 = smov 0 /* copy for cssa */ }
   0x1 LB: > { %s9_s9 = sphi %s1_s0, %s8_s8 /* phi copy :: iteration index, stage = 0 :: iteration index, stage = 1 */ }
   0x2   : > { %s7_s7 = sadd.s32 4294967294, %s9_s9 /* iteration index, stage = 2 */  ;;  %s20_s20 = smov 2 /* copy */ }
   0x3   :  {} /* End region 30 */
   0x4 LB: >> { %s21_s21 = sphi %s20_s20, %s22_s22 /* phi copy */  ;;  %s22_s22 = sadd.s32 1, %s21_s21 }
   0x5   : >> { %p1_p1 = scmp.ge.s32.totalorder %s22_s22, 7 /* loop exit test */ }
   0x6   : >> { %v1_v1 = vld [vmem:[%s1_s0] sm:$0xff] }
   0x7   : > { %s40_s40 = ssub.s32 (%p1_p1), 1, %s41_s41 }
   0x8   :  {}
   0x9   : >> { %v2_v2 = vmov %v1_v1 }
   0xa   : > { %5 = dma.vmem_to_hbm [thread:$0] /*
base_bounds: (8, 256, 16)
element_size_in_bytes: 2048 */ }
   0xb LB: >> { %p2_p2 = scmp.ge.s32.totalorder %s31_s31, %s33_s33 /* loop exit test */ }
   0xc PF: > { %s8_s8 = sadd.s32 1, %s9_s9 /* copy for cssa */ }
   0xd   : > { %p3_p3 = scmp.ge.s32.totalorder %s8_s8, 8 /* loop exit test */ }
   0xe   :  { %7 = vsyncpa [#allocation4], 1 }
"""
UTILIZATION = """== CAPACTIY:
MXU, XLU, VALU, VLOAD, VLOAD:FILL, VSTORE:SPILL, SALU
    4     3     4     3     3     1     2
== UTILIZATION:
""" + "\n".join(["0 0 0 0 0 0 1"] * 4 + ["0 0 4 0 0 0 0", "0 0 2 0 1 0 0", "0 0 0 3 0 1 0", "0 0 0 0 0 0 0"]
                + ["0 0 0 0 0 0 1"] * 7)


def test_loops_trips_and_cycles():
    schedule = parse("kernel", BUNDLES, UTILIZATION)
    rows = [(body.at, body.depth, body.bundles, body.trips, body.runs) for body in schedule.bodies]
    assert rows == [("0x0", 0, 2, 1, 1),
                    ("0x1", 1, 6, 8, 8),
                    ("0x4", 2, 6, 5, 6 * 5),          # from 2 to 7, in the 6 steps of the grid
                    ("0xb", 2, 1, None, None)]
    assert not schedule.complete
    assert schedule.cycles == 2 + 6 * 8 + 6 * 30
    assert schedule.inner.at == "0x4"


def test_trips_that_are_computed_can_be_given():
    schedule = parse("kernel", BUNDLES, UTILIZATION, unknown=9)
    assert schedule.complete and schedule.bodies[3].runs == 6 * 9 and schedule.bodies[2].trips == 5


def test_an_exit_test_may_stand_in_a_loop_inside_and_its_counter_in_memory():
    text = BUNDLES.replace("%p3_p3 = scmp.ge.s32.totalorder %s8_s8, 8 /* loop exit test */", "%p3_p3 = por %p1, %p2")
    test = "%p3_p3 = scmp.ge.s32.totalorder (%p1_p1), %s8_s8, 8 /* loop exit test */"
    text = text.replace("%v2_v2 = vmov", f"{test} ;; %v2_v2 = vmov")
    text = text.replace("%s8_s8 = sadd.s32 1, %s9_s9", "%s8_s8 = sld [smem:[#allocation3_spill]]")
    text = text.replace("%s1_s0 = smov 0", "%6 = sst [smem:[#allocation3_spill]] %s5_s5 ;; %s1_s0 = smov 0")
    text = text.replace("%7 = vsyncpa", "%s5_s5 = sadd.s32 (%p1_p1), 1, %s9_s9 ;; %7 = vsyncpa")
    assert [body.trips for body in parse("kernel", text, UTILIZATION).bodies] == [1, 8, 5, None]


def test_a_step_that_is_not_one_shortens_the_loop():
    by_two = BUNDLES.replace("%s22_s22 = sadd.s32 1, %s21_s21", "%s22_s22 = sadd.s32 2, %s21_s21")
    assert parse("kernel", by_two, UTILIZATION).bodies[2].trips == 3


def test_a_loop_whose_start_is_computed_has_unknown_trips():
    computed = BUNDLES.replace("smov 2 /* copy */", "sadd.s32 %s2, %s3")
    assert parse("kernel", computed, UTILIZATION).bodies[2].trips is None


def test_shares_and_spills_are_those_of_the_units_that_the_head_names():
    body = parse("kernel", BUNDLES, UTILIZATION).bodies[2]
    assert body.shares == {"MXU": 0, "XLU": 0, "VALU": 6 / 24, "VLOAD": 3 / 18, "SALU": 2 / 12}
    assert body.spills == 2


def test_other_versions_name_other_units():
    slots, used = parse_utilization("== CAPACITY:\nMATMUL, MATPUSH, VALU\n 4 4 2\n== UTILIZATION:\n1 0 2\n")
    assert slots == {"MATMUL": 4, "MATPUSH": 4, "VALU": 2} and used == [[1, 0, 2]]
    assert parse_utilization("") == ({}, [])


def test_files_are_found_by_the_kernels_name(tmp_path):
    for number, name in enumerate(["scan_forward.1", "scan_forward_two.1", "scan_backward"]):
        (tmp_path / f"17{number}-{name}-71-final_bundles.txt").write_text(BUNDLES)
        (tmp_path / f"17{number}-{name}-70-schedule-analysis_final_bundles.txt").write_text("")
        (tmp_path / f"17{number}-{name}-69-final_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)
    found = read_schedules(tmp_path, ["scan_backward", "scan_forward"])
    assert [(s.kernel, len(s.bodies)) for s in found] == [("scan_backward", 4), ("scan_forward", 4)]
    with pytest.raises(FileNotFoundError, match="no schedule of 'scan_sideways'"):
        read_schedules(tmp_path, ["scan_sideways"])


def test_the_bound_is_the_largest_part():
    slots = {"VALU": 4, "EUP": 1}
    v5e = find_target("v5e")
    assert v5e.clock == pytest.approx(1.503e9, rel=1e-3)
    assert bound(Work(819_000_000), v5e, slots).cycles == pytest.approx(1.503e6, rel=1e-3)      # a millisecond
    assert bound(Work(1, matrix=4 * 128 * 128 * 1000), v5e, slots)[:2] == (1000, "matrix")
    assert bound(Work(1, vector=4 * 1024 * 1000), v5e, slots)[:2] == (1000, "vector")
    assert bound(Work(1, transcendental=1024 * 1000), v5e, slots)[:2] == (1000, "transcendental")


def test_published_clocks_agree_and_unpublished_ones_are_not_made_up():
    assert TARGETS["v4"].clock == pytest.approx(1.05e9, rel=2e-3)
    assert TARGETS["v5p"].clock == pytest.approx(1.75e9, rel=2e-3)
    for name in ("v6e", "7x"):
        with pytest.raises(ValueError, match=f"clock of {name} is not published"):
            TARGETS[name].clock  # noqa: B018


def test_unknown_targets_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"no target 'V5E'; did you mean 'v5e'\?; targets: v4, v5e"):
        find_target("V5E")
