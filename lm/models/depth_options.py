"""The entry `recurrent_depth` of the config group `model`: with it the pattern is a core that is looped."""

import dataclasses
import math

from lm.core.fields import option
from lm.core.recurrences import check_exit, check_recurrences

ENTRY = "recurrent_depth"
MOST = 10_000  # iterations of a training step, however rare


@dataclasses.dataclass(frozen=True)
class RecurrentDepthOptions:
    """With this entry `prefix` is the prelude and the pattern is the core, which is run r times (see
    [recurrent-depth.md](recurrent-depth.md)). `num_layers` counts the blocks of prelude, core and coda."""

    coda: tuple[str, ...] = option((), "blocks after the loop")
    mean: float = option(32.0, "training draws 1 + Poisson(rate) iterations a step; the rate is log-normal with this "
                               "mean. 0: always one iteration")
    sigma: float = option(0.5, "deviation of the rate's logarithm")
    backprop: int = option(8, "iterations that the gradient goes back through, the last of each step")
    recurrences: int | None = option(None, "iterations outside of training; None is `mean`, rounded")
    exit_kl: float | None = option(None, "outside of training a token stops when an iteration changes its prediction "
                                         "by less than this divergence in nats; None: all iterations")
    cache: int | None = option(None, "states of the core that are kept while decoding; iteration i uses number i "
                                     "modulo this. None is one for each iteration, or with exit_kl a single one")
    warm_start: bool = option(False, "a token that is decoded begins from the last state of the token before it")
    sandwich: bool = option(True, "norm of every sum in all blocks, besides that before each layer")
    scale_embeddings: bool = option(True, "embeddings are multiplied by sqrt(embed_dim)")
    state_std: float = option(math.sqrt(2 / 5), "deviation of the random state before the first iteration; 0 begins "
                                                "from zeros")

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        where = f"config.model.{ENTRY}."
        for name in ("mean", "sigma", "state_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{where}{name}={getattr(self, name)} must be at least 0 and finite")
        for name in ("backprop", "cache"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{where}{name}={value} must be at least 1")
        # Training tabulates the probability of every number up to there.
        if self.mean and (rate := math.log(self.mean) - self.sigma**2 / 2 + 6 * self.sigma) > math.log(MOST):
            raise ValueError(f"{where}mean={self.mean} and sigma={self.sigma}: a draw six deviations up would be of "
                             f"e^{rate:.1f} iterations, and training draws at most {MOST}; lower one of them")
        check_recurrences(self.recurrences, f"{where}recurrences")
        check_exit(self.exit_kl, f"{where}exit_kl")

    @property
    def iterations(self) -> int:
        """Iterations outside of training."""
        return max(1, round(self.mean)) if self.recurrences is None else self.recurrences

    @property
    def slots(self) -> int:
        """States of the core that decoding keeps."""
        wanted = (1 if self.exit_kl is not None else self.iterations) if self.cache is None else self.cache
        return min(wanted, self.iterations)
