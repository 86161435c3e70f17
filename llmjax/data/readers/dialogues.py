"""Dialogues in the formats in which people publish them: messages, ShareGPT, Alpaca, and prompt with completion."""

from collections.abc import Iterable
import json
from typing import Any, NamedTuple

Message = dict[str, Any]  # "role" and "content", and what else a template reads, such as "tool_calls"

NAMES = {
    "messages": "messages (role, content)",
    "sharegpt": "ShareGPT (from, value)",
    "alpaca": "Alpaca (instruction, input, output)",
    "prompt": "prompt and completion",
}
NO_FIELD = "no field"  # followed by the names of the fields that a record lacks
ASSISTANT = "assistant"
_TURNS = ("messages", "conversations", "conversation")
_OUTPUTS = ("output", "response")
_COMPLETIONS = ("completion", "response")
_ROLES = {  # of ShareGPT
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    "assistant": ASSISTANT,
    "function_call": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}


class Dialogue(NamedTuple):
    """One dialogue.

    format    of the record that it comes from, one of NAMES
    messages  the turns as a chat template reads them
    tools     functions that the assistant may call, as a chat template reads them; None: there are none
    """

    format: str
    messages: list[Message]
    tools: list[Any] | None = None

    @property
    def text(self) -> str:
        """What its turns say, for everything that looks at text: splits, near-duplicates, the tokenizer's training."""
        calls = lambda message: json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
        parts = (part for message in self.messages for part in (message["content"], calls(message)))
        return "\n\n".join(filter(None, parts))


class DialogueError(Exception):
    """A record is no dialogue: the reason."""


def read_dialogue(record: dict[str, Any], chat: str, field: str = "") -> Dialogue:
    """The dialogue of a record.

    chat   its format, one of NAMES; "auto": by its fields
    field  the field of the turns of "messages" and "sharegpt"; "": "messages", "conversations" or "conversation"
    Raises DialogueError for any other record, and for an assistant's turn without content.
    """
    name = _find_format(record, field) if chat == "auto" else chat
    if name == "alpaca":
        instruction, more = _read_text(record, ("instruction",)), _read_text(record, ("input",), is_optional=True)
        question = f"{instruction}\n\n{more}" if more.strip() else instruction
        messages = [_make("user", question), _make(ASSISTANT, _read_text(record, _OUTPUTS))]
    elif name == "prompt":
        messages = [*_read_side(record, ("prompt",), "user"), *_read_side(record, _COMPLETIONS, ASSISTANT)]
    else:
        turns = _read_list(record, _find_field(record, (field,) if field else _TURNS))
        messages = [_read_shared(turn) if name == "sharegpt" else _read_message(turn) for turn in turns]
    system = _read_text(record, ("system",), is_optional=True)
    if system.strip() and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, _make("system", system))
    tools = _read_list(record, "tools") if record.get("tools") else None
    _check(messages, tools)
    return Dialogue(name, messages, tools or None)


def _find_format(record: dict[str, Any], field: str) -> str:
    for name in (field,) if field else _TURNS:
        if record.get(name) is not None:
            first = next(iter(_read_list(record, name)), None)
            return "sharegpt" if isinstance(first, dict) and "from" in first else "messages"
    if field:
        raise DialogueError(f"{NO_FIELD} {field!r}")
    for name in ("instruction", "prompt"):
        if name in record:
            return "alpaca" if name == "instruction" else "prompt"
    listed = ", ".join(map(str, record))[:80]
    raise DialogueError(f"{NO_FIELD} messages, conversations, instruction or prompt (its fields: {listed})")


def _find_field(record: dict[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        if record.get(name) is not None:
            return name
    raise DialogueError(f"{NO_FIELD} {' or '.join(map(repr, names))}")


def _read_text(record: dict[str, Any], names: tuple[str, ...], *, is_optional: bool = False) -> str:
    """The text of the first of these fields that the record has."""
    if is_optional and not any(record.get(name) for name in names):
        return ""
    name = _find_field(record, names)
    value = _decode(record[name])
    if not isinstance(value, str):
        raise DialogueError(f"field {name!r} is not a text")
    return value


def _read_list(record: dict[str, Any], name: str) -> list[Any]:
    """A list, or the list that a text holds as JSON, as tables have it."""
    value = _decode(record[name])
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list):
        raise DialogueError(f"field {name!r} is not a list")
    return value


def _read_side(record: dict[str, Any], names: tuple[str, ...], role: str) -> list[Message]:
    """A prompt or completion: a text, or messages."""
    name = _find_field(record, names)
    if isinstance(record[name], list):
        return [_read_message(turn) for turn in record[name]]
    return [_make(role, _read_text(record, names))]


def _read_shared(turn: Any) -> Message:
    speaker = _decode(turn.get("from")) if isinstance(turn, dict) else None
    if speaker not in _ROLES:
        raise DialogueError(f"a turn is from {speaker!r}, not from {', '.join(_ROLES)}")
    content = _decode(turn.get("value"))
    if not isinstance(content, str):
        raise DialogueError("the value of a turn is not a text")
    return _make(_ROLES[speaker], content) | ({"weight": turn["weight"]} if turn.get("weight") is not None else {})


def _read_message(turn: Any) -> Message:
    """A message as it is, without fields that are null, its content as one text."""
    role = _decode(turn.get("role")) if isinstance(turn, dict) else None
    if not isinstance(role, str) or not role:
        raise DialogueError("a message has no role")
    content = _decode(turn.get("content"))
    if isinstance(content, list):
        content = _join_parts(content)
    if not isinstance(content, str | None):
        raise DialogueError("the content of a message is not a text")
    return {name: value for name, value in turn.items() if value is not None} | _make(role, content or "")


def _join_parts(parts: list[Any]) -> str:
    """Content in parts, such as [{"type": "text", "text": "Hello"}], as one text."""
    for part in parts:
        if not (isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DialogueError(f"a message has content of type {kind!r}, not text")
    return "".join(part if isinstance(part, str) else part["text"] for part in parts)


def _make(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _decode(value: Any) -> Any:
    """The value; of bytes, as tables have them, the text."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise DialogueError("not UTF-8") from None


def _check(messages: list[Message], tools: Any) -> None:
    """Raise DialogueError where nothing can be scored, a turn is empty, or text is not UTF-8."""
    answers = [message for message in messages if message["role"] == ASSISTANT]
    if not answers:
        raise DialogueError("no assistant turn")
    for message in answers:
        if not (message["content"].strip() or message.get("tool_calls") or message.get("function_call")):
            raise DialogueError("an empty assistant turn")
        if message.get("weight", 1) not in (0, 1):
            raise DialogueError(f"the weight of a turn is {message['weight']!r}, not 0 or 1")
    if not any(is_scored(message) for message in messages):
        raise DialogueError("all assistant turns have weight 0")
    try:
        json.dumps([messages, tools], ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:  # bytes, or a lone surrogate
        reason = "lone surrogate" if isinstance(error, UnicodeEncodeError) else "a message is no JSON"
        raise DialogueError(reason) from None


def is_scored(message: Message) -> bool:
    """Whether a turn is scored: the assistant's, unless it has weight 0."""
    return message["role"] == ASSISTANT and message.get("weight", 1) != 0


def describe_formats(counts: dict[str, int]) -> str:
    """How the records of a source were read, such as "1,200 as ShareGPT (from, value)"."""
    ordered: Iterable[tuple[str, int]] = sorted(counts.items(), key=lambda item: -item[1])
    return f"dialogues: {', '.join(f'{count:,} as {NAMES[name]}' for name, count in ordered)}"
