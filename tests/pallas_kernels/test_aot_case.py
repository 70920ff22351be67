"""What operations tell the compile matrix is well formed, and wrong names are answered with the nearest."""

import re

import jax
import pytest

from pallas_kernels.aot.case import DIRECTIONS, cases, find_case, num_bytes, operations, product, selected
from pallas_kernels.aot.compilation import function_of, short_reason
from pallas_kernels.aot.targets import TARGETS

CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_can_be_traced_in_both_directions(case):
    """Shapes only, with the reference: a gradient for every float input, of its shape."""
    function, arguments = function_of(case, "forward", "reference")
    outputs = jax.eval_shape(function, *arguments)
    assert set(case.work) == set(DIRECTIONS)
    for direction in case.work:
        assert case.work[direction].bytes > 0
    function, arguments = function_of(case, "backward", "reference")
    assert jax.tree.map(lambda x: x.shape, arguments[1]) == jax.tree.map(lambda x: x.shape, outputs)
    (gradients,) = jax.eval_shape(function, *arguments)
    floats = [x for x in jax.tree.leaves(dict(case.inputs)) if "float" in x.dtype.name]
    assert [g.shape for g in gradients] == [x.shape for x in floats]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_are_ones_that_a_target_has(case):
    known = {kernel for target in TARGETS.values() for kernel in target.kernels}
    assert set(case.kernels) <= known and case.elements > 0


def test_case_names_are_unique_and_can_be_keys_of_the_record():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all("/" not in name and name.split()[0] in operations() for name in names)


def test_linear_scan_has_the_least_bytes_counted_by_hand():
    case = find_case("linear_scan")
    row = 8 * 2048 * 2048 * 2
    state = 8 * 2048 * 4
    assert case.work["forward"].bytes == 3 * row + 2 * state          # a, b, h; h0 and the last state
    assert case.work["backward"].bytes == 5 * row + 3 * state         # a, h, dh, da, db; h0, two gradients
    assert num_bytes(case.inputs) == 2 * row + state


def test_products_are_padded_to_tiles():
    assert product(8, 128, 128) == 8 * 128 * 128
    assert product(1, 1, 1) == 8 * 128 * 128
    assert product(9, 129, 64, tile=128) == 16 * 256 * 128


@pytest.mark.parametrize(("call", "near"), [(lambda: cases("linear_scna"), "linear_scan"),
                                            (lambda: find_case("linear_scan rest"), "linear_scan reset")])
def test_unknown_names_are_answered_with_the_nearest(call, near):
    with pytest.raises(ValueError, match=re.escape(f"did you mean {near!r}?")):
        call()


def test_operations_and_single_cases_are_selected():
    assert [case.name for case in selected(["linear_scan reset"])] == ["linear_scan reset"]
    assert selected(["linear_scan"]) == cases("linear_scan") and selected([]) == cases()


def test_reasons_of_a_compiler_are_one_short_line():
    error = ValueError("Mosaic failed\n\n  File \"x.py\", line 3\n  ^\nfor good reason " + "x" * 2000)
    reason = short_reason(error)
    assert reason.startswith("ValueError: Mosaic failed for good reason") and "\n" not in reason and len(reason) <= 600
