"""One side of `lm bench kernels`, PEER: PyPI's PEER-pytorch, or our retrieval and experts with the same weights.

Arguments as of `launch.bench.min_gru`, the number of experts, and torch's form: "whole", or "chunked" as its
ChunkedPEER does. PEER-pytorch runs with non_competing_scores=False: its default keeps one expert a head, whatever
num_experts_per_head says.
"""

import sys

import numpy as np

from launch.bench.min_gru import agree
from launch.bench.side import serve

BATCH, TIME, WIDTH, HEADS, CHOSEN = 2, 256, 256, 8, 16


def describe(experts: str) -> str:
    """What is measured."""
    return (f"PEER layer, B{BATCH} T{TIME}, width {WIDTH}, {HEADS} heads of {CHOSEN} among {int(experts):,} experts, "
            "dense table gradient, float32")


def torch_side(direction: str, threads: int, path: str, experts: int, form: str):
    """(step, facts)."""
    import torch
    from PEER_pytorch.ChunkedPEER import ChunkedPEER
    from PEER_pytorch.PEER import PEER
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer = PEER(WIDTH, heads=HEADS, num_experts=experts, num_experts_per_head=CHOSEN, non_competing_scores=False)
    torch.nn.init.normal_(layer.keys, std=1.0)      # scores without near ties: both sides choose the same experts
    x, ct = torch.randn(BATCH, TIME, WIDTH, requires_grad=True), torch.randn(BATCH, TIME, WIDTH)

    through = ChunkedPEER(layer) if form == "chunked" else layer

    def run():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        out = through(x)
        loss = (out * ct).sum()
        loss.backward()
        return out, loss

    out, _ = run()
    query = layer.to_queries[0].weight
    down, up = layer.weight_down_embed.weight, layer.weight_up_embed.weight
    np.savez(path, x=x.detach(), ct=ct, query=query.detach(), keys=layer.keys.detach(), down=down.detach(),
             up=up.detach(), out=out.detach(), dx=x.grad, dquery=query.grad, ddown=down.grad, dup=up.grad,
             dkeys=layer.keys.grad)

    def step() -> float:
        if direction == "both":
            return float(run()[1].detach())
        with torch.no_grad():
            return float((through(x) * ct).sum())

    return step, {"version": f"torch {torch.__version__}", "threads": threads}


def our_side(direction: str, path: str):
    """(step, facts)."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.peer_experts import peer_experts
    from pallas_kernels.product_key_topk import product_key_topk
    saved = dict(np.load(path))
    x, ct, query = (jnp.asarray(saved[name]) for name in ("x", "ct", "query"))
    c1, c2 = (jnp.asarray(np.ascontiguousarray(saved["keys"][:, :, half])) for half in (0, 1))
    table = jnp.stack([saved["down"], saved["up"]], axis=1)
    gelu = lambda x: jax.nn.gelu(x, approximate=False)

    def loss(x, query, c1, c2, table):
        q1, q2 = jnp.moveaxis((x @ query.T).reshape(BATCH, TIME, 2, HEADS, -1), 2, 0)
        scores, ids = product_key_topk(q1, q2, c1, c2, CHOSEN, implementation="chunked")
        out = peer_experts(x, ids, jax.nn.softmax(scores), table, activation=gelu, implementation="chunked")
        return (out * ct).sum(), out

    given = (x, query, c1, c2, table)
    forward = jax.jit(lambda *given: loss(*given)[0])
    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True))
    (_, out), (dx, dquery, dc1, dc2, dtable) = both(*given)
    agree(saved, out=out, dx=dx, dquery=dquery, dkeys=jnp.stack([dc1, dc2], axis=2), ddown=dtable[:, 0],
          dup=dtable[:, 1])
    run = (lambda: both(*given)[0][0]) if direction == "both" else lambda: forward(*given)
    return (lambda: float(jax.block_until_ready(run()))), {"version": f"jax {jax.__version__}"}


if __name__ == "__main__":
    side, direction, threads, path, experts, form = sys.argv[1:]
    serve(lambda: torch_side(direction, int(threads), path, int(experts), form) if side == "torch"
          else our_side(direction, path))
