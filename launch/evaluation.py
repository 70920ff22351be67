"""What `lm train` evaluates and prints on the way: sets, baseline and samples."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from launch import config as configs
from launch.memorization import memorization_of, summary
from launch.preference import objective_of
from lm.core.types import Apply, Params
from lm.data.loader import build_dataset
from lm.data.ngram import fit_bigram
from lm.eval.base import by_set, evaluate
from lm.eval.depth import AtDepth, at_recurrences
from lm.eval.options import VALIDATION
from lm.eval.perplexity import Perplexity
from lm.eval.preference import Preference
from lm.eval.samples import encode_prompt, sample_texts
from lm.eval.sets import load_text, set_of
from lm.models.recurrent_depth import check_recurrent
from lm.train.feed import data_shard, to_device

BASELINE = "bigram"
_SHOWN = (("loss", "loss"), ("accuracy", "accuracy"), ("reward_auc", "reward AUC"))


class Evaluation:
    """Called by the loop with (params, step, note). `baselines` is filled at the first call.

    prepared: the run, as `launch.train` builds it; apply: its model's. Every process evaluates its own rows. Samples
    are drawn and written in runs of one process only.
    """

    def __init__(self, prepared: Any, workdir: str, apply: Apply):
        self.baselines: dict[str, float] = {}
        self._prepared, self._workdir = prepared, epath.Path(workdir)
        self._options = configs.options(prepared.config, "eval")
        self._data = configs.options(prepared.config, "data")
        self._apply = apply
        size = {"batch_size": prepared.options.batch_size, "seq_len": self._options.seq_len or prepared.options.seq_len}
        index, count = data_shard(prepared.mesh, **size)
        datasets = {}
        if prepared.corpora.validation:
            datasets[VALIDATION] = build_dataset(self._data, split="validation", corpora=prepared.corpora, **size)
            datasets |= datasets[VALIDATION].slices()
        for name, path in self._options.sets.items():
            datasets[name] = load_text(path, self._data, prepared.corpora.tokenizer, **size)
        self._sets = {name: set_of(dataset, self._options.batches, process_index=index, process_count=count)
                      for name, dataset in datasets.items()}
        self._whole = {name: set_of(dataset, self._options.batches) for name, dataset in datasets.items()}
        place = functools.partial(to_device, mesh=prepared.mesh, index=index, count=count)
        objective = objective_of(prepared.config)
        evaluator = Perplexity(self._sets, place=place) if objective is None else \
            Preference(self._sets, objective.loss, place=place)
        self._evaluators = [evaluator] if datasets else []
        if self._options.recurrences:
            check_recurrent(prepared.model, "config.eval.recurrences")
            self._evaluators.append(AtDepth(tuple(self._evaluators), at_recurrences(self._options.recurrences)))
        self._memorization = memorization_of(prepared.config, self._options.memorization, prepared.model,
                                             prepared.corpora.tokenizer) if self._options.memorization else None
        # A prompt that cannot be continued is found now, not after an hour of training.
        for prompt in self._options.samples:
            ids = encode_prompt(prepared.corpora.tokenizer, prompt, add_bos=self._data.add_bos)
            prepared.model.check_length(len(ids) + self._options.sample_tokens)

    def __call__(self, params: Params, step: int, note: Callable[[str], None]) -> dict[str, float]:
        """Metrics of this step, `eval/<set>/...`; prints a line a set, and the samples."""
        given = self._whole.get(VALIDATION)
        if not self.baselines and self._options.baseline and given is not None and given.token_bytes is not None:
            score = fit_bigram(self._prepared.train_set).score(given.batches(), given.token_bytes)
            self.baselines[BASELINE] = score.bits_per_byte
        metrics = evaluate(self._evaluators, self._apply, params)
        for name, values in by_set(metrics).items():
            line = ", ".join(f"{words} {values[key]:.4f}" for key, words in _SHOWN if key in values)
            if "bits_per_byte" in values:
                line = f"loss {values['loss']:.4f}, {values['bits_per_byte']:.3f} bits per byte"
                if name == VALIDATION and self.baselines:
                    line += f" (bigram of the training split: {self.baselines[BASELINE]:.3f})"
            note(f"step {step}: {name} {line}")
        if self._memorization is not None:
            metrics |= evaluate([self._memorization], self._apply, params)
            note(f"step {step}: memorization {summary(metrics)}")
        if self._options.samples:
            self._sample(params, step, note)
        return metrics

    def _sample(self, params: Params, step: int, note: Callable[[str], None]) -> None:
        """Continues the config's prompts; prints them and writes <workdir>/samples/<step>.txt."""
        texts = sample_texts(self._apply, params, self._prepared.model.initial_state, self._prepared.corpora.tokenizer,
                             self._options, add_bos=self._data.add_bos)
        blocks = [prompt + continuation for prompt, continuation in texts]
        for block in blocks:
            note(f"sample: {block}")
        if jax.process_index():
            return
        folder = self._workdir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{step}.txt").write_text("\n\n".join(blocks) + "\n")
