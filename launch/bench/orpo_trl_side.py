"""TRL's side of `lm bench orpo`: the training step of its ORPOTrainer, float32 on the CPU.

Arguments: T, ids of the vocabulary, threads, whether activations are made again in the backward pass ("remade", TRL's
default) or "kept", file for the initial weights.
"""

import importlib.metadata
import sys
import tempfile

import datasets
import numpy as np
import tokenizers
import torch
import transformers
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from launch.bench import gpt2, sizes
from launch.bench.pairs import ODDS_WEIGHT, PAIRS, pairs
from launch.bench.side import serve


def words(ids: np.ndarray) -> str:
    """Text that the tokenizer below reads as these ids."""
    return " ".join(f"t{i}" for i in ids)


def tokenizer(vocab: int) -> transformers.PreTrainedTokenizerFast:
    """A word for every id; the last two, padding and EOS, are special."""
    names = {vocab - 2: "<pad>", vocab - 1: "<eos>"}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({names.get(i, f"t{i}"): i for i in range(vocab)}, "t0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<pad>")


def build():
    """(step, facts)."""
    seq_len, vocab, threads = (int(word) for word in sys.argv[1:4])
    remade = sys.argv[4] == "remade"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = gpt2.torch_model(seq_len, vocab)
    np.savez(sys.argv[5], **{k: v.numpy() for k, v in model.state_dict().items()})
    given = pairs(seq_len, vocab)
    # The trainer adds EOS to responses itself.
    rows = [{"prompt": words(p), "chosen": " " + words(c[:-1]), "rejected": " " + words(r[:-1])}
            for p, c, r in zip(*given, strict=True)]
    b1, b2 = sizes.BETAS
    with tempfile.TemporaryDirectory() as folder:
        settings = ORPOConfig(
            output_dir=folder, per_device_train_batch_size=PAIRS, max_length=seq_len, beta=ODDS_WEIGHT, use_cpu=True,
            bf16=False, gradient_checkpointing=remade, learning_rate=sizes.LEARNING_RATE, lr_scheduler_type="constant",
            weight_decay=0.0, adam_beta1=b1, adam_beta2=b2, adam_epsilon=sizes.EPS, report_to=[], max_steps=1000,
            dataloader_pin_memory=False, remove_unused_columns=False)
        trainer = ORPOTrainer(model, settings, train_dataset=datasets.Dataset.from_list(rows),
                              processing_class=tokenizer(vocab))
    batch = next(iter(trainer.get_train_dataloader()))
    found = {tuple(row) for row in batch["chosen_input_ids"].tolist()}
    if found != {(*p, *c) for p, c in zip(given.prompt.tolist(), given.chosen.tolist(), strict=True)}:
        raise AssertionError("the trainer made other tokens of the pairs")
    optimizer = trainer.create_optimizer()
    model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by its loop, and read by its step

    def step() -> float:
        loss = trainer.training_step(model, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step, {"version": f"torch {torch.__version__}, transformers {transformers.__version__}, trl "
                             f"{importlib.metadata.version('trl')}",
                  "parameters": sum(p.numel() for p in model.parameters()), "threads": threads, "remade": remade}


if __name__ == "__main__":
    serve(build)
