"""What a person sees of a run: one live line on a terminal, a plain line every few steps elsewhere."""

import collections
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

SEPARATOR = "  "
BAR_WIDTH = (8, 40)  # least, most


def short_number(value: float) -> str:
    """Three significant digits with k, M, G or T: 12345 -> 12.3k."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def duration(seconds: float) -> str:
    """H:MM:SS, or days before it: 93784 -> 1d 2:03:04."""
    days, rest = divmod(int(seconds + 0.5), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock


def fields(step: int, total: int, *, loss: float, bits_per_byte: float | None, tokens_per_sec: float | None,
           mfu: float | None, eta: float | None) -> list[str]:
    """The parts of a progress line. An MFU of None is said to be of an unknown device; other unknowns are left out."""
    out = [f"step {step:>{len(str(total))}}/{total}", f"loss {loss:.4f}"]
    if bits_per_byte is not None:
        out.append(f"{bits_per_byte:.3f} bits/byte")
    if tokens_per_sec is not None:
        out.append(f"{short_number(tokens_per_sec)} tok/s")
        out.append("MFU: unknown device" if mfu is None else f"MFU {100 * mfu:.1f}%")
    if eta is not None:
        out.append(f"ETA {duration(eta)}")
    return out


def fit(parts: list[str], fraction: float, width: int) -> str:
    """The parts on one line of at most `width` characters, with a bar after the first one where there is room. Where
    there is too little, the first and the last part (step and ETA) stay and the middle is cut from its end."""
    order = [0, len(parts) - 1, *range(1, len(parts) - 1)] if len(parts) > 2 else list(range(len(parts)))
    kept: set[int] = set()
    for n in order:
        if len(SEPARATOR.join(parts[k] for k in sorted(kept | {n}))) > width:
            break
        kept.add(n)
    if not kept:
        return parts[0][:max(width, 0)]
    shown = [parts[k] for k in sorted(kept)]
    room = width - len(SEPARATOR.join(shown)) - len(SEPARATOR)
    if len(kept) == len(parts) and room >= BAR_WIDTH[0]:
        size = min(room, BAR_WIDTH[1])
        done = int(size * min(max(fraction, 0.0), 1.0))
        shown.insert(1, "━" * done + "─" * (size - done))
    return SEPARATOR.join(shown)


class Eta:
    """Seconds left, from the pace of the last updates. The first update follows compilation, so the pace is known from
    the second one on."""

    def __init__(self, total: int, clock: Callable[[], float], memory: int = 32):
        self.total, self.clock = total, clock
        self._seen: collections.deque[tuple[int, float]] = collections.deque(maxlen=memory)

    def update(self, step: int) -> float | None:
        """The estimate after `step` finished steps; None while unknown."""
        self._seen.append((step, self.clock()))
        (first, began), (last, now) = self._seen[0], self._seen[-1]
        return (now - began) / (last - first) * max(self.total - step, 0) if last > first else None


class Progress:
    """Shows how far a run is. `update` may be called as often as one likes: a terminal is redrawn at most ten times a
    second, and elsewhere a line is printed every `every` steps and at the last one.

    total_steps: of the whole run. start_step: finished before this process. quiet: show nothing, as processes other
    than 0 want it. stream: where to; None is stderr.
    """

    def __init__(self, total_steps: int, start_step: int = 0, every: int = 10, *, quiet: bool = False,
                 stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self.total_steps, self.every, self.quiet = total_steps, every, quiet
        self.stream = sys.stderr if stream is None else stream
        self.live: Any = None
        self._clock, self._eta = clock, Eta(total_steps, clock)
        self._printed, self._redrawn, self._line = start_step, -1.0, ""

    @property
    def on_terminal(self) -> bool:
        """Whether a line can be redrawn in place."""
        return self.stream.isatty() and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")

    def __enter__(self) -> "Progress":
        if not self.quiet and self.on_terminal:
            from rich.console import Console
            from rich.live import Live
            # rich sends what others print above the line; stdout only when it is this terminal and not a pipe.
            self.live = Live(console=Console(file=self.stream, highlight=False, soft_wrap=False), auto_refresh=False,
                             redirect_stdout=sys.stdout.isatty(), redirect_stderr=self.stream is sys.stderr)
            self.live.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.live is not None:
            live, self.live = self.live, None
            live.stop()

    def update(self, step: int, *, loss: float, bits_per_byte: float | None = None,
               tokens_per_sec: float | None = None, mfu: float | None = None) -> None:
        """Shows the state after `step` finished steps. loss: nats a token; mfu: from 0 to 1, None where unknown."""
        parts = fields(step, self.total_steps, loss=loss, bits_per_byte=bits_per_byte, tokens_per_sec=tokens_per_sec,
                       mfu=mfu, eta=self._eta.update(step))
        if self.quiet:
            return
        if self.live is None:
            # Rows do not always fall on multiples of `every` (a resume may start between them).
            if step // self.every > self._printed // self.every or step >= self.total_steps > self._printed:
                self._printed = step
                self._print(SEPARATOR.join(parts))
            return
        now = self._clock()
        if now - self._redrawn >= 0.1 or step >= self.total_steps:
            from rich.text import Text
            self._redrawn = now
            width = self.live.console.width - 1  # the last column makes some terminals wrap
            self.live.update(Text(fit(parts, step / self.total_steps, width), no_wrap=True, overflow="crop"),
                             refresh=True)

    def note(self, text: str) -> None:
        """Prints text on lines of its own, above the live line. Nothing where quiet. Control characters, which a sample
        of an untrained model is full of, are shown escaped and not sent to the terminal."""
        if self.quiet:
            return
        text = "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)
        if self.live is None:
            self._print(text)
        else:
            self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _print(self, line: str) -> None:
        print(line, file=self.stream, flush=True)
