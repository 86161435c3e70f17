"""Dialogues to token ids, with a mark on those that are scored: the assistant's turns, end-of-turn tokens included."""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np

from llmjax.atomic import write_bytes
from llmjax.data import chat_template
from llmjax.data.chat_template import ChatTemplate, RefusedDialogueError
from llmjax.data.config import DEFAULT_TEMPLATE, DataConfig
from llmjax.data.readers.dialogues import ASSISTANT, Dialogue, is_scored
from llmjax.data.store.shards import SCORED
from llmjax.data.store.tokenizer import Tokenizer, read_tokenizer_file
from llmjax.data.store.tokenizer_kinds import Bytes
from llmjax.data.store.tokenizer_training import SPECIAL_TOKENS
from llmjax.errors import UserError

_DEFAULT = "the default chat template"
Span = tuple[int, int]


class RenderedDialogue(NamedTuple):
    """A dialogue as text.

    text     up to the end of the last scored turn: the model would read the rest without learning from it
    breaker  the character that breaks the names of special tokens in the contents of messages; "": there are none
    scored   spans of the text, each from the assistant's first character to the end-of-turn token
    """

    text: str
    breaker: str
    scored: list[Span]


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How dialogues become tokens.

    template   as it comes with the tokenizer, or as the config names it
    names      a regular expression for the names of the tokenizer's special tokens
    """

    template: ChatTemplate
    names: str

    def render(self, dialogue: Dialogue, where: str) -> RenderedDialogue:
        """The text of a dialogue, and which spans of it are scored.

        where   the record that it comes from, for errors
        With {% generation %} blocks, these are what is scored. Without, a turn is what the template adds for it to the
        text of the turns before, with the beginning of an answer. Raises RefusedDialogueError if the template fails for
        this dialogue, and UserError if the template itself does not fit: it does not close turns, or changes turns when
        others follow.
        """
        names, content = re.compile(self.names), [dialogue.messages, dialogue.tools]
        (messages, tools), breaker = self.template.break_names(content, names)
        broken = dialogue._replace(messages=messages, tools=tools)
        if self.template.marks_generation:
            text, spans = self._find_blocks(broken, where)
        else:
            text, spans = self._compare_turns(broken, where)
        if breaker:
            plain = self.template.render(dialogue.messages, add_generation_prompt=False, tools=dialogue.tools)
            self.template.check_unchanged(text, plain, breaker, content, names)
        spans = [(begin, self._find_end(text, begin, end, names, where)) for begin, end in spans]
        return RenderedDialogue(text[: spans[-1][1]], breaker, spans)

    def _find_blocks(self, dialogue: Dialogue, where: str) -> tuple[str, list[Span]]:
        """The text, and the spans of its {% generation %} blocks that belong to scored turns."""
        contents = json.dumps(dialogue, ensure_ascii=False)
        begin, end = self.template.find_unused_characters(contents, 2)
        options = {"add_generation_prompt": False, "tools": dialogue.tools}
        marked = self.template.render(dialogue.messages, marks=(begin, end), **options)
        parts, marks = re.split(f"[{begin}{end}]", marked), re.findall(f"[{begin}{end}]", marked)
        text = "".join(parts)
        if text != self.template.render(dialogue.messages, **options) or marks != [begin, end] * (len(marks) // 2):
            raise UserError(
                f"{self.template.where}: a {{% generation %}} block is inside another one, or a filter changes what is "
                "around it; let it contain the assistant's text alone"
            )
        edges = np.cumsum([0, *map(len, parts)]).tolist()
        spans = list(zip(edges[1:-1:2], edges[2::2], strict=True))
        answers = [message for message in dialogue.messages if message["role"] == ASSISTANT]
        if all(map(is_scored, answers)):
            if not spans:
                raise UserError(f"{self.template.where}: {where} has no {{% generation %}} block for its turns; add it")
            return text, spans
        if len(spans) != len(answers):
            raise RefusedDialogueError("some turns have weight 0, and the template has not one block for each turn")
        return text, [span for span, message in zip(spans, answers, strict=True) if is_scored(message)]

    def _compare_turns(self, dialogue: Dialogue, where: str) -> tuple[str, list[Span]]:
        """The text, and what each scored turn adds to the text of the turns before it."""
        messages, tools = dialogue.messages, dialogue.tools
        text = self.template.render(messages, add_generation_prompt=False, tools=tools)
        spans = []
        for number, message in enumerate(messages):
            if not is_scored(message):
                continue
            before = self.template.render(messages[:number], tools=tools)
            after = text
            if number + 1 < len(messages):
                after = self.template.render(messages[: number + 1], add_generation_prompt=False, tools=tools)
            if not (text.startswith(after) and after.startswith(before)):
                if all(earlier["role"] in ("system", ASSISTANT) for earlier in messages[:number]):
                    raise RefusedDialogueError("begins with an assistant turn, which the chat template cannot open")
                raise UserError(
                    f"{self.template.where}: the chat template writes turn {number + 1} of {where} in another way when "
                    "other turns follow or an answer is asked for, so what the assistant writes cannot be found; put "
                    "{% generation %} and {% endgeneration %} around it in a copy of the template, and name the copy "
                    "in data.chat_template"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _find_end(self, text: str, begin: int, end: int, names: re.Pattern[str], where: str) -> int:
        """The end of the last special token of a span, which may be followed by spaces only."""
        last = max(names.finditer(text, begin, end), key=lambda match: match.end(), default=None)
        if last is None or text[last.end() : end].strip():
            raise UserError(
                f"{self.template.where}: the chat template does not close an assistant turn of {where} with a special "
                f"token of the tokenizer (its text ends with {text[max(begin, end - 40) : end]!r}), so the model would "
                "not learn to stop; write eos_token there in a copy of the template, and name the copy in "
                "data.chat_template"
            )
        return last.end()

    def encode(self, rendered: RenderedDialogue, tokenizer: Tokenizer) -> np.ndarray:
        """The token ids of a dialogue, uint32, with the bit SCORED in those that are scored; never the first one.

        What the assistant writes is encoded apart from the text before it: in generation, the prompt ends there.
        """
        text, breaker, spans = rendered
        edges = [0, *(edge for span in spans for edge in span)]
        pieces = [text[begin:end] for begin, end in itertools.pairwise(edges)]
        if _marks_start(tokenizer):
            ids = tokenizer.encode_prompt(text, breaker)
            lengths = np.diff([_find_edge(ids, tokenizer.encode_prompt(text[:edge], breaker)) for edge in edges])
        else:
            parts = [tokenizer.encode_prompt(piece, breaker) if piece else np.zeros(0, np.int32) for piece in pieces]
            ids, lengths = np.concatenate(parts), np.array([len(part) for part in parts])
        is_scored = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        is_scored[:1] = False  # nothing is before the first token that could predict it
        return ids.astype(np.uint32) | np.where(is_scored, SCORED, np.uint32(0))


def _marks_start(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer adds a space at the start of a text, so that a piece of one cannot be encoded by itself."""
    return tokenizer.piece(int(tokenizer.encode_prompt("a")[0])).startswith(b" ")


def _find_edge(ids: np.ndarray, before: np.ndarray) -> int:
    """Where the text of `before` ends in `ids`; a token that reaches beyond it belongs to it."""
    same = ids[: len(before)] == before[: len(ids)]
    return len(before) if same.all() else int(np.argmin(same)) + 1


def make_format(config: DataConfig) -> ChatFormat | None:
    """The chat format of a config's sources; None if none holds dialogues.

    Raises UserError for a chat template that is missing or no text, and for one without a source of dialogues.
    """
    name = next((name for name, source in config.sources.items() if source.chat), None)
    if name is None:
        if config.chat_template:
            raise UserError(
                f"data.chat_template={config.chat_template!r}: no source has dialogues; set data.sources.NAME.chat"
            )
        return None
    try:
        found = _find_template(config)
    except OSError as error:
        raise UserError(
            f"data.chat_template={config.chat_template!r}: {error.strerror}; name a Jinja file, or set it to "
            f"{DEFAULT_TEMPLATE!r} for the template of llmjax"
        ) from None
    if found is None:
        raise UserError(
            f"data.sources.{name}.chat={config.sources[name].chat!r}: there is no chat template beside "
            f"data.tokenizer.path={config.tokenizer.path!r}; name a Jinja file in data.chat_template, or set it to "
            f"{DEFAULT_TEMPLATE!r} for the template of llmjax"
        )
    source, where = found
    if config.tokenizer.kind == "bytes" or config.tokenizer.path:
        path = Path(config.tokenizer.path).expanduser()
        tokenizer = Bytes() if config.tokenizer.kind == "bytes" else read_tokenizer_file(config.tokenizer.kind, path)
        tokens, pattern = chat_template.read_token_names(path.parent, tokenizer), tokenizer.special_token_pattern
        return ChatFormat(ChatTemplate(source, tokens, where), pattern.pattern if pattern else "(?!)")
    tokens = {f"{role}_token": name for role, name in SPECIAL_TOKENS.items()}
    return ChatFormat(ChatTemplate(source, tokens, where), "|".join(map(re.escape, SPECIAL_TOKENS.values())))


def find_end_of_turn(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The id of the token with which a template closes the assistant's turn; () if it does not close it with one."""
    if (names := tokenizer.special_token_pattern) is None:
        return ()
    messages = [{"role": "user", "content": "Hello"}, {"role": ASSISTANT, "content": "Hello"}]
    try:
        text = ChatFormat(template, names.pattern).render(Dialogue("messages", messages), "a dialogue").text
    except UserError:
        return ()
    return tuple(tokenizer.encode_prompt(text)[-1:].tolist())


def hash_template(config: DataConfig) -> str | None:
    """sha256 of the chat template; None if there is no such file (any more)."""
    try:
        found = _find_template(config)
    except OSError:
        return None
    return None if found is None else hashlib.sha256(found[0].encode()).hexdigest()


def _find_template(config: DataConfig) -> tuple[str, str] | None:
    """(source, name for errors) of the chat template; None if the tokenizer's folder has none."""
    own = config.tokenizer.kind == "bytes" or not config.tokenizer.path
    if config.chat_template == DEFAULT_TEMPLATE or (own and not config.chat_template):
        return chat_template.DEFAULT_SOURCE, _DEFAULT
    if config.chat_template:
        path = Path(config.chat_template).expanduser()
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise UserError(f"data.chat_template={config.chat_template!r}: not UTF-8 ({error.reason})") from None
    return chat_template.find_template(Path(config.tokenizer.path).expanduser().parent)


def write_template(template: ChatTemplate, folder: Path) -> None:
    """Write the template so that `chat_template.read_template` finds it in the folder of a store."""
    write_bytes(folder / chat_template.TEMPLATE_FILE, template.source.encode())
    write_bytes(folder / "special_tokens_map.json", json.dumps(template.tokens, indent=2).encode())


def describe_template(chat_format: ChatFormat) -> str:
    """One line on the template, and on how scored turns are found."""
    template = chat_format.template
    how = "its generation blocks are scored" if template.marks_generation else "what it adds for an answer is scored"
    return f"chat template: {template.where}; {how}"
