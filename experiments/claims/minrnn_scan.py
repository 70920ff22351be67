"""How to scan minGRU in float32: the recurrence itself, or its logarithms.

Claim: The direct scan of minGRU has a relative error under 1e-5 at 65,536 tokens in float32, where the log-space form
    of the papers has lost three more digits.
Command: lm claim minrnn_scan --workdir runs/claims/minrnn_scan
Hardware: 2 CPU cores; two minutes.
Expected: another implementation, in NumPy and JAX, had found 5e-7 to 2e-6 for the direct scan at every length, and 1e-2
    to 4e-2 for the log-space form at 65,536. The thresholds are from there. A trial of the command, with both forms in
    one cell, gave 3.6e-7 and 1.1e-2 before this file was committed; no threshold was changed after it.

The error is the largest |h - exact| / |exact| over all positions and channels, exact being the recurrence in float64,
one step after the other. Gates and candidates come from standard normal pre-activations, with the positive candidate
g(x) that both forms need.
"""

from math import log10

from ml_collections import ConfigDict

from experiments.claims import base

LENGTHS = (512, 4096, 16_384, 65_536)
LONGEST = LENGTHS[-1]
DIRECT_LIMIT, DIGITS_LOST = 1e-5, 3.0
FORMS = {"direct": "scan_error", "log_space": "log_scan_error"}


def get_config() -> ConfigDict:
    """The sizes; what is measured is the scan of `min_gru` alone."""
    config = base.get_config()
    config.model = base.small(embed_dim=32, num_layers=1, pattern=("min_gru",), min_gru=dict(hidden_dim=64))
    config.data = dict(source="pydoc", tokenizer="bytes")
    config.train = dict(batch_size=2)
    return config


def grid(full: bool = False) -> list[dict]:
    """Both forms at every length; the long grid goes to 524,288 tokens."""
    lengths = (*LENGTHS, 524_288) if full else LENGTHS
    return [dict(arm=f"{form}_{length}", seed=seed, measure=measure, set={"train.seq_len": length})
            for form, measure in FORMS.items() for length in lengths for seed in base.SEEDS]


def check(results: list[dict]) -> dict:
    """Both forms at the longest length that the claim names; the direct one at every length."""
    found = base.by_arm(results, "error")
    errors = {form: {int(arm.rpartition("_")[2]): values for arm, values in found.items() if arm.startswith(form)}
              for form in FORMS}
    direct, logs = errors["direct"], errors["log_space"]
    criteria = [
        base.at_most(f"direct, worst seed at {LONGEST} tokens", max(direct[LONGEST]), DIRECT_LIMIT),
        base.at_most("direct, worst seed and length", max(map(max, direct.values())), DIRECT_LIMIT),
        base.at_least(f"digits that log-space loses against it at {LONGEST} tokens",
                      log10(min(logs[LONGEST]) / max(direct[LONGEST])), DIGITS_LOST),
        base.at_least(f"digits that log-space loses from {LENGTHS[0]} tokens on",
                      log10(base.mean(logs[LONGEST]) / base.mean(logs[LENGTHS[0]])), 1.0)]
    figure = {"x": "tokens", "y": "largest relative error", "xscale": "log", "yscale": "log",
              "series": {f"{form.replace('_', '-')} scan": {"x": list(lengths), "y": list(lengths.values())}
                         for form, lengths in errors.items()},
              "lines": {"limit of the direct scan": DIRECT_LIMIT}}
    return base.verdict(criteria, ("error",), figure)
