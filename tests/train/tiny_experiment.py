"""A run of seconds: the experiment file of the tests that start `lm train` for real."""

from ml_collections import ConfigDict

WORDS = ("the", "loom", "weaves", "a", "long", "thread", "of", "words", "and", "every", "word", "pulls", "the", "next")


def get_config() -> ConfigDict:
    """Documents of different lengths, packed; dropout, so that resuming has to restore the random numbers too."""
    texts = tuple(" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 12 + i % 17)) for i in range(1, 60))
    return ConfigDict(dict(
        model=dict(embed_dim=16, num_layers=2, attention=dict(num_heads=2, dropout=0.1), mlp=dict(mlp_dim=32),
                   dtype="float32"),
        loss=dict(next_token=1.0), optimizer=dict(learning_rate=3e-3, schedule="constant", warmup_steps=2, eps=1e-6),
        data=dict(source="memory", texts=texts, tokenizer="bytes"),
        train=dict(steps=12, batch_size=8, seq_len=32, seed=3), mesh=dict(), checkpoint=dict(every=4, keep=2),
        eval=dict(every=6, batches=2, baseline=False), log=dict(every=1, tensorboard=False)))
