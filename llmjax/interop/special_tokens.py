"""Special tokens of a published folder: stop ids, what frames a prompt, added tokens.

Several files speak of them. They are read in the order in which transformers lets one override the other.
"""

from collections.abc import Callable, Iterator
import dataclasses
import json
from typing import Any

from etils import epath

from llmjax.data.store.tokenizer_kinds import EOS_NAMES
from llmjax.data.store.tokenizer_settings import TokenizerSettings
from llmjax.errors import UserError

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_T5_CLASSES = ("T5Tokenizer", "T5TokenizerFast")
_T5_TYPES = ("t5", "mt5", "umt5")
_T5_SENTINELS = 100  # where tokenizer_config.json does not count them


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the tokenizer's own file says.

    size            number of its ids
    find            piece -> id; None for one that it lacks
    special         names that prompts become ids by
    eos             of a SentencePiece model; None elsewhere
    prefix, suffix  ids that its post-processor puts around a text; None where it has no post-processor
    """

    size: int
    find: Callable[[str], int | None]
    special: frozenset[str]
    eos: int | None = None
    frame: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def read(
    folder: epath.Path, kind: str, content: bytes, hf: dict[str, Any], *, num_rows: int | None
) -> TokenizerSettings:
    """The settings of the tokenizer `content` beside the config.json `hf` of a model with `num_rows` ids.

    Raises UserError for a file with a value of a wrong kind, and where no file names a token that ends texts.
    """
    config = read_optional(folder, "tokenizer_config.json")
    named = {**read_optional(folder, "special_tokens_map.json"), **config}
    generation = read_optional(folder, "generation_config.json")
    own = _read_sentencepiece(content) if kind == "sentencepiece" else _read_json(content)
    t5 = _is_t5(config, hf)
    added = _added_tokens(folder, named, own, sentinels=t5 and kind == "sentencepiece")
    ids = {token["content"]: token["id"] for token in added}

    def find(name: str | None) -> int | None:
        if name is None:
            return None
        return ids[name] if name in ids else own.find(name)

    roles = {role: find(_name(named, f"{role}_token")) for role in _ROLES}
    prefix, suffix = _frame(config, roles, own, t5)
    stop_ids = (
        _ids(generation, "generation_config.json")
        or _ids(hf, "config.json")
        or _ids(hf.get("text_config") or {}, "config.json: text_config")
        or _first(roles["eos"], own.eos, roles["sep"], *suffix[:1])
        or _first(*(own.find(name) for name in EOS_NAMES if name in own.special))
    )
    if not stop_ids:
        raise UserError(f"{folder}: no file names the token that ends a text; set eos_token_id in config.json")
    pad = hf.get("pad_token_id")
    pad = pad if type(pad) is int and pad >= 0 else roles["pad"]
    return TokenizerSettings(
        eos_id=roles["eos"] if roles["eos"] in stop_ids else stop_ids[0],
        stop_ids=stop_ids,
        bos_id=prefix[0] if prefix else None,
        pad_id=pad if pad is None or num_rows is None or pad < num_rows else None,
        unk_id=roles["unk"],
        prefix=prefix,
        suffix=suffix,
        added_tokens=tuple(added),
        num_rows=num_rows,
        prefix_space=bool(config.get("legacy", False)) or _trims_spaces(content, kind),
        space_marks=_space_marks(config, hf, content) if kind == "huggingface" else "",
    )


def _space_marks(config: dict[str, Any], hf: dict[str, Any], content: bytes) -> str:
    """Where transformers adds space marks for a LlamaTokenizer, which ignores what tokenizer.json says of spaces.

    "" where transformers reads the file as it is: for other classes, other models, and byte-level files.
    """
    if hf.get("model_type") != "llama" or config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return ""
    parts = json.loads(content)
    if not parts["model"].get("byte_fallback") or "ByteLevel" in json.dumps(parts.get("pre_tokenizer")):
        return ""
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") else "first"


def read_optional(folder: epath.Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a folder; {} where there is no such file. UserError where it is anything else."""
    if not (folder / name).exists():
        return {}
    try:
        found = json.loads((folder / name).read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / name}: not JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{folder / name}: not a JSON object; fetch it again")
    return found


def _ids(fields: Any, where: str) -> tuple[int, ...]:
    """The value of eos_token_id: an id, or a list of them; () where it is absent."""
    value = fields.get("eos_token_id") if isinstance(fields, dict) else None
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in listed):
        raise UserError(f"{where}: eos_token_id={value!r}: expected a token id, or a list of them")
    return tuple(dict.fromkeys(listed))


def _name(fields: dict[str, Any], field: str) -> str | None:
    """The content of a token, which files give as a text or as an object with properties."""
    return _content(fields.get(field), f"tokenizer_config.json: {field}")


def _content(value: Any, where: str) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str | None):
        raise UserError(f"{where}={value!r}: expected a token's text")
    return content


def _added_tokens(folder: epath.Path, named: dict[str, Any], own: Vocabulary, *, sentinels: bool) -> list[dict]:
    """Entries for the tokens that the tokenizer's own file lacks, or has as ordinary pieces."""
    entries: dict[str, dict[str, Any]] = {}

    def add(name: str | None, number: int | None, properties: Any = None) -> None:
        if name is None or name in own.special or name in entries:
            return
        if number is None and (number := own.find(name)) is None:
            number = max(own.size, 1 + max((entry["id"] for entry in entries.values()), default=0))
        entries[name] = _entry(name, number, properties)

    for number, properties in sorted(_numbered(named.get("added_tokens_decoder"))):
        add(_content(properties, "tokenizer_config.json: added_tokens_decoder"), number, properties)
    listed = read_optional(folder, "added_tokens.json")
    if not all(type(number) is int for number in listed.values()):
        raise UserError(f"{folder / 'added_tokens.json'}: expected an id for each token")
    roles = {_name(named, f"{role}_token") for role in _ROLES}
    for name, number in sorted(listed.items(), key=lambda item: item[1]):
        add(name, number, {"special": name in roles})
    if sentinels:
        count = named.get("extra_ids", _T5_SENTINELS)
        if type(count) is not int or count < 0:
            raise UserError(f"tokenizer_config.json: extra_ids={count!r}: expected a number of sentinels")
        for number in range(count):  # the first one has the highest id
            add(f"<extra_id_{number}>", own.size + count - 1 - number)
    for role in _ROLES:
        add(_name(named, f"{role}_token"), None)
    for field in ("additional_special_tokens", "extra_special_tokens"):
        more = named.get(field) or []
        for value in more.values() if isinstance(more, dict) else more if isinstance(more, list) else []:
            add(_content(value, f"tokenizer_config.json: {field}"), None)
    return sorted(entries.values(), key=lambda entry: entry["id"])


def _numbered(decoder: Any) -> Iterator[tuple[int, Any]]:
    for number, properties in (decoder or {}).items() if isinstance(decoder, dict | None) else ():
        if not number.isdecimal():
            raise UserError(f"tokenizer_config.json: added_tokens_decoder holds the id {number!r}: expected a number")
        yield int(number), properties


def _entry(name: str, number: int, properties: Any) -> dict[str, Any]:
    given = properties if isinstance(properties, dict) else {}
    flags = {flag: bool(given.get(flag, False)) for flag in ("single_word", "lstrip", "rstrip")}
    special = bool(given.get("special", True))
    return {
        "id": number,
        "content": name,
        **flags,
        "normalized": bool(given.get("normalized", not special)),
        "special": special,
    }


def _frame(
    config: dict[str, Any], roles: dict[str, int | None], own: Vocabulary, t5: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after a text: as the post-processor has it, unless tokenizer_config.json says otherwise."""
    if t5:
        return (), _first(roles["eos"], own.eos)
    if own.frame is not None and not {"add_bos_token", "add_eos_token"} & config.keys():
        return own.frame
    before = _first(roles["bos"]) if config.get("add_bos_token") else ()
    return before, _first(roles["eos"]) if config.get("add_eos_token") else ()


def _is_t5(config: dict[str, Any], hf: dict[str, Any]) -> bool:
    """Whether transformers reads the folder with its class for T5, which sets the form of prompts itself."""
    if "tokenizer_class" in config:
        return config["tokenizer_class"] in _T5_CLASSES
    return hf.get("model_type") in _T5_TYPES


def _first(*ids: int | None) -> tuple[int, ...]:
    return next(((i,) for i in ids if i is not None), ())


def read_frame(made: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Ids that the post-processor of a tokenizers.Tokenizer puts before and after a text; None: it has none."""
    if made.post_processor is None:
        return None
    alone = made.encode("a", add_special_tokens=False).ids
    framed = made.encode("a", add_special_tokens=True).ids
    at = next(i for i in range(len(framed) + 1) if framed[i : i + len(alone)] == alone)
    return tuple(framed[:at]), tuple(framed[at + len(alone) :])


def _read_json(content: bytes) -> Vocabulary:
    import tokenizers

    try:
        made = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise UserError(f"not a tokenizer.json ({error}); fetch it again") from None
    made.no_truncation()
    made.no_padding()
    size = 1 + max(made.get_vocab(with_added_tokens=True).values())
    special = frozenset(token.content for token in made.get_added_tokens_decoder().values())
    return Vocabulary(size, made.token_to_id, special, frame=read_frame(made))


def _read_sentencepiece(content: bytes) -> Vocabulary:
    import sentencepiece

    try:
        made = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise UserError(f"not a SentencePiece model ({error}); fetch it again") from None
    if not made.vocab_size():
        raise UserError("not a SentencePiece model (it is empty); fetch it again")
    pieces = {made.id_to_piece(i): i for i in range(made.vocab_size())}
    special = frozenset(name for name, i in pieces.items() if made.is_control(i) or made.is_unknown(i))
    return Vocabulary(len(pieces), pieces.get, special, eos=made.eos_id() if made.eos_id() >= 0 else None)


def _trims_spaces(content: bytes, kind: str) -> bool:
    """Whether a SentencePiece model removes spaces at both ends, so that every stretch of text begins with its own."""
    if kind != "sentencepiece":
        return False
    import sentencepiece

    made = sentencepiece.SentencePieceProcessor(model_proto=content)
    return made.encode("  a ") == made.encode("a")
