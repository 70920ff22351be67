"""What reaches stderr: our messages, and of libraries only what is wrong, unless asked."""

import logging

import pytest

from launch import console


@pytest.fixture(autouse=True)
def loggers_are_put_back(monkeypatch):
    names = ("", *console.OWN, *console.CHATTY)
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = logging.getLogger().handlers[:]
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    yield
    logging.getLogger().handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def speak():
    for name in ("lm.train.loop", "absl", "jax._src.x", "other"):
        for level in ("debug", "info", "warning", "error"):
            getattr(logging.getLogger(name), level)("%s", f"<{level}>")


def test_our_messages_and_the_errors_of_libraries_are_shown(capsys):
    console.set_up_logging()
    speak()
    assert capsys.readouterr().err.splitlines() == [
        "<info>", "warning: <warning>", "error: <error>", "error: absl: <error>", "error: jax._src.x: <error>",
        "warning: other: <warning>", "error: other: <error>"]


def test_what_our_code_says_by_the_logger_of_absl_is_ours(capsys):
    console.set_up_logging()
    code = "from absl import logging\nlogging.info('resumed')\nlogging.warning('odd')"
    exec(compile(code, str(console.pathlib.Path(console.__file__)), "exec"))
    exec(compile(code, "/site-packages/orbax/x.py", "exec"))
    assert capsys.readouterr().err == "resumed\nwarning: odd\n"


def test_verbose_shows_what_libraries_say(capsys):
    console.set_up_logging(1)
    speak()
    lines = capsys.readouterr().err.splitlines()
    assert "absl: <info>" in lines
    assert not any("<debug>" in line for line in lines)


def test_twice_verbose_shows_everything(capsys):
    console.set_up_logging(2)
    speak()
    assert len(capsys.readouterr().err.splitlines()) == 16


def test_set_up_twice_speaks_once(capsys):
    console.set_up_logging(1)
    console.set_up_logging()
    logging.getLogger("launch").info("hello")
    assert capsys.readouterr().err == "hello\n"
