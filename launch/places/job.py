"""What is started, the same for every place: one command, its name, and the variables it gets."""

import os
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|SECRETS|PASSWORD|PASSWD|CREDENTIALS?)($|_)", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Shell commands that make .venv with a Python that the project supports: images of clouds come with older ones.
INSTALL = ("export PATH=$HOME/.local/bin:$PATH", "python3 -m pip install -q --user uv",
           "uv venv -q --allow-existing --python 3.12 .venv")


class Job(NamedTuple):
    """One run. words: the command after `lm`. setup: shell lines that come before it, on every machine."""

    name: str
    workdir: str
    words: tuple[str, ...]
    env: Mapping[str, str]
    setup: tuple[str, ...] = ()

    @property
    def here(self) -> tuple[str, ...]:
        """The command with the interpreter that runs now, for machines that share this one's files."""
        return (sys.executable, "-m", "launch.cli", *self.words)

    @property
    def installed(self) -> tuple[str, ...]:
        """The command where the project is installed by other means."""
        return ("lm", *self.words)

    @property
    def is_remote(self) -> bool:
        """Whether the workdir is in a bucket."""
        return "://" in self.workdir

    @property
    def log_folder(self) -> pathlib.Path:
        """Where this machine keeps what processes print: in the workdir, or beside where it is started for a bucket."""
        return pathlib.Path("logs") / self.name if self.is_remote else pathlib.Path(self.workdir) / "logs"

    def needs_bucket(self, place: str, shared: bool) -> None:
        """Raises ValueError for a workdir on a disk that is gone with its machine."""
        if not self.is_remote and not shared:
            raise ValueError(f"lm launch {place}: --workdir {self.workdir} would lie on the disk of a machine that "
                             f"goes away with the run; give a bucket (gs://BUCKET/PATH), or --shared-workdir where all "
                             f"machines mount that path")


def train_words(config: str | None, workdir: str, overrides: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The `lm train` that says the same."""
    given = () if config is None else ("--config", config)
    return ("train", *given, "--workdir", workdir, *(f"--config.{path.removeprefix('config.')}={text}"
                                            for path, text in overrides))


def name_of(given: str | None, workdir: str) -> str:
    """The given name, checked, or one made of the workdir's last part.

    Names are what Kubernetes, Slurm and Google Cloud all take: lower case letters, digits and dashes, at most 40.
    """
    if given is None:
        made = re.sub(r"[^a-z0-9]+", "-", workdir.rstrip("/").rpartition("/")[2].lower()).strip("-")[:40].rstrip("-")
        return made if NAME.fullmatch(made) else f"lm-{made}"[:40].rstrip("-")
    if not NAME.fullmatch(given):
        raise ValueError(f"--name {given!r} must be at most 40 lower case letters, digits and dashes, with a letter "
                         f"first and no dash last")
    return given


def parse_env(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words as a mapping. Raises ValueError for what is none, and for secrets: what is made is kept."""
    out = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not _VARIABLE.fullmatch(name):
            raise ValueError(f"--env {pair!r} must be NAME=VALUE")
        if _SECRET.search(name):
            raise ValueError(f"--env {name}: a secret would be written into the script; export it before `lm launch "
                             f"local` or `slurm`, name a Kubernetes secret with `gke --secret`, or put it into a file "
                             f"that only you can read, such as ~/.netrc for wandb, on the machine")
        out[name] = value
    return out


def quoted(words: Sequence[str]) -> str:
    """Words as one shell command."""
    return shlex.join(words)


def exports(env: Mapping[str, str]) -> list[str]:
    """Shell lines that set the variables."""
    return [f"export {name}={shlex.quote(value)}" for name, value in env.items()]


def yaml_text(data: Any) -> str:
    """Plain data as YAML, text of several lines as it is."""
    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, width=1000)


def absolute(path: str) -> str:
    """A local path from the root, a bucket as it is."""
    return path if "://" in path else os.path.abspath(path)
