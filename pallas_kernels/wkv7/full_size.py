"""wkv7 at the sizes of a 1.5B model, and the least it has to cost: see `pallas_kernels/aot/case.py`."""

from pallas_kernels.aot.case import BATCH, TIME, WIDTH, Case, Work, array, num_bytes, product
from pallas_kernels.wkv7.api import wkv7

HEAD = 64
CHUNK = 64           # of the algorithm whose products are counted
HEADS = WIDTH // HEAD
SIZE = BATCH * TIME * WIDTH


def wkv7_of_projections(r, w, k, v, a, b, state, reset=None, *, implementation=None):
    """wkv7 as a model calls it: all but the state are [B, T, C], as projections give them, and so is y."""
    apart = (x.reshape(*x.shape[:2], HEADS, HEAD) for x in (r, w, k, v, a, b))
    y, state = wkv7(*apart, state, reset, implementation=implementation)
    return y.reshape(v.shape), state


def _case(name: str, dtype: str, reset: bool) -> Case:
    row, decay = array(BATCH, TIME, WIDTH, dtype=dtype), array(BATCH, TIME, WIDTH, dtype="float32")
    inputs = dict(r=row, w=decay, k=row, v=row, a=row, b=row,
                  state=array(BATCH, HEADS, HEAD, HEAD, dtype="float32"))
    floats = num_bytes(inputs)
    if reset:
        inputs["reset"] = array(BATCH, TIME, dtype="bool")
    # A pair of heads fills the matrix unit. With the state: y and what is removed read it, k and b write it. Scores of
    # all pairs of r, a with k, b. From them y twice and what is removed twice, once by the inverse.
    chunk = 4 * product(CHUNK, 128, 128) + product(4 * CHUNK, 128, 2 * CHUNK) + 4 * product(2 * CHUNK, CHUNK, 128)
    matrix = BATCH * HEADS // 2 * TIME // CHUNK * chunk
    state = num_bytes(inputs["state"])
    return Case(
        name, wkv7_of_projections, inputs, kernels=("pallas_tpu", "pallas_triton"), elements=SIZE,
        work={"forward": Work(num_bytes(inputs, row) + state, matrix, transcendental=SIZE),
              # reads the inputs and the cotangents of y and of the state, writes a gradient of each float input
              "backward": Work(num_bytes(inputs, row) + state + floats, 3 * matrix, transcendental=SIZE)},
        calls={direction: (f"wkv7_{direction}",) for direction in ("forward", "backward")})


CASES = (_case("wkv7", "bfloat16", reset=False), _case("wkv7 reset", "bfloat16", reset=True),
         _case("wkv7 float32", "float32", reset=False))
