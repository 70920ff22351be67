"""What a step of PEER costs against the number of its experts, with sparse and with dense updates of the table.

Claim: With sparse_tables a train step costs what its active experts cost. From N = 128^2 to 1024^2 experts at equal
    h k, gather, scatter and optimizer take less than 1.5 times as long, the layer takes c0 + c1 sqrt(N), and
    temporaries stay below a tenth of the table; with dense updates time grows with N, and temporaries are larger than
    the table.
Command: lm claim peer_flat_cost --workdir runs/claims/peer_flat_cost
Hardware: 2 CPU cores, 6 GB; six minutes.
Expected: a trial of single steps on a busy machine gave 28 ms at N = 128^2 and 44 ms at 1024^2 for the whole sparse
    step, 12.6 and 21.4 MB of temporaries, and 270 MB for the dense step at 512^2, whose table has 134 MB; the
    thresholds were set after it.

A step has 32 tokens of 8 heads with 16 experts each, 4,096 choices: a quarter of the smallest N, above which a dense
gradient would be chosen. Time at N is measured in turns with time at 128^2, in one process: growth is the median ratio
of a turn. `rows` is gather, scatter and optimizer alone, `layer` forward, backward and update, `step` the whole train
step with what is counted of the experts for the metrics, `dense` the same with dense gradient and AdamW.

The first whole run met every limit and failed by its control: costs that are flat are flat in any order, and 14 of 200
shuffled copies passed. The bytes of each arm's table were made a criterion then, and the run was judged again.
"""

import math
from statistics import median

from ml_collections import ConfigDict

from experiments.claims import base

SIDES = (128, 256, 512, 1024)
MEASURED = ("rows", "layer", "step", "dense")


def get_config() -> ConfigDict:
    """One PEER block; the measure brings its own tokens."""
    config = base.get_config()
    config.model = base.small(embed_dim=64, num_layers=1, prefix=("peer",), pattern=(),
                              peer=dict(num_heads=8, top_k=16, query_norm="layer"))
    config.optimizer.sparse_tables = "adamw"
    config.data = dict(source="pydoc", tokenizer="bytes")
    config.train = dict(batch_size=1, seq_len=32)
    return config


def grid(full: bool = False) -> list[dict]:
    """Every N; the long grid goes to 1448^2, two million."""
    sides = (*SIDES, 1448) if full else SIDES
    return [dict(arm=f"n{side}", seed=seed, measure="table_cost", alone=True,
                 set={"model.peer.num_experts": side**2}) for side in sides for seed in base.SEEDS]


def check(results: list[dict]) -> dict:
    """Growth at 1024^2, the fit of the layer by sqrt(N), exponents of N, and temporaries against the table."""
    growth = {name: {int(arm[1:]): values for arm, values in base.by_arm(results, f"{name}_growth").items()}
              for name in MEASURED}
    bytes_of = {name: base.by_arm(results, f"{name}_bytes") for name in ("table", "step_temporary", "dense_temporary")}
    share = {name: [a / b for arm in (f"n{SIDES[-1]}",) for a, b in
                    zip(bytes_of[f"{name}_temporary"][arm], bytes_of["table"][arm], strict=True)]
             for name in ("step", "dense")}
    layer = {side: median(values) for side, values in growth["layer"].items()}
    large = [side for side in growth["dense"] if side >= 256]
    criteria = [
        base.at_most("gather, scatter and optimizer: time at 1024^2 over 128^2, median of seeds",
                     median(growth["rows"][1024]), 1.5),
        base.at_most("layer: largest miss of a fit c0 + c1 sqrt(N), as a share", miss(layer), 0.2),
        base.at_most("sparse step: exponent of N in its time", exponent(growth["step"], list(growth["step"])), 0.25),
        base.at_least("dense step: exponent of N in its time, from 256^2", exponent(growth["dense"], large), 0.7),
        base.at_most("sparse step at 1024^2: temporaries over the table", max(share["step"]), 0.1),
        base.at_least("dense step at 1024^2: temporaries over the table", min(share["dense"]), 1.0),
        base.at_most("bytes of a table over those of its experts, largest deviation of an arm from the mean",
                     uneven(bytes_of["table"]), 0.01)]
    sides = list(layer)
    figure = {"x": "experts", "y": "time over that at 16,384", "xscale": "log", "yscale": "log",
              "series": {label: {"x": [side**2 for side in sides], "y": [growth[name][side] for side in sides]}
                         for label, name in (("gather, scatter, optimizer", "rows"), ("layer", "layer"),
                                             ("train step, sparse", "step"), ("train step, dense", "dense"))}}
    shown = [f"{name}_{what}" for name in MEASURED for what in ("growth", "seconds")]
    return base.verdict(criteria, (*shown, "step_temporary_bytes", "dense_temporary_bytes", "gradient_rows"), figure)


def uneven(tables: dict[str, list[float]]) -> float:
    """How far the bytes an expert of any result are from their mean, as a share: 0 where each arm has its own table.
    What is flat is flat in any order, and the check would pass on results of which nobody knows which is which."""
    each = [value / int(arm[1:])**2 for arm, values in tables.items() for value in values]
    return max(abs(value / base.mean(each) - 1) for value in each)


def miss(times: dict[int, float]) -> float:
    """The largest |t - (c0 + c1 side)| / t of the least-squares line through {side: t}."""
    c1, c0 = line(list(times), list(times.values()))
    return max(abs(t - c0 - c1 * side) / t for side, t in times.items())


def exponent(times: dict[int, list[float]], sides: list[int]) -> float:
    """The slope of log time against log N, medians of seeds."""
    return line([2 * math.log(side) for side in sides], [math.log(median(times[side])) for side in sides])[0]


def line(x: list[float], y: list[float]) -> tuple[float, float]:
    """(slope, intercept) of the least-squares line."""
    mean_x, mean_y = base.mean(x), base.mean(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x)**2 for a in x)
    return slope, mean_y - slope * mean_x
