"""A small saved run, as `lm train` leaves it, for the tests of the commands that open one."""

import jax

from launch import config as configs
from launch.train import prepare
from lm.data.tokenizer import build_tokenizer
from lm.train.checkpoint import open_checkpoints

TEXTS = tuple(f"document {n}: the quick brown fox number {n * n} jumps over {n % 7} lazy dogs." for n in range(40))
TOKENIZER = dict(kind="bytes", bos_id=0, eos_id=1)


def save_run(workdir, *, lora_rank=None, steps=(3, 8), model=()):
    """Saves checkpoints of an untrained model, with parameters that differ by step, and the config beside them."""
    config = configs.resolve(dict(
        model=dict(embed_dim=16, num_layers=1, pattern=("attention",), attention=dict(num_heads=2), dtype="float32",
                   tie_embeddings=False, **dict(model)),
        data=dict(source="memory", texts=TEXTS, tokenizer=TOKENIZER, add_bos=True, validation_fraction=0.3),
        optimizer=dict(ema_decay=0.9), train=dict(batch_size=8, seq_len=32, lora_rank=lora_rank, steps=10),
        eval=dict(batches=None)))
    configs.check_workdir(str(workdir), config)
    made = prepare(config)
    with open_checkpoints(str(workdir), configs.options(config, "checkpoint")) as checkpoints:
        for step in steps:
            state = made.recipe.create(step, made.mesh)
            larger = jax.tree.map(lambda leaf: leaf * 9, state.params)
            checkpoints.save(step, state._replace(params=larger), {})
    return build_tokenizer(TOKENIZER)
