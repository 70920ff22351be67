"""PyTorch's side: transformers' GPT2LMHeadModel, AdamW, float32 on the CPU. Arguments: T, threads, optimizer, weights.

Writes its initial weights to the last argument, so that the other side starts from the same.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from launch.bench import gpt2
from launch.bench.side import serve


def build():
    """(step, facts); optimizer is "fused" or "foreach", torch's two implementations of AdamW."""
    seq_len, threads, optimizer, weights = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=gpt2.VOCAB, n_positions=seq_len, n_embd=gpt2.WIDTH, n_layer=gpt2.LAYERS, n_head=gpt2.HEADS,
        bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa"))
    model.train()
    np.savez(weights, **{k: v.numpy() for k, v in model.state_dict().items()})
    adamw = torch.optim.AdamW(model.parameters(), lr=gpt2.LEARNING_RATE, betas=gpt2.BETAS, eps=gpt2.EPS,
                              weight_decay=gpt2.WEIGHT_DECAY, **{optimizer: True})
    tokens = torch.from_numpy(gpt2.tokens(seq_len).astype(np.int64))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        adamw.zero_grad(set_to_none=True)
        logits = model(input_ids=inputs).logits
        loss = F.cross_entropy(logits.view(-1, gpt2.VOCAB), targets.view(-1))
        loss.backward()
        adamw.step()
        return float(loss.detach())

    return step, {"version": f"torch {torch.__version__}, transformers {transformers.__version__}",
                  "parameters": sum(p.numel() for p in model.parameters()), "threads": threads, "optimizer": optimizer}


if __name__ == "__main__":
    serve(build)
