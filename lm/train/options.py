"""The groups `train`, `mesh`, `checkpoint` and `log` of a config."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from lm.core.fields import check_known, option


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What a run is: how long, how wide, from which seed."""

    steps: int = option(1000, "optimizer steps")
    batch_size: int = option(8, "rows of a batch over all devices and hosts")
    seq_len: int = option(256, "tokens of a row")
    microbatches: int = option(1, "a batch is run in this many pieces, with the exact gradient of the whole")
    seed: int = option(0, "of parameters, dropout and the order of the data")
    on_nonfinite: Literal["stop", "skip"] = option("stop", "at a NaN or infinite loss or gradient: stop with exit "
                                                   "code 76, or skip the update and go on; of pairs only those "
                                                   "that are not finite are skipped")
    spike_sigma: float | None = option(None, "leave out an update whose loss or gradient norm is above the mean of the "
                                             "last spike_window by so many standard deviations; None takes all")
    spike_window: int = option(128, "updates of that mean; the rule begins when half of them are there")
    max_skips: int = option(10, "updates left out in a row (not finite with on_nonfinite='skip', or spikes) after "
                            "which the run does as after_max_skips says")
    after_max_skips: Literal["stop", "rollback"] = option(
        "stop", "stop with exit code 76, or go back to the parameters of the last checkpoint from before and on with "
                "the data from here")
    max_rollbacks: int = option(3, "after going back so many times, stop with exit code 76")
    per_microbatch: bool = option(False, "allow terms that do not add up over microbatches, computed in each alone")
    carry_state: bool = option(False, "truncated backpropagation through time: rows go on from the model's state after "
                                      "the step before; needs data.packing='lanes' and a state of constant size")
    pass_memory: float | None = option(None, "random state passing: probability with which the rows of a batch begin "
                                       "after the feedback memory of the batch before (layers of kind fam)")
    hang_seconds: float | None = option(None, "a step that takes longer (after compilation) ends the run with code 77")
    lora_rank: int | None = option(None, "train adapters of this rank and freeze the rest; None trains everything")
    lora_match: str = option(r".*/kernel", "regular expression of the kernels that get an adapter")
    lora_alpha: float | None = option(None, "adapters count lora_alpha / lora_rank times; None is once")
    dora: bool = option(False, "the lengths of the adapted kernels' columns learn too, apart from their directions")
    state_tuning: bool = option(False, "train the initial states of recurrent layers and freeze the rest; needs rows "
                                       "of one document, data.packing='single'")
    init_from: str | None = option(None, "workdir of another run whose parameters are the start")

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        for name in ("steps", "batch_size", "seq_len", "microbatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"config.train.{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.microbatches:
            raise ValueError(f"config.train.batch_size={self.batch_size} is not divisible by "
                             f"microbatches={self.microbatches}; use a multiple")
        if self.pass_memory is not None and not 0 < self.pass_memory <= 1:
            raise ValueError(f"config.train.pass_memory={self.pass_memory} must be above 0 and at most 1, or None")
        if self.pass_memory is not None and self.carry_state:
            raise ValueError("config.train.pass_memory begins rows after another text and train.carry_state goes on in "
                             "their own; use one of them")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"config.train.seed={self.seed} must be from 0 to 2^32 - 1")
        if self.hang_seconds is not None and self.hang_seconds <= 0:
            raise ValueError(f"config.train.hang_seconds={self.hang_seconds} must be positive, or None")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"config.train.lora_rank={self.lora_rank} must be at least 1, or None")
        for name, given in (("lora_alpha", self.lora_alpha is not None), ("dora", self.dora)):
            if given and self.lora_rank is None:
                raise ValueError(f"config.train.{name} is about adapters, and there are none; set train.lora_rank")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"config.train.lora_alpha={self.lora_alpha} must be above 0, or None")
        for name in ("max_skips", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise ValueError(f"config.train.{name}={getattr(self, name)} must be at least 0")
        self.check_guard()
        try:
            re.compile(self.lora_match)
        except re.error as error:
            raise ValueError(f"config.train.lora_match={self.lora_match!r} is no regular expression: {error}") from None


    @property
    def guard_window(self) -> int | None:
        """Updates that the guard of the train state sees, None where there is none."""
        return self.spike_window if self.spike_sigma is not None or self.after_max_skips == "rollback" else None

    def check_guard(self) -> None:
        """Raises ValueError for a rule about spikes that cannot be followed."""
        if self.spike_sigma is not None and not self.spike_sigma > 0:
            raise ValueError(f"config.train.spike_sigma={self.spike_sigma} must be above 0, or None")
        if self.spike_window < 2:
            raise ValueError(f"config.train.spike_window={self.spike_window} must be at least 2")
        if self.after_max_skips == "rollback" and self.spike_sigma is None and self.on_nonfinite == "stop":
            raise ValueError("config.train.after_max_skips='rollback', and no update is ever left out; set "
                             "train.spike_sigma or train.on_nonfinite='skip'")
        if self.after_max_skips == "rollback" and self.carry_state:
            raise ValueError("config.train.after_max_skips='rollback' goes on with other text than the restored state "
                             "has read, and train.carry_state goes on in its own; use one of them")


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """Devices along each mesh axis of a slice; one may be -1, which fills."""

    data: int = option(-1, "rows of the batch; parameters are copied")
    fsdp: int = option(1, "rows of the batch; parameters and optimizer state are split")
    expert: int = option(1, "experts are split")
    context: int = option(1, "the sequence is split")
    tensor: int = option(1, "heads, hidden widths and vocabulary are split")
    dcn: Mapping[str, int] | None = option(None, "factors of the axes across slices, e.g. {'data': 4}; None puts the "
                                           "number of slices on data")

    def check(self) -> None:
        """Raises ValueError for sizes that fit no number of devices."""
        if min(self.sizes.values()) < -1 or 0 in self.sizes.values() or list(self.sizes.values()).count(-1) > 1:
            raise ValueError(f"config.mesh: sizes must be at least 1, and one of them may be -1 (fill); got "
                             f"{self.sizes}; data is -1 unless it is set")
        for axis, factor in (self.dcn or {}).items():
            check_known([axis], self.sizes, "config.mesh.dcn", "axis")
            if factor < 1:
                raise ValueError(f"config.mesh.dcn.{axis}={factor} must be at least 1")

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis within a slice."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "dcn"}


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """When to save, and what to keep."""

    every: int = option(1000, "steps between checkpoints; the last step is always saved")
    keep: int = option(3, "newest checkpoints that are kept")
    keep_best: int = option(0, "besides them, this many with the lowest `best_metric`")
    best_metric: str = option("eval/validation/loss", "name of an evaluation metric, lower is better")

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        if self.every < 1 or self.keep < 1 or self.keep_best < 0:
            raise ValueError(f"config.checkpoint needs every >= 1, keep >= 1 and keep_best >= 0; got every="
                             f"{self.every}, keep={self.keep}, keep_best={self.keep_best}")


@dataclasses.dataclass(frozen=True)
class LogOptions:
    """Where numbers go, and how often."""

    every: int = option(10, "steps between rows of metrics.jsonl")
    tensorboard: bool = option(True, "write event files under <workdir>/tensorboard")
    wandb_project: str | None = option(None, "project on Weights & Biases; None leaves it off")

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        if self.every < 1:
            raise ValueError(f"config.log.every={self.every} must be at least 1")
