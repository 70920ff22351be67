"""How a fresh run begins from another: its parameters as far as they fit, and whether they have to be saved again."""

import logging
from typing import Any

log = logging.getLogger(__name__)
PROBE = "It was 7 o'clock, naïve cafés:\n\tpassed 1,000 by."


def compare_tokenizers(init_from: str, tokenizer: Any) -> bool:
    """Whether the run to begin from encodes text as `tokenizer` does; a warning where not: the same ids would be other
    words. True too where its tokenizer is not to be found any more."""
    from launch import config as configs
    from lm.data.corpora import load_tokenizer
    try:
        other = load_tokenizer(configs.options(configs.load(init_from), "data"))
        same = list(other.encode(PROBE)) == list(tokenizer.encode(PROBE))
    except (OSError, ValueError):
        return True
    if not same:
        log.warning("%s was trained with another tokenizer (%d ids; this run's has %d): its embeddings mean other "
                    "words here. For its own give --config.data.tokenizer as its config.json has it, or data prepared "
                    "with --config %s", init_from, other.vocab_size, tokenizer.vocab_size, init_from)
    return same


def from_run(options: Any, state: Any, workdir: str) -> tuple[Any, dict[str, Any] | None]:
    """(state, base): a fresh state with the parameters of `options.init_from`, and, where these stay frozen and are
    all there, what checkpoints note of that run in place of them.

    New adapters with a magnitude take it from the parameters that they now stand beside.
    """
    import jax
    import jax.numpy as jnp

    from launch import adapters
    from lm.adapters.lora import measured
    from lm.core.tree import named_leaves
    from lm.train import base as bases
    from lm.train.checkpoint import restore_params
    from lm.train.init_from import take_over
    other, step = restore_params(options.init_from, None)
    params, report = take_over(state.params, other)
    log.info("from step %d of %s: %s", step, options.init_from, report)
    if options.dora and any(name.endswith("/magnitude") for name in report.missing):
        params = {**params, "lora": measured(params["params"], params["lora"])}
    state = state._replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))
    shapes = lambda tree: {name: tuple(leaf.shape) for name, leaf in named_leaves(bases.own(tree)).items()}
    if not adapters.used(options) or shapes(params) != shapes(other):
        return state, None
    return state, bases.describe(options.init_from, step, workdir)
