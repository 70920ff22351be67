"""wkv4 at the sizes of a 1.5B model, and the least it has to cost: see `pallas_kernels/aot/case.py`."""

from pallas_kernels.aot.case import BATCH, WIDTH, Case, Work, array, num_bytes
from pallas_kernels.wkv4.api import wkv4

TIME = 1024         # the context that RWKV-4 was trained with


def _case(name: str, dtype: str, reset: bool, batch: int = BATCH) -> Case:
    row, channels = array(batch, TIME, WIDTH, dtype=dtype), array(WIDTH, dtype="float32")
    state = array(batch, 2, WIDTH, dtype="float32")
    inputs = dict(w=channels, u=channels, k=row, v=row, state=state)
    if reset:
        inputs["reset"] = array(batch, TIME, dtype="bool")
    size, small = batch * TIME * WIDTH, num_bytes({name: x for name, x in inputs.items() if name not in ("k", "v")})
    return Case(
        name, wkv4, inputs, kernels=("pallas_tpu", "pallas_mosaic_gpu", "pallas_triton"),
        elements=size,
        # per step: y 6 and a division, the scale 4, the sums 5; three exponentials and a reciprocal
        work={"forward": Work(num_bytes(row) * 3 + small + num_bytes(state), vector=15 * size,
                              transcendental=4 * size),
              # reads k, v and the cotangent of y, writes the gradients of k and v; the states are computed again
              "backward": Work(num_bytes(row) * 5 + small + 2 * num_bytes(state), vector=40 * size,
                               transcendental=6 * size)})


CASES = (_case("wkv4", "bfloat16", reset=False), _case("wkv4 reset", "bfloat16", reset=True),
         _case("wkv4 float32", "float32", reset=False), _case("wkv4 B1", "bfloat16", reset=False, batch=1))
