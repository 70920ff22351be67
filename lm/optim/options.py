"""The `optimizer` group of the config: which optimizer, its schedule, and what is said about single parameters."""

import dataclasses
import difflib
import re
from typing import Any

from lm.core.fields import check_known, conform, option, type_name

OPTIMIZERS = ("adamw", "lion", "adafactor", "muon", "sgd")
SCHEDULES = ("cosine", "wsd", "exponential", "constant", "inverse_sqrt")
STATE_DTYPES = ("float32", "bfloat16")
PARAMETRIZATIONS = ("standard", "mup")
TABLE_OPTIMIZERS = ("adamw", "adagrad", "sgd")
NEWTON_SCHULZ = ("standard", "gram")

# What a rule may say about the parameters that it matches.
RULE_KEYS = {"match": str, "lr_multiplier": float, "weight_decay": float, "freeze": bool, "optimizer": str,
             "freeze_first": tuple[int, int]}

WHERE = "config.optimizer"


def known(value: str, names: tuple[str, ...], where: str) -> None:
    """Raises ValueError naming the nearest of `names` where `value` is none of them."""
    if value not in names:
        near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.0)
        raise ValueError(f"{where}={value!r} is unknown; did you mean {near[0]!r}? Known: {', '.join(names)}")


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Everything that turns gradients into updates. Weight decay is decoupled and multiplied by the learning rate."""

    name: str = option("adamw", f"the optimizer: {', '.join(OPTIMIZERS)}")
    learning_rate: float = option(1e-3, "peak learning rate, reached at the end of the warm-up")
    parametrization: str = option("standard", "mup: learning rates found at config.model.base_width and base_depth "
                                              "hold at this size (docs/scaling.md); standard: they are as they are")
    schedule: str = option("cosine", f"shape after the warm-up: {', '.join(SCHEDULES)}")
    warmup_steps: int | None = option(None, "steps of linear warm-up; None: 5% of all steps, at most 1000")
    warmup_start: float = option(0.0, "learning rate of the first step as a fraction of the peak, from which the "
                                      "warm-up rises; 0: one step's share")
    decay_steps: int | None = option(None, "wsd, exponential: length of the final decay in steps; None: by "
                                           "decay_fraction for wsd, all after the warm-up for exponential")
    decay_fraction: float = option(0.2, "wsd: length of the final decay as a fraction of all steps")
    final_fraction: float = option(0.1, "cosine, wsd, exponential: last learning rate as a "
                                         "fraction of the peak")
    b1: float | None = option(None, "decay of the first moment; None: 0.9")
    b2: float | None = option(None, "decay of the second moment (lion: of its momentum); None: 0.95, lion 0.99")
    eps: float = option(1e-8, "adamw: added to the root of the second moment")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices; vectors, norms and biases have none")
    decay_embeddings: bool = option(False, "whether weight decay applies to embedding tables")
    momentum: float | None = option(None, "sgd, muon, adafactor: momentum; None: sgd 0.9, muon 0.95, adafactor off")
    nesterov: bool | None = option(None, "sgd, muon: Nesterov momentum; None: sgd off, muon on")
    clip_norm: float | None = option(1.0, "largest global norm of the gradient of all trainable parameters; None: off")
    ema_decay: float | None = option(None, "decay of the moving average of the parameters; None: no average is kept")
    state_dtype: str = option("float32", "dtype of the moments between steps: float32 or bfloat16")
    stochastic_rounding: bool = option(False, "round the moments to bfloat16 at random and without bias")
    sparse_tables: str | None = option(None, "tables of peer and pkm change in the rows that were chosen alone, each "
                                             "row with an optimizer of its own: "
                                             f"{', '.join(TABLE_OPTIMIZERS)}; None: densely, as every parameter")
    rules: tuple[dict, ...] = option((), "per-parameter rules: match (regex), lr_multiplier, weight_decay, freeze, "
                                         "optimizer, freeze_first=(count, axis), which holds the first places of an "
                                         "axis, counted from the last, -1; the first rule that says a thing decides it")
    adam_learning_rate: float | None = option(None, "peak for parameters that adamw trains beside another optimizer; "
                                                    "None: learning_rate")
    muon_steps: int = option(5, "muon: Newton-Schulz iterations")
    muon_consistent_rms: float | None = option(0.2, "muon: root mean square of an update before the learning rate, "
                                                    "as AdamW's; None: scale by sqrt(max(1, out / in))")
    muon_newton_schulz: str = option("standard", "muon: standard, or gram (fewer operations on matrices at least twice "
                                                 "as wide as high; needs float32 products: for CPUs)")
    adafactor_min_dim: int = option(128, "adafactor: factor the second moment where both dimensions are this large")
    adafactor_decay_rate: float = option(0.8, "adafactor: exponent of the second moment's decay, 1 - step^-rate")
    adafactor_clip_rms: float | None = option(1.0, "adafactor: largest root mean square of an update; None: off")
    adafactor_parameter_scale: bool = option(True, "adafactor: multiply updates by the parameter's root mean square")

    def check(self) -> None:
        """Raises ValueError for unknown names, numbers out of range and options without an effect."""
        known(self.name, OPTIMIZERS, f"{WHERE}.name")
        known(self.schedule, SCHEDULES, f"{WHERE}.schedule")
        known(self.parametrization, PARAMETRIZATIONS, f"{WHERE}.parametrization")
        known(self.state_dtype, STATE_DTYPES, f"{WHERE}.state_dtype")
        known(self.muon_newton_schulz, NEWTON_SCHULZ, f"{WHERE}.muon_newton_schulz")
        self._check_ranges()
        if self.schedule == "exponential" and not self.final_fraction:
            raise ValueError(f"{WHERE}.final_fraction must be above 0 with schedule='exponential', which never "
                             "reaches 0; got 0")
        if self.stochastic_rounding and self.state_dtype != "bfloat16":
            raise ValueError(f"{WHERE}.stochastic_rounding rounds moments to bfloat16, but state_dtype is "
                             f"{self.state_dtype!r}; set {WHERE}.state_dtype='bfloat16' or leave it off")
        if self.sparse_tables is not None:
            self._check_sparse_tables()
        rows_use = self.sparse_tables == "sgd"
        if self.momentum is not None and self.name not in ("sgd", "muon", "adafactor") and not rows_use:
            raise ValueError(f"{WHERE}.momentum={self.momentum} has no effect on {self.name}; set {WHERE}.b1 instead")
        if self.nesterov and self.name not in ("sgd", "muon") and not rows_use:
            raise ValueError(f"{WHERE}.nesterov has no effect on {self.name}; it is for sgd and muon")
        for index, rule in enumerate(self.rules):
            check_rule(rule, f"{WHERE}.rules[{index}]")

    def _check_sparse_tables(self) -> None:
        where = f"{WHERE}.sparse_tables={self.sparse_tables!r}"
        known(self.sparse_tables, TABLE_OPTIMIZERS, f"{WHERE}.sparse_tables")
        if self.ema_decay is not None:
            raise ValueError(f"{where} changes chosen rows alone, and {WHERE}.ema_decay={self.ema_decay} averages "
                             "every row in every step; set one of them to None")
        if self.state_dtype != "float32":
            raise ValueError(f"{where} keeps the state of rows in float32; set {WHERE}.state_dtype='float32', got "
                             f"{self.state_dtype!r}")

    def _check_ranges(self) -> None:
        for name in ("learning_rate", "eps", "clip_norm", "adam_learning_rate", "muon_consistent_rms",
                     "adafactor_clip_rms", "muon_steps", "adafactor_min_dim"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{WHERE}.{name} must be above 0; got {value}")
        for name in ("warmup_steps", "decay_steps", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{WHERE}.{name} must be at least 0; got {value}")
        for name in ("b1", "b2", "momentum", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{WHERE}.{name} must be at least 0 and below 1; got {value}")
        for name in ("decay_fraction", "final_fraction", "warmup_start"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{WHERE}.{name} must be from 0 to 1; got {value}")


def check_rule(rule: dict[str, Any], where: str) -> None:
    """Raises ValueError for a rule with an unknown key, a wrong type, no valid `match`, or nothing said."""
    check_known(rule, RULE_KEYS, where, "key")
    if "match" not in rule or len(rule) == 1:
        raise ValueError(f"{where} needs 'match' and at least one of {', '.join([*RULE_KEYS][1:])}; got {dict(rule)}")
    for key, value in rule.items():
        try:
            conform(value, RULE_KEYS[key])
        except TypeError:
            raise ValueError(f"{where}.{key} must be {type_name(RULE_KEYS[key])}; got {value!r}") from None
        if key in ("lr_multiplier", "weight_decay") and value < 0:
            raise ValueError(f"{where}.{key} must be at least 0; got {value}")
    if "freeze_first" in rule and not (rule["freeze_first"][0] >= 0 > rule["freeze_first"][1]):
        raise ValueError(f"{where}.freeze_first={tuple(rule['freeze_first'])} must be (count, axis) with a count of at "
                         f"least 0 and an axis counted from the last, -1 or less")
    if "optimizer" in rule:
        known(rule["optimizer"], OPTIMIZERS, f"{where}.optimizer")
    try:
        re.compile(rule["match"])
    except re.error as error:
        raise ValueError(f"{where}.match={rule['match']!r} is no regular expression: {error}") from None
