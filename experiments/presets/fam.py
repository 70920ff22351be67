"""TransformerFAM as its paper trains it: adapters on a pretrained model, beside a feedback memory (Hwang et al. 2024).

Claim: `fam.py:smollm2` trains a feedback memory and adapters on SmolLM2-135M as converted by `lm convert`; `1b` and
    `8b` are the sizes of the paper, whose pretrained weights are not public.
Command: lm train --config experiments/presets/fam.py:smollm2 --workdir runs/fam --init-from runs/smollm2 \
    --config.data.source=text --config.data.path=DIR \
    --config.data.tokenizer='{kind: tokenizers, path: runs/smollm2/tokenizer/tokenizer.json, bos: 1, eos: 2}'
Hardware: accelerators.
Expected: not trained. The paper's 1b rises from 11.8 to 13.5 on NarrativeQA and from 46.6 to 47.0 on PG-19.

Rows of 8,192 tokens in blocks of 1,024 with three blocks of memory and 64 slots; adapters of rank 64 on attention and
MLP; random state passing at 0.8; half of the rows start at a random position up to one wavelength of the slowest
rotation. `hybrid` is none of the paper: RWKV-7 before, feedback memory with PEER and RWKV-7 in a looped core, feedback
memory after it, trained from the start.
"""

from ml_collections import ConfigDict

from experiments import base

FAM = dict(kind="fam", block=1024, memory=3, slots=64)
# name -> width, layers, heads, key-value heads, MLP width, ids, learning rate, base of the rotary angles.
SIZES = {
    "smollm2": (576, 30, 9, 3, 1536, 49_152, 1e-4, 100_000.0),
    "1b": (1536, 18, 12, 12, 12_288, 256_000, 1e-4, 10_000.0),
    "8b": (4096, 32, 32, 32, 16_384, 256_000, 3e-3, 10_000.0),
}


def get_config(size: str = "smollm2") -> ConfigDict:
    """The config of one of SIZES. The entry is called `attention`, so that its parameters have the names of a converted
    model's."""
    if size == "hybrid":
        return hybrid()
    if size not in SIZES:
        raise ValueError(f"there is no TransformerFAM of size {size!r}; sizes: {', '.join(SIZES)}, hybrid")
    width, layers, heads, kv_heads, mlp_dim, vocab, rate, theta = SIZES[size]
    config = base.get_config()
    config.model = dict(
        embed_dim=width, num_layers=layers, vocab_size=vocab, pattern=("attention/mlp",), norm_eps=1e-5, remat="full",
        attention=dict(num_heads=heads, num_kv_heads=kv_heads, rope_theta=theta, **FAM), random_positions=62_832,
        mlp=dict(mlp_dim=mlp_dim, activation="swiglu" if size == "smollm2" else "gelu"))
    config.optimizer = dict(name="adafactor", learning_rate=rate, schedule="constant", clip_norm=1.0)
    config.train = dict(steps=50_000, batch_size=128, seq_len=8192, lora_rank=64, pass_memory=0.8,
                        lora_match=r"/(attention|mlp)/\w+/kernel$")
    return config


def hybrid() -> ConfigDict:
    """RWKV-7, feedback memory, PEER and recurrent depth in one model."""
    config = base.get_config()
    rwkv7 = dict(kind="rwkv7", head_dim=64, value_residual=False)
    config.model = dict(
        embed_dim=512, num_layers=4, prefix=("rwkv7/mlp",), pattern=("fam/peer", "rwkv7/mlp"), norm="layer",
        embed_norm=True, remat="full", rwkv7=rwkv7, mlp=dict(), fam=dict(num_heads=8, block=256, memory=1, slots=64),
        peer=dict(num_experts=65_536, num_heads=8, top_k=16, query_norm="layer"),
        recurrent_depth=dict(mean=4, recurrences=4, backprop=2, coda=("fam/mlp",)))
    config.optimizer = dict(name="adamw", learning_rate=3e-4, clip_norm=1.0)
    config.train = dict(steps=10_000, batch_size=64, seq_len=2048, pass_memory=0.8)
    return config
