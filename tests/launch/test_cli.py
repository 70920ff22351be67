"""The command line: exit codes, one-line errors, flags and overrides, and an answer to --help without imports."""

import logging
import os
import subprocess
import sys
import time
import types

import pytest

from launch import cli, console

EXPERIMENT = """def get_config(heads='4'):
    return dict(model=dict(embed_dim=64, attention=dict(num_heads=int(heads))))
"""


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch):
    """Commands set variables for jax; they must not outlive the test, and no cache is kept."""
    for name in ("JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "off")


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "tiny.py").write_text(EXPERIMENT)
    return str(tmp_path / "tiny.py")


@pytest.fixture
def command(monkeypatch):
    """Installs a subcommand `probe` whose main is the function given."""
    def install(main, add_arguments=lambda parser: None):
        module = types.ModuleType("launch.probe")
        module.main, module.add_arguments = main, add_arguments
        monkeypatch.setitem(sys.modules, "launch.probe", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", ("launch.probe", "for tests"))
    return install


@pytest.fixture(autouse=True)
def loggers_are_put_back():
    loggers = [logging.getLogger(name) for name in ("", *console.OWN, *console.CHATTY)]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


def test_overrides_are_taken_out_in_both_forms():
    argv = ["--config", "f.py", "--config.a.b=1", "--config.c", "-2", "--config.d=x=y", "--flag", "--", "--config.e=1"]
    assert cli.extract_overrides(argv) == (
        ["--config", "f.py", "--flag", "--", "--config.e=1"], [("a.b", "1"), ("c", "-2"), ("d", "x=y")])


@pytest.mark.parametrize("argv", [["--config.a"], ["--config.a", "--config.b=1"]])
def test_an_override_without_a_value_is_refused(argv):
    with pytest.raises(cli.UsageError, match=r"--config\.a needs a value: --config\.a=VALUE"):
        cli.extract_overrides(argv)


def test_a_command_gets_the_shared_flags_its_own_and_the_overrides(command):
    seen = []
    command(lambda args: seen.append(args) or 75, lambda parser: parser.add_argument("--rows", type=int, default=3))
    assert cli.main(["probe", "--config=f.py:a", "--workdir", "w", "--config.train.steps=5", "--rows=4",
                     "--config.loss.z_loss", "1"]) == 75
    args = seen[0]
    assert (args.config, args.workdir, args.rows, args.debug, args.verbose) == ("f.py:a", "w", 4, False, 0)
    assert args.overrides == [("train.steps", "5"), ("loss.z_loss", "1")]


def test_the_home_folder_may_be_written_as_a_tilde(command, monkeypatch):
    seen = []
    monkeypatch.setenv("HOME", "/somewhere")
    command(lambda args: seen.append(args.workdir))
    assert cli.main(["probe", "--workdir=~/runs"]) == 0
    assert seen == ["/somewhere/runs"]


def test_a_command_may_define_a_shared_flag_its_own_way(command):
    seen = []
    command(lambda args: seen.append(args.workdir), lambda parser: parser.add_argument("--workdir", default="here"))
    assert cli.main(["probe"]) == 0
    assert seen == ["here"]


def test_words_may_stand_between_flags_and_a_command_may_have_commands_of_its_own(command):
    seen = []
    command(lambda args: seen.append(args.words), lambda parser: parser.add_argument("words", nargs="*"))
    assert cli.main(["probe", "a", "--debug", "b"]) == 0
    assert seen == [["a", "b"]]

    def subcommands(parser):
        made = parser.add_subparsers(dest="action", required=True)
        made.add_parser("show").add_argument("--rows", type=int)

    command(lambda args: seen.append((args.action, args.rows)), subcommands)
    assert cli.main(["probe", "--debug", "show", "--rows", "2"]) == 0
    assert seen[-1] == ("show", 2)


def test_mistakes_exit_with_2_and_one_line(experiment, capsys):
    for argv, message in [
        (["trian"], "lm: unknown command 'trian'; did you mean 'train'?; commands: train,"),
        (["config", "--wrkdir=x"], "lm config: unknown flag '--wrkdir=x'; did you mean '--workdir'?"),
        (["config", "--config"], "lm config: argument --config: expected one argument"),
        (["config", "--config.train.steps"], "lm config: --config.train.steps needs a value"),
        (["config"], "lm config: give --config FILE.py[:ARG]"),
        (["config", "--config", f"{experiment}.py"], f"lm config: there is no config '{experiment}.py'; did you mean"),
        (["config", "--config", experiment, "--config.train.stepz=3"],
         "lm config: config has no field 'config.train.stepz'; did you mean 'config.train.steps'?"),
        (["config", "--config", f"{experiment}:x"], f"lm config: {experiment} line 2: ValueError: invalid literal"),
        (["config", "--config", f"{experiment}:5"], "lm config: config.model: attention.num_heads=5 does not divide"),
        (["config", "dif", "a", "b"], "lm config: `lm config` takes no words, or `diff A B`; got 'dif a b'"),
    ]:
        assert cli.main(argv) == 2, argv
        out, err = capsys.readouterr()
        assert err.startswith(message), (err, message)
        assert err.count("\n") == 1
        assert out == ""


def test_debug_shows_the_traceback(experiment):
    with pytest.raises(ValueError, match="stepz"):
        cli.main(["config", "--debug", "--config", experiment, "--config.train.stepz=3"])


def test_a_missing_file_is_the_users_and_a_defect_is_not(command, tmp_path, capsys):
    command(lambda args: (tmp_path / "absent").read_text())
    assert cli.main(["probe"]) == 2
    assert "absent" in capsys.readouterr().err

    def defect(args):
        import json
        json.loads("{")  # a ValueError from inside a library

    command(defect)
    with pytest.raises(ValueError, match="Expecting"):
        cli.main(["probe"])

    def crash(args):
        raise RuntimeError("device lost")

    command(crash)
    with pytest.raises(RuntimeError, match="device lost"):
        cli.main(["probe"])


def test_an_interrupt_exits_with_130(command, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    command(interrupt)
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "lm probe: interrupted\n"


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert capsys.readouterr().err == text
    assert cli.main(["config", "--help"]) == 0
    assert "--compile-cache" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") == 2


def test_config_prints_every_field_and_the_schedule(experiment, capsys):
    assert cli.main(["config", "--config", f"{experiment}:8", "--config.train.steps=100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "config.model.attention.num_heads = 8" in lines
    assert "config.train.steps = 100" in lines
    assert "learning rate over 100 steps (cosine)" in lines
    assert "  step   5  1.000e-03" in lines  # the peak after a warm-up of 5%
    assert cli.main(["config", "--json", "--config", experiment]) == 0
    from launch.config import from_json
    assert from_json(capsys.readouterr().out)["model"]["attention"]["num_heads"] == 4


def test_config_diff_compares_resolved_configs(experiment, tmp_path, capsys):
    assert cli.main(["config", "diff", experiment, f"{experiment}:8"]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [["field", experiment, f"{experiment}:8"], ["config.model.attention.num_heads", "4", "8"]]
    (tmp_path / "config.json").write_text('{"model": {"embed_dim": 64, "attention": {"num_heads": 4}}}')
    assert cli.main(["config", "diff", experiment, str(tmp_path)]) == 0
    assert "equal" in capsys.readouterr().out
    assert cli.main(["config", "diff", "--json", experiment, f"{experiment}:8"]) == 1
    assert '"config.model.attention.num_heads"' in capsys.readouterr().out


def run(*words, **environ):
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "TF_CPP"))}
    return subprocess.run([sys.executable, "-m", "launch.cli", *words], capture_output=True, text=True, timeout=120,
                          env={**keep, "JAX_COMPILATION_CACHE_DIR": "off", **environ}, check=False)


def test_help_answers_without_importing_anything_heavy():
    code = ("import sys; from launch import cli; cli.main(['--help']); "
            "heavy = {'jax', 'numpy', 'flax', 'ml_collections', 'rich', 'orbax'} & set(sys.modules); "
            "sys.exit(repr(heavy) if heavy else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    best = min(_seconds("--help") for _ in range(3))
    assert best < 0.3 * max(1, 10 * min(_seconds_of_python() for _ in range(2))), best


def _seconds(*words):
    start = time.perf_counter()
    assert run(*words).returncode == 0
    return time.perf_counter() - start


def _seconds_of_python():
    """Of a Python that does nothing: the limit grows with it where the machine is slow or busy."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], timeout=60, check=True)
    return time.perf_counter() - start


def test_the_process_exits_with_the_code_and_stays_quiet(experiment):
    done = run("config", "--config", experiment, "--config.model.embed_dm=3")
    assert done.returncode == 2
    assert done.stderr == ("lm config: config has no field 'config.model.embed_dm'; "
                           "did you mean 'config.model.embed_dim'?\n")
    done = run("config", "--config", experiment)
    assert (done.returncode, done.stderr) == (0, "")
