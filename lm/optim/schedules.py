"""Learning rates as functions of the step (from 0), and what they look like before anything is run."""

import jax.numpy as jnp
import optax

from lm.optim.options import SCHEDULES, WHERE, OptimizerOptions, known

BARS = "▁▂▃▄▅▆▇█"


def warmup_length(options: OptimizerOptions, total_steps: int) -> int:
    """Steps of warm-up: what the options say, else 5% of all steps, at most 1000."""
    return min(1000, total_steps // 20) if options.warmup_steps is None else options.warmup_steps


def decay_length(options: OptimizerOptions, total_steps: int) -> int:
    """Steps of the final decay: what the options say, else of `wsd` their fraction of all steps, and of `exponential`
    all that follow the warm-up."""
    if options.decay_steps is not None:
        return options.decay_steps
    if options.schedule == "exponential":
        return total_steps - warmup_length(options, total_steps)
    return round(options.decay_fraction * total_steps)


def make_schedule(options: OptimizerOptions, total_steps: int) -> optax.Schedule:
    """Learning rate of a step. After W warm-up steps out of N, with peak p and final fraction f:

    step s < W: linearly from p / W, or from `warmup_start` p where that is more, at the first step to p at step W - 1.
    cosine: from p at step W to f p at step N.  wsd: p until D steps before N, then linearly to f p at step N.
    exponential: p until D steps before N, then p f^(part of D that is over), f p at step N.
    constant: p.  inverse_sqrt: p sqrt(W / (s + 1)), which goes on from the warm-up without a jump (W at least 1).

    Raises ValueError where warm-up and decay do not fit into `total_steps`.
    """
    known(options.schedule, SCHEDULES, f"{WHERE}.schedule")
    peak, final = options.learning_rate, options.final_fraction
    warmup = warmup_length(options, total_steps)
    if warmup > total_steps:
        raise ValueError(f"{WHERE}.warmup_steps={warmup} is more than train.steps={total_steps}; lower it, or leave it "
                         "None for 5% of the steps")
    rest = total_steps - warmup
    if options.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, max(rest, 1), alpha=final)
    elif options.schedule in ("wsd", "exponential"):
        decay = decay_length(options, total_steps)
        if decay > rest:
            raise ValueError(f"{WHERE}: {warmup} warm-up and {decay} decay steps are more than train.steps="
                             f"{total_steps}; lower warmup_steps, decay_steps or decay_fraction")
        if not decay:
            main = optax.constant_schedule(peak)
        elif options.schedule == "wsd":
            main = optax.linear_schedule(peak, final * peak, decay, transition_begin=rest - decay)
        else:
            main = optax.exponential_decay(peak, decay, final, transition_begin=rest - decay, end_value=final * peak)
    elif options.schedule == "inverse_sqrt":
        start = max(warmup, 1)
        main = lambda count: peak * jnp.sqrt(start / (count + start + 1.0 - (warmup == 0)))
    else:
        main = optax.constant_schedule(peak)
    if warmup == 0:
        return main
    rise = optax.linear_schedule(peak * max(1 / warmup, options.warmup_start), peak, max(warmup - 1, 1)) if (
        warmup > 1) else optax.constant_schedule(peak)
    return optax.join_schedules([rise, main], [warmup])


def describe(options: OptimizerOptions, total_steps: int, points: int = 9) -> list[tuple[int, float]]:
    """(step, learning rate) at the corners of the schedule and at `points` even places from 0 to `total_steps`."""
    schedule = make_schedule(options, total_steps)
    warmup = warmup_length(options, total_steps)
    steps = {round(i * total_steps / (points - 1)) for i in range(points)} | {max(warmup - 1, 0), warmup}
    if options.schedule in ("wsd", "exponential"):
        steps.add(total_steps - decay_length(options, total_steps))
    return [(step, float(schedule(step))) for step in sorted(steps)]


def sparkline(options: OptimizerOptions, total_steps: int, width: int = 40) -> str:
    """The schedule as one line of `width` bars, highest bar for the highest learning rate."""
    schedule = make_schedule(options, total_steps)
    values = [float(schedule(round(i * total_steps / (width - 1)))) for i in range(width)]
    top = max(values)
    return "".join(BARS[min(len(BARS) - 1, int(v / top * len(BARS)))] for v in values)
