"""Chat templates: a list of messages to one text, by the Jinja template that a tokenizer brings or a built-in one."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lm.core.fields import did_you_mean
from lm.data.files import one_file, read_text
from lm.data.hashing import digest
from lm.data.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]

# U+FDD0 and the next are no characters of any text. They stand where a tokenizer has no text for its special ids, and
# around what a template encloses in {% generation %}.
BOS, EOS, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

_PLAIN = """\
{%- if not eos_token %}{{ raise_exception('the template plain ends answers with eos, and the tokenizer has none; ' +
    'take the template text or chatml, or a tokenizer with an eos') }}
{%- endif %}
{%- for message in messages %}
{{- message['role'] | capitalize + ':\\n' + message['content'] + (eos_token if message['role'] == 'assistant' else '') +
    '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:\\n' }}{%- endif %}
"""

# chatml: needs no special tokens, but is short only where the tokenizer has <|im_start|> and <|im_end|>. plain: roles
# as words, answers end with the tokenizer's eos id. text: contents alone, for prompts that are written out already.
BUILT_IN = {
    "chatml": _CHATML,
    "plain": _PLAIN,
    "text": "{%- for message in messages %}{{- message['content'] }}"
            "{%- if message['role'] == 'assistant' and eos_token %}{{- eos_token }}{%- endif %}{%- endfor %}",
}


class BadChat(ValueError):
    """Messages that cannot be rendered; `reason` is the kind of fault, the same words for every row that has it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _raise(message: str) -> None:
    raise BadChat("refused by the template", f"the chat template refuses these messages: {message}")


@functools.cache
def _environment() -> Any:
    """Jinja in its sandbox: a template comes with downloaded weights, and may call nothing of Python's."""
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise ValueError("chat templates need the package jinja2; pip install 'loomlm[data]'") from None

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}, with which a template says itself what an answer is."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    # Jinja's own filter escapes for HTML. `strftime_now` is left undefined: data must not depend on the day.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    return environment


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template. bos, eos: what `bos_token` and `eos_token` stand for in it, None where there is nothing."""

    name: str
    source: str
    bos: str | None = None
    eos: str | None = None

    @functools.cached_property
    def _compiled(self) -> Any:
        environment = _environment()
        import jinja2
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template {self.name} is not Jinja: line {error.lineno}: {error.message}") from None

    def check(self) -> None:
        """Raises ValueError for a template that cannot be compiled."""
        _ = self._compiled

    @property
    def fingerprint(self) -> str:
        """Changes when the text of any messages may change."""
        return digest("chat", self.source, self.bos, self.eos)

    def text(self, messages: Messages, *, prompt: bool = False) -> str:
        """The messages as one text; `prompt` adds what stands before an answer. Raises `BadChat`."""
        import jinja2
        special = {f"{name}_token": text for name, text in (("bos", self.bos), ("eos", self.eos)) if text is not None}
        template = self._compiled
        try:
            return template.render(messages=list(messages), add_generation_prompt=prompt, **special)
        except (jinja2.TemplateError, TypeError) as error:
            _raise(f"{error} (template {self.name})")
            raise AssertionError from error


def _special(tokenizer: Tokenizer, config: Mapping[str, Any], name: str) -> str | None:
    """What bos_token or eos_token is in a template: text that the tokenizer reads as the id, or a stand-in for it."""
    texts: Mapping[str, int] = getattr(tokenizer, "special_tokens", {})
    wanted = getattr(tokenizer, f"{name}_id")
    if wanted is not None:
        return next((text for text, i in texts.items() if i == wanted), BOS if name == "bos" else EOS)
    given = config.get(f"{name}_token")
    given = given.get("content") if isinstance(given, Mapping) else given
    return given if given in texts else None


def _beside(tokenizer: Tokenizer) -> tuple[str | None, dict[str, Any]]:
    """(template, tokenizer_config.json) that lie beside the tokenizer's file."""
    if not hasattr(tokenizer, "file"):
        return None, {}
    folder = epath.Path(tokenizer.file).parent
    config = json.loads(read_text(folder / "tokenizer_config.json")) if (
        folder / "tokenizer_config.json").exists() else {}
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja"), config
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((one["template"] for one in found if one.get("name") == "default"), None)
    return found, config


def load_template(given: str | None, tokenizer: Tokenizer) -> Template:
    """The template for chats with this tokenizer.

    given: None for the one beside the tokenizer's file (chat_template.jinja, or `chat_template` in
    tokenizer_config.json), a name of `BUILT_IN`, the path of a file, or the template itself.
    Raises ValueError where there is none, or it is not Jinja.
    """
    own, config = _beside(tokenizer)
    if given is None and own is None:
        raise ValueError(f"the tokenizer brings no chat template (chat_template.jinja or tokenizer_config.json beside "
                         f"its file); name one: {', '.join(BUILT_IN)}, or the path of a Jinja file")
    if given is None:
        name, source = "of the tokenizer", own
    elif given in BUILT_IN:
        name, source = given, BUILT_IN[given]
    elif re.search(r"\{[{%]", given):
        name, source = "given", given
    elif "/" in given or "." in given:
        name, source = given, read_text(one_file(given, None))
    else:
        raise ValueError(f"no chat template {given!r}{did_you_mean(given, BUILT_IN)}; built in: {', '.join(BUILT_IN)}; "
                         f"or give the path of a Jinja file, or the template itself")
    template = Template(name, source, _special(tokenizer, config, "bos"), _special(tokenizer, config, "eos"))
    template.check()
    return template
