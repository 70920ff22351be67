"""product_key_topk at the sizes of a 1.5B model, and the least it has to cost: see `pallas_kernels/aot/case.py`."""

from pallas_kernels.aot.case import BATCH, TIME, Case, Work, array, num_bytes, product
from pallas_kernels.product_key_topk.api import product_key_topk

HEADS, KEY, SUB_KEYS, CHOSEN = 8, 128, 1024, 16       # a million experts
QUERIES = BATCH * TIME * HEADS


def _case(name: str, dtype: str) -> Case:
    query, keys = array(BATCH, TIME, HEADS, KEY, dtype=dtype), array(HEADS, SUB_KEYS, KEY, dtype=dtype)
    inputs = dict(q1=query, q2=query, c1=keys, c2=keys)
    chosen = QUERIES * CHOSEN * 8                      # a score and an id each
    # Every score is compared at least once. Back, each chosen pair adds a row of both sub-keys to its query's gradient
    # and the query to theirs.
    return Case(
        name, product_key_topk, inputs, kernels=("pallas_tpu", "pallas_mosaic_gpu", "pallas_triton"),
        elements=2 * QUERIES * SUB_KEYS, options=dict(k=CHOSEN),
        work={"forward": Work(num_bytes(inputs) + chosen, 2 * product(QUERIES, KEY, SUB_KEYS),
                              vector=2 * QUERIES * SUB_KEYS),
              "backward": Work(2 * num_bytes(inputs) + chosen, vector=8 * QUERIES * CHOSEN * KEY)})


CASES = (_case("product_key_topk", "bfloat16"), _case("product_key_topk float32", "float32"))
