"""PyTorch's side: the package's model, AdamW, float32 on the CPU.

Arguments: module of the model (`launch.bench.gpt2`), T, threads, optimizer, weights.

Writes its initial weights to the last argument, so that the other side starts from the same.
"""

import importlib.metadata
import sys

import numpy as np
import torch
import torch.nn.functional as F

from launch.bench import sizes
from launch.bench.side import serve


def build():
    """(step, facts); optimizer is "fused" or "foreach", torch's two implementations of AdamW."""
    kind, seq_len, threads = importlib.import_module(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    optimizer, weights = sys.argv[4:]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = kind.torch_model(seq_len)
    model.train()
    np.savez(weights, **{k: v.numpy() for k, v in model.state_dict().items()})
    adamw = torch.optim.AdamW(model.parameters(), lr=sizes.LEARNING_RATE, betas=sizes.BETAS, eps=sizes.EPS,
                              weight_decay=sizes.WEIGHT_DECAY, **{optimizer: True})
    tokens = torch.from_numpy(sizes.tokens(seq_len).astype(np.int64))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        adamw.zero_grad(set_to_none=True)
        logits = kind.logits(model, inputs)
        loss = F.cross_entropy(logits.view(-1, sizes.VOCAB), targets.view(-1))
        loss.backward()
        adamw.step()
        return float(loss.detach())

    return step, {"version": f"torch {torch.__version__}, {kind.PACKAGE} {importlib.metadata.version(kind.PACKAGE)}",
                  "parameters": sum(p.numel() for p in model.parameters()), "threads": threads, "optimizer": optimizer}


if __name__ == "__main__":
    serve(build)
