"""The memorization test of a run: from its config, and the texts that were asked for, to an evaluator."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from launch import config as configs
from launch.beam import check_width
from lm.core.fields import fill
from lm.data.synthetic.recital import CONTROLS
from lm.data.tokenizer import Tokenizer, special_ids
from lm.eval.documents import target_nats
from lm.eval.memorization import SET, Memorization
from lm.eval.memorization_options import MemorizationOptions
from lm.eval.memorization_texts import matched, read_texts, texts_of
from lm.eval.samples import encode_prompt
from lm.models.decoder import DecoderLM
from lm.tasks.goldfish import goldfish_of

WHERE = "config.eval.memorization"


def memorization_of(config: Any, given: Mapping[str, Any], model: DecoderLM, tokenizer: Tokenizer, *,
                    where: str = WHERE, reference: Callable[[Sequence[str]], list[np.ndarray]] | None = None
                    ) -> Memorization:
    """The evaluator of a run's config with the fields `given` of `MemorizationOptions`.

    Raises ValueError where there are no texts, or they are too short, or members come without controls.
    """
    options = MemorizationOptions(**fill(MemorizationOptions, given, where))
    options.check(where)
    if options.beams is not None:
        check_width(f"{where}.beams", options.beams, tokenizer)
    data, decode = configs.options(config, "data"), tokenizer.decode
    if options.members is not None:
        texts = [read_texts(path, data, tokenizer) for path in (options.members, options.controls)]
    else:
        task = None if data.sources else data.build_task()
        if not hasattr(task, "documents"):
            raise ValueError(f"{where} needs members and controls: texts that the run was trained on, and matched "
                             f"texts that it was not; only data.source='recital' brings its own")
        texts = [texts_of(documents, decode) for documents in (task.members, task.documents(CONTROLS))]
    pairs = matched(*texts, options, seq_len=config.train.seq_len, decode=decode)
    return Memorization(pairs, options, model.initial_state, decode,
                        goldfish_of(config.loss.to_dict(), special_ids(tokenizer)), reference)


def reference_of(run: Any, batch_size: int) -> Callable[[Sequence[str]], list[np.ndarray]]:
    """Nats of texts under another opened run (`launch.restore.Run`), by its own tokens, cut to its rows."""
    data, seq_len = configs.options(run.config, "data"), run.config.train.seq_len

    def nats(texts: Sequence[str]) -> list[np.ndarray]:
        ids = [encode_prompt(run.tokenizer, text, add_bos=data.add_bos)[:seq_len] for text in texts]
        with jax.set_mesh(run.mesh):
            return target_nats(run.apply, run.params, ids, batch_size)
    return nats


def summary(metrics: Mapping[str, float]) -> str:
    """The numbers of one line: exact continuations, overlap and membership, of members and of controls."""
    found = {name.rpartition("/")[2]: value for name, value in metrics.items() if name.startswith(f"eval/{SET}/")}
    return (f"exact {found['exact_match']:.1%} (controls {found['exact_match_controls']:.1%}), ROUGE-L "
            f"{found['rouge_l']:.3f} ({found['rouge_l_controls']:.3f}), membership AUC {found['auc_loss']:.3f}")
