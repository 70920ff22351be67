"""linear_scan at the sizes of a 1.5B model, and the least it has to cost: see `pallas_kernels/aot/case.py`."""

from pallas_kernels.aot.case import BATCH, TIME, WIDTH, Case, Work, array, num_bytes
from pallas_kernels.linear_scan.api import linear_scan

_SIZE = BATCH * TIME * WIDTH


def _case(name: str, dtype: str, reset: bool) -> Case:
    row = array(BATCH, TIME, WIDTH, dtype=dtype)
    inputs = dict(a=row, b=row, h0=array(BATCH, WIDTH, dtype="float32"))
    if reset:
        inputs["reset"] = array(BATCH, TIME, dtype="bool")
    state = num_bytes({name: x for name, x in inputs.items() if name not in ("a", "b")})
    return Case(
        name, linear_scan, inputs, kernels=("pallas_tpu",), elements=_SIZE,
        work={"forward": Work(num_bytes(row) * 3 + state + num_bytes(inputs["h0"]), vector=2 * _SIZE),
              # reads a, h and the cotangent of h, writes the gradients of a and b
              "backward": Work(num_bytes(row) * 5 + state + 2 * num_bytes(inputs["h0"]), vector=3 * _SIZE)})


CASES = (_case("linear_scan", "bfloat16", reset=False), _case("linear_scan reset", "bfloat16", reset=True),
         _case("linear_scan float32", "float32", reset=False))
