"""wkv6 at the sizes of a 1.5B model, and the least it has to cost: see `pallas_kernels/aot/case.py`."""

from pallas_kernels.aot.case import BATCH, TIME, WIDTH, Case, Work, array, num_bytes, product
from pallas_kernels.wkv6.api import wkv6

HEAD = 64
CHUNK = 64           # of the algorithm whose products are counted
HEADS = WIDTH // HEAD
SIZE = BATCH * TIME * WIDTH


def wkv6_of_projections(r, w, k, v, u, state, reset=None, *, implementation=None):
    """wkv6 as a model calls it: r, w, k and v are [B, T, C], as projections give them, and so is y."""
    apart = lambda x: x.reshape(*x.shape[:2], *u.shape)
    y, state = wkv6(apart(r), apart(w), apart(k), apart(v), u, state, reset, implementation=implementation)
    return y.reshape(v.shape), state


def _case(name: str, dtype: str, reset: bool) -> Case:
    row, decay = array(BATCH, TIME, WIDTH, dtype=dtype), array(BATCH, TIME, WIDTH, dtype="float32")
    inputs = dict(r=row, w=decay, k=row, v=row, u=array(HEADS, HEAD, dtype="float32"),
                  state=array(BATCH, HEADS, HEAD, HEAD, dtype="float32"))
    floats = num_bytes(inputs)
    if reset:
        inputs["reset"] = array(BATCH, TIME, dtype="bool")
    # A pair of heads fills the matrix unit: y from the state, the state, the scores of all pairs, y from them.
    chunk = 2 * product(CHUNK, 128, 128) + product(2 * CHUNK, 128, CHUNK) + product(2 * CHUNK, CHUNK, 128)
    matrix = BATCH * HEADS // 2 * TIME // CHUNK * chunk
    state = num_bytes(inputs["state"])
    return Case(
        name, wkv6_of_projections, inputs, kernels=("pallas_tpu", "pallas_triton"), elements=SIZE,
        work={"forward": Work(num_bytes(inputs, row) + state, matrix, transcendental=SIZE),
              # reads the inputs and the cotangents of y and of the state, writes a gradient of each float input
              "backward": Work(num_bytes(inputs, row) + state + floats, 3 * matrix, transcendental=SIZE)},
        calls={direction: (f"wkv6_{direction}",) for direction in ("forward", "backward")})


CASES = (_case("wkv6", "bfloat16", reset=False), _case("wkv6 reset", "bfloat16", reset=True),
         _case("wkv6 float32", "float32", reset=False))
