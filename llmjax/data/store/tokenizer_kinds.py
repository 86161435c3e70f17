"""Text to token ids and back: SentencePiece models, tokenizer.json files, or bytes, behind one base class."""

import abc
from collections.abc import Iterable, Iterator
import functools
import hashlib
import json
import re
from typing import Any

import numpy as np

from llmjax.data.store.tokenizer_settings import TokenizerSettings, apply_to_json
from llmjax.errors import UserError, suggest

_SPECIAL = re.compile(r"<\|[^|<>\s]{1,60}\|>|</?(?:s|unk|pad|bos|eos|mask|cls|sep)>")
_DEEPSEEK = "<\uff5c{}\u2581of\u2581sentence\uff5c>"  # full-width bars, and U+2581 for spaces
EOS_NAMES = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "<|im_end|>",
    "[SEP]",
    _DEEPSEEK.format("end"),
)
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|bos|>", "[CLS]", _DEEPSEEK.format("begin"))
_PAD_NAMES = ("<pad>", "<|padding|>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")
_UNK_NAMES = ("<unk>", "[UNK]", "<|unk|>")
SPAN_CHARACTERS = 4096  # SentencePiece is slow on long texts: they are encoded in spans, split after a line
_SPACE_MARK = "\u2581"  # SentencePiece writes it for a space, and reads it as one


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    kind, sha256     its family, and the hash of its file (and of its settings, if it has any)
    vocab_size       number of ids
    special_tokens   name -> id; text of documents never becomes one of them
    bos_id, pad_id, unk_id   None if it has no such token; every tokenizer has an EOS
    stop_ids         ids at which generation stops, `eos_id` among them unless the checkpoint says otherwise
    prompt_frame     (ids before, ids after) that an imported tokenizer puts around a prompt; None: it was not imported
    lossless         decode(encode(text)) == text for every text that was prepared with it
    joiner           prefix of a piece that continues a word ("##" of WordPiece); "": there is none
    """

    kind: str
    sha256: str
    vocab_size: int
    special_tokens: dict[str, int]
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    unk_id: int | None
    stop_ids: tuple[int, ...]
    prompt_frame: tuple[tuple[int, ...], tuple[int, ...]] | None
    lossless: bool
    joiner: str

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without BOS and EOS."""

    @abc.abstractmethod
    def encode_prompt(self, text: str, breaker: str = "") -> np.ndarray:
        """Token ids of a text in which special tokens are recognised, int32, without `prompt_frame`.

        breaker   a character that is removed; the name of a special token that contains it is ordinary text
        """

    @property
    def special_token_pattern(self) -> re.Pattern[str] | None:
        """Matches the names that `encode_prompt` recognises as special tokens; None if there are none."""
        return _name_pattern(self.special_tokens)

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that form no character become U+FFFD."""

    @abc.abstractmethod
    def piece(self, token_id: int) -> bytes:
        """The text of one id, in UTF-8 if it is whole characters; the name of a special token."""

    def check_special(self, text: str) -> None:
        """Raise UserError for text that looks like a special token, such as <|user|>, and is not one of them."""
        unknown = sorted({name for name in _SPECIAL.findall(text) if name not in self.special_tokens})
        if unknown:
            names = ", ".join(self.special_tokens) or "none"
            raise UserError(
                f"the text contains {', '.join(unknown)}, not a special token of this tokenizer"
                f"{suggest(unknown[0], self.special_tokens)}; its special tokens: {names}"
            )

    def _set_ids(self, settings: TokenizerSettings) -> None:
        self.eos_id, self.stop_ids = settings.eos_id, settings.stop_ids
        self.bos_id, self.pad_id, self.unk_id = settings.bos_id, settings.pad_id, settings.unk_id
        self.prompt_frame = settings.prefix, settings.suffix

    def _drop_unknown(self, ids: Iterable[int], limit: int) -> list[int]:
        """The ids below the limit, as ints. A model may have more ids than its tokenizer, to round its size."""
        return [i for i in np.asarray(ids, np.int64).tolist() if 0 <= i < limit]


class SentencePiece(Tokenizer):
    """A SentencePiece model. A model that keeps every space (as those trained here) encodes U+2581 by its bytes."""

    kind, joiner = "sentencepiece", ""

    def __init__(self, model: bytes, *, lossless: bool = True, settings: TokenizerSettings | None = None):
        import sentencepiece

        if not model:
            raise ValueError("the file is empty")
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._no_prefix_model = self._model  # for text after a special token
        self.sha256, self.lossless = _hash(model, settings), lossless
        ids = range(self._model.vocab_size())
        self.special_tokens = {
            self._model.id_to_piece(i): i for i in ids if self._model.is_control(i) or self._model.is_unknown(i)
        }
        self._added: dict[int, str] = {}
        if settings is None:
            self._read_ids()
        else:
            self._set_ids(settings)
            self._add_tokens(settings)
            if not settings.prefix_space:
                self._no_prefix_model = _remove_dummy_prefix(model)
        self.vocab_size = max(len(ids), 1 + max(self._added, default=0))
        self._prompt_tokens = self.special_tokens | {name: i for i, name in self._added.items()}
        probe = "  a\n\n b \t\r\n "
        self._keeps_spaces = self._model.decode(self._model.encode(probe)) == probe and self._model.is_byte(
            self._model.piece_to_id("<0xE2>")
        )
        self._space_mark_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    def _read_ids(self) -> None:
        """Read the special ids from the model's own file."""
        optional = lambda token_id: token_id if token_id >= 0 else None
        self.bos_id, self.pad_id = optional(self._model.bos_id()), optional(self._model.pad_id())
        self.unk_id = optional(self._model.unk_id())
        if self._model.eos_id() < 0:
            raise UserError("data.tokenizer.path: this SentencePiece model has no EOS; train one with eos_id")
        self.eos_id = self._model.eos_id()
        self.stop_ids, self.prompt_frame = (self.eos_id,), None

    def _add_tokens(self, settings: TokenizerSettings) -> None:
        """Add the tokens of other files whose ids have rows in the model."""
        limit = settings.num_rows
        if limit is not None and limit < self._model.vocab_size():
            raise UserError(
                f"the tokenizer encodes text to {self._model.vocab_size()} ids and the model has only {limit} rows: "
                "they do not belong together"
            )
        for token in settings.added_tokens:
            if limit is None or token["id"] < limit:
                self._added[token["id"]] = token["content"]
                if token["special"]:
                    self.special_tokens[token["content"]] = token["id"]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """See Tokenizer."""
        if not self._keeps_spaces:
            return [np.array(ids, np.int32) for ids in self._model.encode(texts, num_threads=1)]
        spans_of = [list(split_text(text)) for text in texts]
        encoded: Iterator[list[int]] = iter(self._model.encode([s for spans in spans_of for s in spans], num_threads=1))
        result = []
        for spans in spans_of:
            ids: list[int] = []
            for span, span_ids in zip(spans, encoded, strict=False):
                ids += self._space_mark_ids if span == _SPACE_MARK else span_ids
            result.append(np.array(ids, np.int32))
        return result

    @property
    def special_token_pattern(self) -> re.Pattern[str] | None:
        """See Tokenizer."""
        return _name_pattern(self._prompt_tokens)

    def encode_prompt(self, text: str, breaker: str = "") -> np.ndarray:
        """See Tokenizer."""
        parts = _split_special(self._prompt_tokens, text, breaker)
        ids = self.encode_batch(parts)
        if self._no_prefix_model is not self._model:
            if parts[0].startswith(" "):  # as in transformers: this space is the prefix
                ids[0] = np.array(self._no_prefix_model.encode(parts[0]), np.int32)
            ids[2::2] = [np.array(self._no_prefix_model.encode(part), np.int32) for part in parts[2::2]]
        ids[1::2] = [np.array([self._prompt_tokens[name]], np.int32) for name in parts[1::2]]
        return np.concatenate(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        if not self._added:
            return self._model.decode(self._drop_unknown(ids, self.vocab_size))
        text, run, model = "", [], self._model
        for i in self._drop_unknown(ids, self.vocab_size):
            if i in self._added:
                text, run, model = text + model.decode(run) + self._added[i], [], self._no_prefix_model
            elif i < self._model.vocab_size():
                run.append(i)
        return text + model.decode(run)

    def piece(self, token_id: int) -> bytes:
        """See Tokenizer."""
        if token_id in self._added or token_id >= self._model.vocab_size():
            return self._added.get(token_id, "").encode()
        piece = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode()


class HuggingFace(Tokenizer):
    """A tokenizer.json. Text of documents never becomes a special token."""

    kind = "huggingface"

    def __init__(self, model: bytes, *, lossless: bool = True, settings: TokenizerSettings | None = None):
        import tokenizers

        if settings is None:
            self._model = tokenizers.Tokenizer.from_buffer(model)
        else:
            parts = apply_to_json(json.loads(model), settings)
            self._model = tokenizers.Tokenizer.from_str(json.dumps(parts))
            for token in parts["added_tokens"]:
                if self._model.token_to_id(token["content"]) != token["id"]:
                    raise UserError(
                        f"the added token {token['content']!r} cannot have the id {token['id']} that the checkpoint's "
                        "files give it: ids before it are missing"
                    )
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        self.sha256, self.lossless = _hash(model, settings), lossless
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
        added = self._model.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in sorted(added.items()) if token.special}
        parts = json.loads(self._model.to_str())
        self._is_byte_level = "ByteLevel" in json.dumps(parts["decoder"])
        self.joiner = "" if self._is_byte_level else parts["model"].get("continuing_subword_prefix") or ""
        if settings is None:
            self._guess_ids()
        else:
            self._set_ids(settings)

    def _guess_ids(self) -> None:
        """Find the special ids by their usual names, since a tokenizer.json does not say what its tokens are for."""
        find = lambda names: next((self.special_tokens[name] for name in names if name in self.special_tokens), None)
        eos_id = find(EOS_NAMES)
        if eos_id is None:
            raise UserError(
                f"data.tokenizer.path: this tokenizer.json has no end-of-text token; one of {', '.join(EOS_NAMES)} "
                "must be among its special added_tokens"
            )
        self.eos_id, self.bos_id = eos_id, find(_BOS_NAMES)
        self.pad_id, self.unk_id = find(_PAD_NAMES), find(_UNK_NAMES)
        self.stop_ids, self.prompt_frame = (eos_id,), None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """See Tokenizer."""
        return [np.array(e.ids, np.int32) for e in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_prompt(self, text: str, breaker: str = "") -> np.ndarray:
        """See Tokenizer."""
        # Encoded as a whole, since only the library knows how a special token changes the text beside it.
        if breaker and breaker in text and (names := self.special_token_pattern):
            # Special tokens get new names, which begin with the breaker, so that their old names are ordinary text.
            renamed = names.sub(lambda match: breaker + match[0], text)
            parts = re.split(f"({breaker}(?:{names.pattern}))", renamed)
            parts[::2] = [part.replace(breaker, "") for part in parts[::2]]
            ids = _rename_special(self._model.to_str(), breaker).encode("".join(parts), add_special_tokens=False).ids
            return np.array(ids, np.int32)
        self._model.encode_special_tokens = False
        try:
            return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int32)
        finally:
            self._model.encode_special_tokens = True

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        return self._model.decode(self._drop_unknown(ids, self.vocab_size), skip_special_tokens=False)

    def piece(self, token_id: int) -> bytes:
        """See Tokenizer."""
        piece = self._model.id_to_token(token_id) or ""
        if self._is_byte_level and token_id not in self.special_tokens.values():
            bytes_of = _byte_characters()
            return b"".join(bytes_of.get(character, character.encode()) for character in piece)
        return piece.replace(_SPACE_MARK, " ").encode()


class Bytes(Tokenizer):
    """UTF-8 bytes are the ids 0 to 255; BOS 256, EOS 257, padding 258."""

    kind, joiner, lossless, vocab_size = "bytes", "", True, 259
    bos_id, eos_id, pad_id, unk_id = 256, 257, 258, None
    stop_ids, prompt_frame = (257,), None
    sha256 = hashlib.sha256(b"llmjax bytes 1").hexdigest()

    def __init__(self) -> None:
        self.special_tokens = {"<s>": 256, "</s>": 257, "<pad>": 258}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """See Tokenizer."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def encode_prompt(self, text: str, breaker: str = "") -> np.ndarray:
        """See Tokenizer."""
        parts = _split_special(self.special_tokens, text, breaker)
        ids = self.encode_batch(parts)
        ids[1::2] = [np.array([self.special_tokens[name]], np.int32) for name in parts[1::2]]
        return np.concatenate(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        return bytes(self._drop_unknown(ids, 256)).decode(errors="replace")

    def piece(self, token_id: int) -> bytes:
        """See Tokenizer."""
        return bytes([token_id]) if token_id < 256 else list(self.special_tokens)[token_id - 256].encode()


def split_text(text: str) -> Iterator[str]:
    """Split a text into spans that are encoded separately: U+2581 alone, the rest split after a line if possible."""
    for number, between in enumerate(text.split(_SPACE_MARK)):
        if number:
            yield _SPACE_MARK
        begin = 0
        while len(between) - begin > SPAN_CHARACTERS:
            end = between.rfind("\n", begin, begin + SPAN_CHARACTERS) + 1
            end = end if end > begin else begin + SPAN_CHARACTERS
            yield between[begin:end]
            begin = end
        if between[begin:]:
            yield between[begin:]


def _name_pattern(special_tokens: dict[str, int]) -> re.Pattern[str] | None:
    """Matches the names, the longest first; None if there are none."""
    names = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def _split_special(special_tokens: dict[str, int], text: str, breaker: str = "") -> list[str]:
    """Text, without the breaker, and names of special tokens in turn; text, which may be empty, first and last."""
    pattern = _name_pattern(special_tokens)
    parts = re.split(f"({pattern.pattern})", text) if pattern else [text]
    parts[::2] = [part.replace(breaker, "") for part in parts[::2]] if breaker else parts[::2]
    return parts


@functools.lru_cache(4)
def _rename_special(content: str, mark: str) -> Any:
    """The tokenizers.Tokenizer of a tokenizer.json in which the names of special tokens begin with `mark`."""
    import tokenizers

    parts = json.loads(content)
    names = {token["content"]: mark + token["content"] for token in parts["added_tokens"] if token["special"]}
    for token in parts["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = parts["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    parts["post_processor"] = None  # it adds tokens by their names, and none are added here
    return tokenizers.Tokenizer.from_str(json.dumps(parts))


def _hash(model: bytes, settings: TokenizerSettings | None) -> str:
    return hashlib.sha256(model if settings is None else model + settings.to_bytes()).hexdigest()


@functools.cache
def _byte_characters() -> dict[str, bytes]:
    """The characters that byte-level vocabularies write for bytes: printable ones themselves, others from 256 up."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    characters = {chr(byte): bytes([byte]) for byte in printable}
    return characters | {chr(256 + number): bytes([byte]) for number, byte in enumerate(others)}


def _remove_dummy_prefix(model: bytes) -> Any:
    """The same SentencePiece model without a space added before a text."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    message: Any = sentencepiece_model_pb2  # its classes are created at import
    proto = message.ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
