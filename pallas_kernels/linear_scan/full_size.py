"""linear_scan at the sizes of a 1.5B model, and the least it has to cost: see `pallas_kernels/aot/case.py`."""

from pallas_kernels.aot.case import BATCH, TIME, WIDTH, Case, Work, array, num_bytes
from pallas_kernels.linear_scan.api import linear_scan
from pallas_kernels.linear_scan.gated import min_gru, min_lstm

_SIZE = BATCH * TIME * WIDTH
_KERNELS = ("pallas_tpu", "pallas_mosaic_gpu", "pallas_triton")
_STATE = array(BATCH, WIDTH, dtype="float32")


def _case(name: str, dtype: str, reset: bool) -> Case:
    row = array(BATCH, TIME, WIDTH, dtype=dtype)
    inputs = dict(a=row, b=row, h0=_STATE)
    if reset:
        inputs["reset"] = array(BATCH, TIME, dtype="bool")
    small = num_bytes({name: x for name, x in inputs.items() if name not in ("a", "b")})
    return Case(
        name, linear_scan, inputs, kernels=_KERNELS, elements=_SIZE,
        work={"forward": Work(num_bytes(row) * 3 + small + num_bytes(_STATE), vector=2 * _SIZE),
              # reads a, h and the cotangent of h, writes the gradients of a and b
              "backward": Work(num_bytes(row) * 5 + small + 2 * num_bytes(_STATE), vector=3 * _SIZE)})


def _gated(op, names: tuple[str, ...]) -> Case:
    """Reads the pre-activations and writes h; back from them, h and its cotangent to as many gradients. A sigmoid is an
    exponential and a reciprocal; the vector operations are counted without those of the gates' gradients."""
    row, count = array(BATCH, TIME, WIDTH), len(names)
    sigmoids = {min_gru: 2, min_lstm: 4}[op]
    return Case(
        f"linear_scan {op.__name__}", op, {name: row for name in names} | {"h0": _STATE}, kernels=_KERNELS,
        elements=_SIZE,
        work={"forward": Work(num_bytes(row) * (count + 1) + 2 * num_bytes(_STATE), vector=3 * _SIZE,
                              transcendental=2 * sigmoids * _SIZE),
              "backward": Work(num_bytes(row) * (2 * count + 2) + 3 * num_bytes(_STATE), vector=5 * _SIZE,
                               transcendental=2 * sigmoids * _SIZE)})


CASES = (_case("linear_scan", "bfloat16", reset=False), _case("linear_scan reset", "bfloat16", reset=True),
         _case("linear_scan float32", "float32", reset=False),
         _gated(min_gru, ("hidden", "gate")), _gated(min_lstm, ("hidden", "forget", "take")))
