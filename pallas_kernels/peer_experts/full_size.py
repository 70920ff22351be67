"""peer_experts at the sizes of a 1.5B model, and the least it has to cost: see `pallas_kernels/aot/case.py`."""

import functools

import jax

from pallas_kernels.aot.case import BATCH, TIME, Case, Work, array, num_bytes
from pallas_kernels.peer_experts.api import peer_experts
from pallas_kernels.peer_experts.config import block_tokens

WIDTH, HEADS, CHOSEN, EXPERTS = 1024, 8, 16, 2 ** 18     # 0.5 of the 1.5 billion parameters are in the table
ROWS = BATCH * TIME * HEADS * CHOSEN          # that the tokens choose
_gelu = functools.partial(jax.nn.gelu, approximate=True)


def _case(name: str, dtype: str) -> Case:
    x, table = array(BATCH, TIME, WIDTH, dtype=dtype), array(EXPERTS, 2, WIDTH, dtype=dtype)
    ids = array(BATCH, TIME, HEADS, CHOSEN, dtype="int32")
    gates = array(BATCH, TIME, HEADS, CHOSEN, dtype="float32")
    rows = ROWS * num_bytes(table) // EXPERTS
    # The dot product with down and the sum of up: a multiply and an add an element each. Back: these products again,
    # and with dy; the sum of down for dx; both outer products into the table.
    return Case(
        name, peer_experts, dict(x=x, ids=ids, gates=gates, table=table),
        kernels=("pallas_tpu", "pallas_mosaic_gpu", "pallas_triton"), elements=ROWS * WIDTH,
        options=dict(activation=_gelu), trips=block_tokens(BATCH * TIME, WIDTH),
        work={"forward": Work(rows + num_bytes(x, x, ids, gates), vector=4 * ROWS * WIDTH, transcendental=2 * ROWS),
              # reads the rows of experts and writes the dense gradient of the table
              "backward": Work(rows + num_bytes(x, x, x, ids, gates, gates, table), vector=10 * ROWS * WIDTH,
                               transcendental=2 * ROWS)})


CASES = (_case("peer_experts", "bfloat16"), _case("peer_experts float32", "float32"))
