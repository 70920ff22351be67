"""Learning rates that transfer over width and depth, as rules for single parameters.

`resolve` turns `parametrization="mup"` into one exact rule for each parameter whose rate changes, so that everything
after it sees an ordinary optimizer. What a parameter is, is read from its name and the names of its axes; stacked
layers are seen one by one, so that scanned and unrolled stacks get the same.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lm.core.transfer import Transfer
from lm.core.tree import STATS
from lm.optim.options import WHERE, OptimizerOptions
from lm.optim.rules import Row, table

WIDE = ("embed", "mlp", "heads", "kv_heads")  # logical axes that grow with the width
# Matrices by the last part of their names: their fan in is the axis before the last.
MATRICES = re.compile(r"^(kernel|experts_(up|gate|down))$")
# These are looked up, added, or multiplied element by element, or have no axis that grows.
VECTORS = ("embedding", "bias", "scale", "bonus", "taps", "keys", "values")
IN_BLOCKS = re.compile(r"^(stack|prelude|coda)/")


def resolve(options: OptimizerOptions, params_shapes: Any, axes: Mapping[str, tuple[str | None, ...]],
            transfer: Transfer | None) -> OptimizerOptions:
    """The options with `parametrization="standard"` and rules that do what "mup" asks for; others as they are.

    A rule's `lr_multiplier` multiplies what follows from the size. Weight decay is divided by it: learning rate times
    decay stays that of the base size ("independent" decay; Yang and Hu's own MuAdamW does so too).

    Args:
      params_shapes: variables, arrays or shapes. axes: names of the axes of each parameter, the stacked one included.
      transfer: of the model, None where it has no base.

    Raises ValueError where model and optimizer do not agree, for sgd and adafactor, for adapters, and for parameters of
    no known kind that no rule gives an `lr_multiplier`.
    """
    options.check()
    if options.parametrization == "standard":
        if transfer is not None:
            raise ValueError(f"config.model.base_width and base_depth scale the model for learning rates that "
                             f"transfer; set {WHERE}.parametrization='mup', or leave them None")
        return options
    if transfer is None:
        raise ValueError(f"{WHERE}.parametrization='mup' needs the size at which learning rates were found: set "
                         f"config.model.base_width, config.model.base_depth, or both")
    plain = dataclasses.replace(options, parametrization="standard")
    rules, unknown = [], []
    # What adam_learning_rate does comes after the rules, so it is left out here.
    for row in table(dataclasses.replace(plain, adam_learning_rate=None), params_shapes):
        if row.frozen or row.name.startswith(f"{STATS}/"):
            continue
        factor = rate(row, axes[row.name], transfer, options)
        if factor is None and not any("lr_multiplier" in rule and re.search(rule["match"], row.name)
                                      for rule in options.rules):
            unknown.append(f"{row.name} {row.shape}")
        elif factor not in (None, 1.0):
            rules.append({"match": f"^{re.escape(row.name)}$", "lr_multiplier": row.lr_multiplier * factor,
                          "weight_decay": row.weight_decay / factor})
    if unknown:
        raise ValueError(f"{WHERE}.parametrization='mup' does not know how the learning rate of {', '.join(unknown)} "
                         f"follows from the width; say it by a rule with lr_multiplier")
    return dataclasses.replace(plain, rules=(*rules, *options.rules))


def rate(row: Row, axes: tuple[str | None, ...], transfer: Transfer, options: OptimizerOptions) -> float | None:
    """What a parameter's learning rate is multiplied by; None where that is not known."""
    if row.optimizer in ("sgd", "adafactor"):
        raise ValueError(f"{WHERE}.parametrization='mup' scales steps of a fixed size, as adamw, lion and muon take; "
                         f"{row.name} is trained by {row.optimizer}")
    if row.name.startswith(("lora/", "state/")):
        raise ValueError(f"{WHERE}.parametrization='mup' is for whole models; {row.name} is trained beside one: leave "
                         f"out config.train.lora_rank and state_tuning, or use parametrization='standard'")
    last, shape = row.name.rpartition("/")[2], row.layer_shape
    if len(shape) < 2 or last in VECTORS or row.name == "head/kernel":
        power = 0.0
    elif not MATRICES.match(last):
        return None
    elif axes[-2] not in WIDE:
        power = 0.0
    elif row.optimizer == "muon":
        # The spectral norm of a step should go as sqrt(fan out / fan in) (Yang, Simon and Bernstein 2023). That of an
        # orthogonal matrix is 1, and goes with the root of the width where its root mean square is fixed.
        power = (0.5 if axes[-1] in WIDE else 1.0) - (0.5 if options.muon_consistent_rms is None else 0.0)
    else:
        power = 1.0
    return transfer.n**-power * (transfer.deep_rate if IN_BLOCKS.match(row.name) else 1.0)
