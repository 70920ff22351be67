"""The progress line on a real pseudo-terminal, and the plain lines elsewhere."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from lm.train.progress import Eta, Progress, duration, fields, fit, short_number

RUN = """
import sys, time
from lm.train.progress import Progress
with Progress(200, 0, 10) as p:
    for step in range(1, 201):
        p.update(step, loss=3.0 - step / 100, bits_per_byte=2.5, tokens_per_sec=12345.0, mfu=None)
        if step == 100:
            p.note("evaluation: [bold] 2.500 bits/byte")
            print("somebody prints")
        time.sleep(0.005)
"""


def run_on_terminal(code, columns=100, rows=24, term="xterm-256color", stdout_too=True):
    """Everything that a program writes to a pseudo-terminal, and what it wrote to a piped stdout."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stderr=theirs, env=env | {"TERM": term},
                               stdout=theirs if stdout_too else subprocess.PIPE)
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux: the other side has closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    piped = b"" if stdout_too else process.stdout.read()
    if process.stdout:
        process.stdout.close()
    assert process.wait(timeout=60) == 0, seen.decode()
    return seen.decode(), piped.decode()


def screen(text, columns):
    """The lines that a terminal shows after `text`: carriage return, newline, cursor up, erase line, wrapping."""
    lines, row, column = [[]], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\n|[^\r\n\x1b]", text):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
        elif token.startswith("\x1b["):
            count, kind = token[2:-1], token[-1]
            if kind == "A":
                row -= int(count or 1)
            elif kind == "K":
                lines[row] = []
        else:
            if column == columns:
                row, column = row + 1, 0
            while len(lines) <= row:
                lines.append([])
            lines[row] += [" "] * (column + 1 - len(lines[row]))
            lines[row][column] = token
            column += 1
        while len(lines) <= row:
            lines.append([])
    return ["".join(line).rstrip() for line in lines]


@pytest.mark.parametrize(("columns", "term"), [(100, "xterm-256color"), (140, "tmux-256color"), (44, "screen")])
def test_a_terminal_shows_one_line_that_is_redrawn_and_notes_above_it(columns, term):
    text, _ = run_on_terminal(RUN, columns, term=term)
    shown = [line for line in screen(text, columns) if line]
    assert shown[0] == "evaluation: [bold] 2.500 bits/byte" and shown[1] == "somebody prints"
    assert len(shown) == 3 and shown[2].startswith("step 200/200") and "loss 1.0000" in shown[2]
    if columns >= 100:
        assert "2.500 bits/byte" in shown[2] and "12.3k tok/s" in shown[2] and "unknown device" in shown[2]
        assert "ETA 0:00:00" in shown[2] and "━" in shown[2]
    assert 3 < text.count("step ") < 60  # redrawn, but at most ten times a second
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


def test_a_piped_stdout_stays_clean_while_stderr_is_a_terminal():
    text, piped = run_on_terminal(RUN, stdout_too=False)
    assert piped == "somebody prints\n" and "somebody" not in text


def test_the_cursor_comes_back_after_an_error():
    code = RUN.replace("if step == 100:", "if step == 50: sys.exit(0)\n        if step == 100:")
    text, _ = run_on_terminal(code)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_dumb_terminal_gets_plain_lines():
    text, _ = run_on_terminal(RUN, term="dumb")
    assert "\x1b" not in text and text.count("step ") == 20


def lines_of(total, start, every, steps):
    out = io.StringIO()
    with Progress(total, start, every, stream=out) as progress:
        for step in steps:
            progress.update(step, loss=1.0)
    return [int(re.match(r"step +(\d+)/", line)[1]) for line in out.getvalue().splitlines()]


def test_a_file_gets_a_line_every_few_steps_and_the_last():
    assert lines_of(25, 0, 10, range(1, 26)) == [10, 20, 25]
    assert lines_of(40, 17, 10, range(18, 41)) == [20, 30, 40]  # resumed
    assert lines_of(40, 0, 10, [7, 14, 21, 28, 35, 40]) == [14, 21, 35, 40]
    assert lines_of(20, 0, 10, [20, 20]) == [20]


def test_quiet_shows_nothing():
    out = io.StringIO()
    with Progress(10, 0, 1, quiet=True, stream=out) as progress:
        progress.update(1, loss=1.0)
        progress.note("nor notes")
    assert out.getvalue() == ""


def test_fields_say_unknown_device_rather_than_a_number():
    common = dict(loss=1.23456, bits_per_byte=None, tokens_per_sec=2.5e6, eta=None)
    assert fields(5, 1000, mfu=None, **common) == ["step    5/1000", "loss 1.2346", "2.5M tok/s", "MFU: unknown device"]
    assert fields(5, 1000, mfu=0.4567, **common)[-1] == "MFU 45.7%"


@pytest.mark.parametrize("width", range(0, 130, 7))
def test_a_line_never_exceeds_the_width(width):
    parts = ["step 10/200", "loss 1.2345", "2.500 bits/byte", "12.3k tok/s", "MFU: unknown device", "ETA 0:01:02"]
    line = fit(parts, 0.5, width)
    assert len(line) <= width
    if width >= 40:
        assert "loss" in line and "ETA" in line


def test_numbers_and_durations():
    assert [short_number(v) for v in (0, 12.34, 999.4, 999.6, 12345, 1.5e6, 3e13)] == \
        ["0", "12.3", "999", "1k", "12.3k", "1.5M", "30T"]
    assert [duration(s) for s in (0, 59.6, 3723, 93784)] == ["0:00:00", "0:01:00", "1:02:03", "1d 2:03:04"]


def test_eta_ignores_the_compile_step_and_follows_the_pace():
    now = [0.0]
    eta = Eta(100, lambda: now[0])
    now[0] = 30.0  # compiled
    assert eta.update(10) is None
    now[0] = 32.0
    assert eta.update(20) == pytest.approx(0.2 * 80)
    now[0] = 34.0
    assert eta.update(30) == pytest.approx(0.2 * 70)


def test_control_characters_in_notes_do_not_reach_the_terminal():
    out = io.StringIO()
    with Progress(10, stream=out) as progress:
        progress.note("sample: a\x1b[2J\rb\n\tcafé \x9b \u202e")
    assert out.getvalue() == "sample: a\\x1b[2J\\rb\n\tcafé \\x9b \\u202e\n"
