"""Chat templates: messages become the text, and the token ids, that a chat model reads."""

from collections.abc import Sequence
import dataclasses
import datetime
import functools
import json
from pathlib import Path
import re
from typing import Any

import numpy as np

from llmjax.data.readers.dialogues import Message
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError

TEMPLATE_FILE = "chat_template.jinja"  # beside a tokenizer
_TOKEN_FIELDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Unicode reserves these code points for use inside a program: no text contains them.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
# For tokenizers of llmjax, which come without a template: roles as ordinary text, and EOS at the end of a turn.
DEFAULT_SOURCE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|' + message.role + '|>\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message.content -}}
{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
"""


class RefusedDialogueError(UserError):
    """A chat template raises an error for a dialogue."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template as transformers writes it.

    source   the template
    tokens   names of special tokens that it can write: {"bos_token": "<s>", ...}
    where    the file that it comes from, for error messages
    """

    source: str
    tokens: dict[str, str]
    where: str

    @property
    def marks_generation(self) -> bool:
        """Whether {% generation %} blocks mark what the assistant writes."""
        return bool(_GENERATION.search(self.source))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        marks: tuple[str, str] = ("", ""),
    ) -> str:
        """The text of a dialogue; with `add_generation_prompt` up to where the assistant's turn begins.

        marks   what is written before and after each {% generation %} block
        Raises UserError if the template is no valid Jinja, and RefusedDialogueError if it fails for these messages.
        """
        import jinja2

        begin, end = marks
        try:
            return _compile(self.source).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                generation_begin=begin,
                generation_end=end,
                **self.tokens,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{self.where}: line {error.lineno} is not valid Jinja ({error.message})") from None
        except jinja2.TemplateError as error:
            raise RefusedDialogueError(f"{self.where}: the chat template refuses these messages ({error})") from None
        except Exception as error:  # a template is a program: it can add text to numbers, or divide by zero
            what = f"{type(error).__name__}: {error}"
            raise RefusedDialogueError(f"{self.where}: the chat template fails ({what})") from None

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = True
    ) -> np.ndarray:
        """The ids of a dialogue, int32; with `add_generation_prompt` up to where the assistant's turn begins.

        Special tokens come from the template only: the name of one inside a message is encoded as ordinary text.
        Raises UserError as `render` does, for text that is not UTF-8, and for a template that changes what it writes
        where a message names a special token.
        """
        check_messages(messages)
        names = tokenizer.special_token_pattern
        broken, breaker = self.break_names(list(messages), names)
        text = self.render(broken, add_generation_prompt=add_generation_prompt)
        if breaker:
            plain = self.render(messages, add_generation_prompt=add_generation_prompt)
            self.check_unchanged(text, plain, breaker, messages, names)
        return tokenizer.encode_prompt(text, breaker)

    def break_names(self, value: Any, names: re.Pattern[str] | None) -> tuple[Any, str]:
        """(messages in which the names of special tokens are broken, the character that breaks them).

        value   messages, or anything else of JSON
        names   matches the names of special tokens; None: there are none
        The character is "" where no message has such a name.
        """
        contents = json.dumps(value, ensure_ascii=False)
        if names is None or not names.search(contents):
            return value, ""
        breaker = self.find_unused_characters(contents, 1)[0]
        return _break_names(value, names, breaker), breaker

    def find_unused_characters(self, contents: str, count: int) -> list[str]:
        """Characters that are neither in the template nor in the contents of messages. Raises UserError without."""
        unused = [c for c in _NONCHARACTERS if c not in self.source and c not in contents]
        if len(unused) < count:
            raise RefusedDialogueError(
                "the messages contain every noncharacter of Unicode (U+FDD0 to U+FDEF); remove one of them"
            )
        return unused[:count]

    def check_unchanged(self, broken: str, text: str, breaker: str, value: Any, names: re.Pattern[str] | None) -> None:
        """Raise RefusedDialogueError if broken names change more of what the template writes than themselves."""
        if broken.replace(breaker, "") != text:
            assert names is not None
            found = ", ".join(sorted(set(names.findall(json.dumps(value, ensure_ascii=False)))))
            raise RefusedDialogueError(
                f"{self.where}: the chat template treats {found} in a message as its own; remove it there"
            )


def check_messages(messages: Sequence[Message]) -> None:
    """Raise UserError for bytes from the shell that are not UTF-8."""
    for message in messages:
        try:
            str(message.get("content", "")).encode()
        except UnicodeEncodeError:
            raise UserError(f"the text {message['content']!r} contains bytes that are not UTF-8; give UTF-8") from None


def read_template(folder: Any, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template in the folder of an imported tokenizer (a Path, or an epath.Path); None if it has none."""
    if (found := find_template(folder)) is None:
        return None
    return ChatTemplate(found[0], read_token_names(folder, tokenizer), found[1])


def copy_template(store: Path, folder: Any) -> None:
    """Copy the template of the dialogues that a run was trained on from its token store, if it has one."""
    if (template := store / TEMPLATE_FILE).exists():
        (folder / TEMPLATE_FILE).write_bytes(template.read_bytes())


def find_template(folder: Any) -> tuple[str, str] | None:
    """(source, file) of the chat template in the folder of a tokenizer; None if it has none.

    chat_template.jinja comes before chat_template.json and tokenizer_config.json, as in transformers.
    """
    if (path := folder / TEMPLATE_FILE).exists():
        return _read_text(path), str(path)
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = _read_json(folder / name).get("chat_template")
        if isinstance(value, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
            value = named.get("default")
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(f"{folder / name}: chat_template is neither a text nor a list with one named 'default'")
        return value, str(folder / name)
    return None


def read_token_names(folder: Any, tokenizer: Tokenizer) -> dict[str, str]:
    """The names of special tokens that a template can write, from the files of a tokenizer and the tokenizer itself."""
    config = _read_json(folder / "tokenizer_config.json")
    fields = {**_read_json(folder / "special_tokens_map.json"), **config}
    names = {field: _token_name(fields.get(field)) for field in _TOKEN_FIELDS}
    own_names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    own = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    tokens = {field: own_names[i] for field, i in own.items() if i in own_names}
    return tokens | {field: name for field, name in names.items() if name is not None}


@functools.lru_cache(8)
def _compile(source: str) -> Any:
    """The template in the environment that transformers gives to templates: sandboxed, since they are foreign code."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_extension(), jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


@functools.cache
def _generation_extension() -> Any:
    """The extension that reads {% generation %} ... {% endgeneration %}, which marks what the assistant writes."""
    import jinja2.ext
    import jinja2.nodes

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (
                jinja2.nodes.Output([jinja2.nodes.Name(f"generation_{side}", "load", lineno=line)], lineno=line)
                for side in ("begin", "end")
            )
            return [begin, jinja2.nodes.Scope(body, lineno=line), end]

    return Generation


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **options: Any) -> str:
    """Unlike Jinja's own filter, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **options)


def _break_names(value: Any, names: re.Pattern[str], breaker: str, key: str = "") -> Any:
    """The value with `breaker` after the first character of each special token's name in its texts, roles excepted."""
    if isinstance(value, str) and key != "role":
        return names.sub(lambda match: match[0][0] + breaker + match[0][1:], value)
    if isinstance(value, dict):
        return {name: _break_names(item, names, breaker, name) for name, item in value.items()}
    return [_break_names(item, names, breaker) for item in value] if isinstance(value, list) else value


def _token_name(value: Any) -> str | None:
    """The content of a token, which files give as a text or as an object with properties."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _read_text(path: Any) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); fetch it again") from None


def _read_json(path: Any) -> dict[str, Any]:
    """The object in a file; {} if there is no file."""
    if not path.exists():
        return {}
    try:
        fields = json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected a JSON object; fetch it again")
    return fields
