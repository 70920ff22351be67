"""One side of `lm bench kernels`, minGRU: PyPI's minGRU-pytorch, or our `min_gru` after the same projection.

Arguments: side ("torch" or "ours"), direction ("forward" or "both"), threads of torch, file. torch writes its weights,
inputs and results to the file; ours must agree with them.
"""

import sys

import numpy as np

from launch.bench.side import serve

BATCH, TIME, WIDTH = 8, 1024, 512
TOLERANCE = 2e-3      # of the largest value: torch scans logarithms, which loses digits as T grows


def describe() -> str:
    """What is measured."""
    return f"minGRU layer, B{BATCH} T{TIME}, width {WIDTH}, float32"


def torch_side(direction: str, threads: int, path: str):
    """(step, facts)."""
    import torch
    from minGRU_pytorch.minGRU import minGRU
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer = minGRU(WIDTH)
    x, ct = torch.randn(BATCH, TIME, WIDTH, requires_grad=True), torch.randn(BATCH, TIME, WIDTH)
    weight = layer.to_hidden_and_gate.weight

    def run():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        out = layer(x)
        loss = (out * ct).sum()
        loss.backward()
        return out, loss

    out, _ = run()
    np.savez(path, x=x.detach(), ct=ct, weight=weight.detach(), out=out.detach(), dx=x.grad, dweight=weight.grad)

    def step() -> float:
        if direction == "both":
            return float(run()[1].detach())
        with torch.no_grad():
            return float((layer(x) * ct).sum())

    return step, {"version": f"torch {torch.__version__}", "threads": threads}


def our_side(direction: str, path: str):
    """(step, facts)."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.linear_scan import min_gru
    saved = dict(np.load(path))
    x, ct, weight = (jnp.asarray(saved[name]) for name in ("x", "ct", "weight"))

    def loss(x, weight):
        hidden, gate = jnp.split(x @ weight.T, 2, axis=-1)
        out, _ = min_gru(hidden, gate, jnp.zeros((BATCH, WIDTH)), implementation="chunked")
        return (out * ct).sum(), out

    forward = jax.jit(lambda x, weight: loss(x, weight)[0])
    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, out), (dx, dweight) = both(x, weight)
    agree(saved, out=out, dx=dx, dweight=dweight)
    run = (lambda: both(x, weight)[0][0]) if direction == "both" else lambda: forward(x, weight)
    return (lambda: float(jax.block_until_ready(run()))), {"version": f"jax {jax.__version__}"}


def agree(saved, tolerance: float = TOLERANCE, **ours) -> None:
    """Raises AssertionError where a result is not torch's: then the work was not equal."""
    for name, value in ours.items():
        error = np.abs(np.asarray(value) - saved[name]).max() / np.abs(saved[name]).max()
        if not error < tolerance:
            raise AssertionError(f"the sides differ in {name} by {error:.1e} of its largest value")


if __name__ == "__main__":
    side, direction, threads, path, _ = sys.argv[1:]
    serve(lambda: torch_side(direction, int(threads), path) if side == "torch" else our_side(direction, path))
