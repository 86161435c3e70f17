"""Special tokens of a published folder: stop ids, ids around a prompt, added tokens.

Several files define them. They are read in the order in which transformers lets one override the other.
"""

from collections.abc import Callable, Iterator
import dataclasses
import json
from typing import Any

from etils import epath

from llmjax.data.store.tokenizer_kinds import EOS_NAMES
from llmjax.data.store.tokenizer_settings import TokenizerSettings
from llmjax.errors import UserError
from llmjax.interop.files import parse_json

Affixes = tuple[tuple[int, ...], tuple[int, ...]]  # ids that a tokenizer puts before and after a text

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_T5_CLASSES = ("T5Tokenizer", "T5TokenizerFast")
_T5_TYPES = ("t5", "mt5", "umt5")
_T5_SENTINELS = 100  # unless tokenizer_config.json gives their number


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the tokenizer's own file defines.

    size      number of its ids
    find      piece -> id; None for a piece that it lacks
    special   special tokens, which are recognised in texts
    eos_id    of a SentencePiece model; None for others
    affixes   ids that its post-processor puts around a text; None if it has no post-processor
    """

    size: int
    find: Callable[[str], int | None]
    special: frozenset[str]
    eos_id: int | None = None
    affixes: Affixes | None = None


def read(
    folder: epath.Path, kind: str, content: bytes, hf: dict[str, Any], *, num_rows: int | None
) -> TokenizerSettings:
    """The settings of the tokenizer `content` beside the config.json `hf` of a model with `num_rows` ids.

    Raises UserError for a value of a wrong type, and if no file names the token that ends a text.
    """
    config = read_optional(folder, "tokenizer_config.json")
    token_fields = {**read_optional(folder, "special_tokens_map.json"), **config}
    generation = read_optional(folder, "generation_config.json")
    vocabulary = _read_sentencepiece(content) if kind == "sentencepiece" else _read_json(content)
    is_t5 = _is_t5(config, hf)
    added = _collect_added_tokens(folder, token_fields, vocabulary, with_sentinels=is_t5 and kind == "sentencepiece")
    added_ids = {token["content"]: token["id"] for token in added}

    def find(name: str | None) -> int | None:
        if name is None:
            return None
        return added_ids[name] if name in added_ids else vocabulary.find(name)

    roles = {role: find(_read_token_name(token_fields, f"{role}_token")) for role in _ROLES}
    prefix, suffix = _choose_affixes(config, roles, vocabulary, is_t5)
    stop_ids = (
        _read_eos_ids(generation, "generation_config.json", num_rows)
        or _read_eos_ids(hf, "config.json", num_rows)
        or _read_eos_ids(hf.get("text_config") or {}, "config.json: text_config", num_rows)
        or _first_id(roles["eos"], vocabulary.eos_id, roles["sep"], *suffix[:1])
        # No file says it: the usual name, if the tokenizer has it as a special token.
        or _first_id(*(vocabulary.find(name) for name in EOS_NAMES if name in vocabulary.special))
    )
    size = max([vocabulary.size, *(1 + token_id for token_id in added_ids.values())])
    size = size if num_rows is None else min(size, num_rows)
    known_ids = [token_id for token_id in stop_ids if token_id < size]
    if not known_ids:
        raise UserError(
            f"{folder}: no file names the token that ends a text; set eos_token_id in config.json to an id of the "
            f"tokenizer, below {size}"
        )
    pad = hf.get("pad_token_id")
    pad = pad if type(pad) is int and pad >= 0 else roles["pad"]
    return TokenizerSettings(
        eos_id=roles["eos"] if roles["eos"] in stop_ids else known_ids[0],
        stop_ids=stop_ids,
        bos_id=prefix[0] if prefix else None,
        pad_id=pad if pad is None or num_rows is None or pad < num_rows else None,
        unk_id=roles["unk"],
        prefix=prefix,
        suffix=suffix,
        added_tokens=tuple(added),
        num_rows=num_rows,
        prefix_space=bool(config.get("legacy", False)) or _trims_spaces(content, kind),
        space_marks=_choose_space_marks(config, hf, content) if kind == "huggingface" else "",
    )


def _choose_space_marks(config: dict[str, Any], hf: dict[str, Any], content: bytes) -> str:
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
    """The object in a JSON file of a folder; {} if there is no such file. UserError if it contains anything else."""
    path = folder / name
    return parse_json(path.read_bytes(), str(path), unique_keys=False) if path.exists() else {}


def _read_eos_ids(fields: Any, file: str, num_rows: int | None) -> tuple[int, ...]:
    """The ids of eos_token_id, an id or a list, that the model has rows for; () if it is absent."""
    value = fields.get("eos_token_id") if isinstance(fields, dict) else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{file}: eos_token_id={value!r}: expected a token id, or a list of them")
    return tuple(token_id for token_id in dict.fromkeys(ids) if num_rows is None or token_id < num_rows)


def _read_token_name(fields: dict[str, Any], field: str) -> str | None:
    """The content of a token, which files give as a string or as an object with properties."""
    return _read_content(fields.get(field), f"tokenizer_config.json: {field}")


def _read_content(value: Any, field: str) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str | None):
        raise UserError(f"{field}={value!r}: expected a token's text")
    return content


def _collect_added_tokens(
    folder: epath.Path, token_fields: dict[str, Any], vocabulary: Vocabulary, *, with_sentinels: bool
) -> list[dict[str, Any]]:
    """Entries for the tokens that the tokenizer's own file lacks, or has as ordinary pieces."""
    entries: dict[str, dict[str, Any]] = {}

    def add(name: str | None, token_id: int | None, properties: Any = None) -> None:
        if name is None or name in vocabulary.special or name in entries:
            return
        if token_id is None and (token_id := vocabulary.find(name)) is None:
            token_id = max(vocabulary.size, 1 + max((entry["id"] for entry in entries.values()), default=0))
        entries[name] = _make_entry(name, token_id, properties)

    for token_id, properties in sorted(_parse_decoder(token_fields.get("added_tokens_decoder"))):
        add(_read_content(properties, "tokenizer_config.json: added_tokens_decoder"), token_id, properties)
    id_of = read_optional(folder, "added_tokens.json")
    if not all(type(token_id) is int for token_id in id_of.values()):
        raise UserError(f"{folder / 'added_tokens.json'}: expected an id for each token")
    role_names = [_read_token_name(token_fields, f"{role}_token") for role in _ROLES]
    for name, token_id in sorted(id_of.items(), key=lambda item: item[1]):
        add(name, token_id, {"special": name in role_names})
    if with_sentinels:
        count = token_fields.get("extra_ids", _T5_SENTINELS)
        if type(count) is not int or count < 0:
            raise UserError(f"tokenizer_config.json: extra_ids={count!r}: expected a number of sentinels")
        for number in range(count):  # the first one has the highest id
            add(f"<extra_id_{number}>", vocabulary.size + count - 1 - number)
    for name in role_names:
        add(name, None)
    for field in ("additional_special_tokens", "extra_special_tokens"):
        values = token_fields.get(field) or []
        for value in values.values() if isinstance(values, dict) else values if isinstance(values, list) else []:
            add(_read_content(value, f"tokenizer_config.json: {field}"), None)
    return sorted(entries.values(), key=lambda entry: entry["id"])


def _parse_decoder(decoder: Any) -> Iterator[tuple[int, Any]]:
    """(id, properties) of the tokens in added_tokens_decoder."""
    for token_id, properties in (decoder or {}).items() if isinstance(decoder, dict | None) else ():
        if not token_id.isdecimal():
            raise UserError(f"tokenizer_config.json: added_tokens_decoder holds the id {token_id!r}: expected a number")
        yield int(token_id), properties


def _make_entry(name: str, token_id: int, properties: Any) -> dict[str, Any]:
    properties = properties if isinstance(properties, dict) else {}
    flags = {flag: bool(properties.get(flag, False)) for flag in ("single_word", "lstrip", "rstrip")}
    special = bool(properties.get("special", True))
    return {
        "id": token_id,
        "content": name,
        **flags,
        "normalized": bool(properties.get("normalized", not special)),
        "special": special,
    }


def _choose_affixes(
    config: dict[str, Any], roles: dict[str, int | None], vocabulary: Vocabulary, is_t5: bool
) -> Affixes:
    """Those of the post-processor, unless tokenizer_config.json overrides them."""
    if is_t5:
        return (), _first_id(roles["eos"], vocabulary.eos_id)
    if vocabulary.affixes is not None and not {"add_bos_token", "add_eos_token"} & config.keys():
        return vocabulary.affixes
    prefix = _first_id(roles["bos"]) if config.get("add_bos_token") else ()
    return prefix, _first_id(roles["eos"]) if config.get("add_eos_token") else ()


def _is_t5(config: dict[str, Any], hf: dict[str, Any]) -> bool:
    """Whether transformers reads the folder with its class for T5, which chooses the affixes itself."""
    if "tokenizer_class" in config:
        return config["tokenizer_class"] in _T5_CLASSES
    return hf.get("model_type") in _T5_TYPES


def _first_id(*ids: int | None) -> tuple[int, ...]:
    """The first id that is not None, as a tuple; () if there is none."""
    return next(((i,) for i in ids if i is not None), ())


def read_affixes(hf_tokenizer: Any) -> Affixes | None:
    """The affixes that the post-processor of a tokenizers.Tokenizer adds; None if it has no post-processor."""
    if hf_tokenizer.post_processor is None:
        return None
    text = hf_tokenizer.encode("a", add_special_tokens=False).ids
    ids = hf_tokenizer.encode("a", add_special_tokens=True).ids
    start = next(i for i in range(len(ids) + 1) if ids[i : i + len(text)] == text)
    return tuple(ids[:start]), tuple(ids[start + len(text) :])


def _read_json(content: bytes) -> Vocabulary:
    import tokenizers

    try:
        hf_tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise UserError(f"not a tokenizer.json ({error}); fetch it again") from None
    hf_tokenizer.no_truncation()
    hf_tokenizer.no_padding()
    size = 1 + max(hf_tokenizer.get_vocab(with_added_tokens=True).values())
    special = frozenset(token.content for token in hf_tokenizer.get_added_tokens_decoder().values())
    return Vocabulary(size, hf_tokenizer.token_to_id, special, affixes=read_affixes(hf_tokenizer))


def _read_sentencepiece(content: bytes) -> Vocabulary:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise UserError(f"not a SentencePiece model ({error}); fetch it again") from None
    if not processor.vocab_size():
        raise UserError("not a SentencePiece model (it is empty); fetch it again")
    pieces = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    special = frozenset(name for name, i in pieces.items() if processor.is_control(i) or processor.is_unknown(i))
    eos_id = processor.eos_id()
    return Vocabulary(len(pieces), pieces.get, special, eos_id=eos_id if eos_id >= 0 else None)


def _trims_spaces(content: bytes, kind: str) -> bool:
    """Whether a SentencePiece model removes the spaces at both ends of a text."""
    if kind != "sentencepiece":
        return False
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    return processor.encode("  a ") == processor.encode("a")
