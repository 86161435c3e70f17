"""Text to token ids and back: SentencePiece, Hugging Face tokenizer.json, or bytes, behind one protocol."""

from collections.abc import Iterable, Iterator
import functools
import hashlib
import json
from pathlib import Path
import re
from typing import Any, Protocol

import numpy as np

from llmjax.data.store.tokenizer_settings import TokenizerSettings, apply_to_json, read_settings
from llmjax.errors import UserError, suggest

KINDS = ("sentencepiece", "huggingface", "bytes")
FILE_NAMES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json", "bytes": "tokenizer.bytes"}
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
PIECE_CHARACTERS = 4096  # SentencePiece slows down on long texts: they go in by pieces, cut after a line
_SPACE_MARK = "\u2581"  # what SentencePiece writes for a space, and so reads as one


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer.

    kind, sha256     its family, and the hash of its file (and of its settings, where it has any)
    vocab_size       number of ids
    special_tokens   name -> id; documents never become one of them
    bos_id, pad_id, unk_id   None where it has no such token; every tokenizer has an EOS
    stop_ids         ids at which generation stops, `eos_id` among them unless the checkpoint says otherwise
    prompt_frame     (ids before, ids after) that an imported tokenizer puts around a prompt; None: none was imported
    lossless         decode(encode(text)) == text for every text that was prepared with it
    joiner           what begins a piece that goes on with a word ("##" of WordPiece); "": nothing does
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

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without BOS and EOS."""
        ...

    def encode_prompt(self, text: str) -> np.ndarray:
        """Token ids of a text in which special tokens stand for themselves, int32, without `prompt_frame`."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that form no character become U+FFFD."""
        ...

    def piece(self, number: int) -> bytes:
        """What one id stands for, in UTF-8 where it is whole characters; a special token's name."""
        ...

    def check_special(self, text: str) -> None:
        """Raises UserError for what looks like a special token and is none of this tokenizer's."""
        ...


def check_special(tokenizer: Tokenizer, text: str) -> None:
    """Raises UserError for what looks like a special token, such as <|user|>, and is none of the tokenizer's."""
    unknown = sorted({name for name in _SPECIAL.findall(text) if name not in tokenizer.special_tokens})
    if unknown:
        known = ", ".join(tokenizer.special_tokens) or "none"
        raise UserError(
            f"the text holds {', '.join(unknown)}, no special token of this tokenizer"
            f"{suggest(unknown[0], tokenizer.special_tokens)}; it knows: {known}"
        )


def _split_special(special_tokens: dict[str, int], text: str) -> list[str]:
    """Text and names of special tokens in turn; text, which may be empty, first and last."""
    names = sorted(special_tokens, key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]


def _hash(model: bytes, settings: TokenizerSettings | None) -> str:
    return hashlib.sha256(model if settings is None else model + settings.to_bytes()).hexdigest()


class SentencePiece:
    """A SentencePiece model. Models that keep every space (as those trained here) take U+2581 by its bytes."""

    kind, joiner = "sentencepiece", ""
    stop_ids: tuple[int, ...]
    prompt_frame: tuple[tuple[int, ...], tuple[int, ...]] | None
    check_special = check_special

    def __init__(self, model: bytes, *, lossless: bool = True, settings: TokenizerSettings | None = None):
        import sentencepiece

        if not model:
            raise ValueError("the file is empty")
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._inner = self._model  # for text behind a special token
        self.sha256, self.lossless = _hash(model, settings), lossless
        ids = range(self._model.vocab_size())
        self.special_tokens = {
            self._model.id_to_piece(i): i for i in ids if self._model.is_control(i) or self._model.is_unknown(i)
        }
        self._added: dict[int, str] = {}
        if settings is None:
            self._read_ids()
        else:
            _take_ids(self, settings)
            self._add(settings)
            if not settings.prefix_space:
                self._inner = _without_dummy_prefix(model)
        self.vocab_size = max(len(ids), 1 + max(self._added, default=0))
        self._in_prompts = self.special_tokens | {name: i for i, name in self._added.items()}
        probe = "  a\n\n b \t\r\n "
        self._exact = self._model.decode(self._model.encode(probe)) == probe and self._model.is_byte(
            self._model.piece_to_id("<0xE2>")
        )
        self._mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    def _read_ids(self) -> None:
        """Special ids as the model's own file has them."""
        self.bos_id, self.pad_id = _given(self._model.bos_id()), _given(self._model.pad_id())
        self.unk_id = _given(self._model.unk_id())
        if self._model.eos_id() < 0:
            raise UserError("data.tokenizer.path: this SentencePiece model has no EOS; train one with eos_id")
        self.eos_id: int = self._model.eos_id()
        self.stop_ids, self.prompt_frame = (self.eos_id,), None

    def _add(self, settings: TokenizerSettings) -> None:
        """Tokens of other files, as far as the model has rows for them."""
        limit = settings.num_rows
        if limit is not None and limit < self._model.vocab_size():
            raise UserError(
                f"the tokenizer has {self._model.vocab_size()} ids that text becomes and the model only {limit} rows: "
                "they do not belong together"
            )
        for token in settings.added_tokens:
            if limit is None or token["id"] < limit:
                self._added[token["id"]] = token["content"]
                if token["special"]:
                    self.special_tokens[token["content"]] = token["id"]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if not self._exact:
            return [np.array(ids, np.int32) for ids in self._model.encode(texts, num_threads=1)]
        pieces, ends = [], []
        for text in texts:
            pieces += pieces_of(text)
            ends.append(len(pieces))
        encoded: Iterator[list[int]] = iter(self._model.encode(pieces, num_threads=1))
        begin, result = 0, []
        for end in ends:
            ids: list[int] = []
            for piece in pieces[begin:end]:
                found = next(encoded)
                ids += self._mark if piece == _SPACE_MARK else found
            result.append(np.array(ids, np.int32))
            begin = end
        return result

    def encode_prompt(self, text: str) -> np.ndarray:
        parts = _split_special(self._in_prompts, text)
        ids = self.encode_batch(parts)
        if self._inner is not self._model:
            if parts[0].startswith(" "):  # as in transformers: this space is the mark
                ids[0] = np.array(self._inner.encode(parts[0]), np.int32)
            ids[2::2] = [np.array(self._inner.encode(part), np.int32) for part in parts[2::2]]
        ids[1::2] = [np.array([self._in_prompts[name]], np.int32) for name in parts[1::2]]
        return np.concatenate(ids)

    def decode(self, ids: Iterable[int]) -> str:
        if not self._added:
            return self._model.decode(_checked(ids, self.vocab_size))
        text, run, model = "", [], self._model
        for i in _checked(ids, self.vocab_size):
            if i in self._added:
                text, run, model = text + model.decode(run) + self._added[i], [], self._inner
            elif i < self._model.vocab_size():
                run.append(i)
        return text + model.decode(run)

    def piece(self, number: int) -> bytes:
        if number in self._added or number >= self._model.vocab_size():
            return self._added.get(number, "").encode()
        piece = self._model.id_to_piece(number)
        return bytes([int(piece[3:5], 16)]) if self._model.is_byte(number) else piece.replace(_SPACE_MARK, " ").encode()


class HuggingFace:
    """A tokenizer.json. Special tokens are never read out of text."""

    kind = "huggingface"
    stop_ids: tuple[int, ...]
    prompt_frame: tuple[tuple[int, ...], tuple[int, ...]] | None
    check_special = check_special

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
                        f"the added token {token['content']!r} cannot have the id {token['id']}, as the checkpoint's "
                        "files say: ids before it are missing"
                    )
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        self.sha256, self.lossless = _hash(model, settings), lossless
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
        added = self._model.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in sorted(added.items()) if token.special}
        parts = json.loads(self._model.to_str())
        self._by_bytes = "ByteLevel" in json.dumps(parts["decoder"])
        self.joiner: str = (parts["model"].get("continuing_subword_prefix") or "") if not self._by_bytes else ""
        if settings is None:
            self._guess_ids()
        else:
            _take_ids(self, settings)

    def _guess_ids(self) -> None:
        """Special ids of a tokenizer.json alone, which does not say what its tokens are for: by their usual names."""
        eos = _first(self.special_tokens, EOS_NAMES)
        if eos is None:
            raise UserError(
                f"data.tokenizer.path: this tokenizer.json has no end-of-text token; one of {', '.join(EOS_NAMES)} "
                "must be among its special added_tokens"
            )
        self.eos_id: int = eos
        self.bos_id = _first(self.special_tokens, _BOS_NAMES)
        self.pad_id = _first(self.special_tokens, _PAD_NAMES)
        self.unk_id = _first(self.special_tokens, _UNK_NAMES)
        self.stop_ids, self.prompt_frame = (eos,), None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(e.ids, np.int32) for e in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_prompt(self, text: str) -> np.ndarray:
        # As a whole: what a special token does to its neighbours is known to the library alone.
        self._model.encode_special_tokens = False
        try:
            return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int32)
        finally:
            self._model.encode_special_tokens = True

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(_checked(ids, self.vocab_size), skip_special_tokens=False)

    def piece(self, number: int) -> bytes:
        piece = self._model.id_to_token(number) or ""
        if self._by_bytes and number not in self.special_tokens.values():
            known = _byte_characters()
            return b"".join(known.get(character, character.encode()) for character in piece)
        return piece.replace(_SPACE_MARK, " ").encode()


class Bytes:
    """UTF-8 bytes are the ids 0 to 255; BOS 256, EOS 257, padding 258."""

    kind, joiner, lossless, vocab_size = "bytes", "", True, 259
    bos_id: int | None = 256
    eos_id = 257
    pad_id: int | None = 258
    unk_id: int | None = None
    stop_ids: tuple[int, ...] = (257,)
    prompt_frame: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    sha256 = hashlib.sha256(b"llmjax bytes 1").hexdigest()
    check_special = check_special

    def __init__(self) -> None:
        self.special_tokens = {"<s>": 256, "</s>": 257, "<pad>": 258}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def encode_prompt(self, text: str) -> np.ndarray:
        parts = _split_special(self.special_tokens, text)
        ids = self.encode_batch(parts)
        ids[1::2] = [np.array([self.special_tokens[name]], np.int32) for name in parts[1::2]]
        return np.concatenate(ids)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(_checked(ids, 256)).decode(errors="replace")

    def piece(self, number: int) -> bytes:
        return bytes([number]) if number < 256 else list(self.special_tokens)[number - 256].encode()


def read_tokenizer(
    kind: str, model: bytes, *, lossless: bool = True, settings: TokenizerSettings | None = None
) -> Tokenizer:
    """A tokenizer from the content of its file, with the settings of an import where it has any.

    Raises UserError for an unknown kind or a file that is no tokenizer.
    """
    if kind == "bytes":
        return Bytes()
    readers = {"sentencepiece": SentencePiece, "huggingface": HuggingFace}
    if kind not in readers:
        raise UserError(f"data.tokenizer.kind={kind!r}{suggest(kind, KINDS)}: expected one of {', '.join(KINDS)}")
    try:
        return readers[kind](model, lossless=lossless, settings=settings)
    except UserError:
        raise
    except Exception as error:  # the libraries raise RuntimeError, OSError and bare Exception for a damaged file
        reason = f"not a {kind} model ({error})"
        raise UserError(f"data.tokenizer.path: {reason}; give one, or set the kind it is of") from None


def read_tokenizer_file(kind: str, path: Any, *, lossless: bool = True) -> Tokenizer:
    """The same from the file (a Path or an epath.Path) and the settings beside it."""
    if kind == "bytes":
        return Bytes()
    return read_tokenizer(kind, path.read_bytes(), lossless=lossless, settings=read_settings(path))


def load_tokenizer(store: Path | str) -> Tokenizer:
    """The tokenizer that a store was made with, from the store's own copy.

    Raises UserError where there is no finished store, or the copy is not the one that the manifest names.
    """
    store = Path(store)
    try:
        record: dict[str, Any] = json.loads((store / "manifest.json").read_text())["tokenizer"]
        tokenizer = read_tokenizer_file(record["kind"], store / FILE_NAMES[record["kind"]], lossless=record["lossless"])
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"no complete token store at {store} ({error}); run `llmjax prepare`") from None
    if tokenizer.sha256 != record["sha256"]:
        raise UserError(
            f"{store}: the tokenizer's file is not the one that the store was made with "
            f"(sha256 {tokenizer.sha256[:12]}, expected {record['sha256'][:12]}); restore it, or prepare again"
        )
    return tokenizer


def pieces_of(text: str) -> Iterator[str]:
    """The text in pieces that are tokenized one by one: U+2581 alone, the rest cut after a line."""
    for number, span in enumerate(text.split(_SPACE_MARK)):
        if number:
            yield _SPACE_MARK
        begin = 0
        while len(span) - begin > PIECE_CHARACTERS:
            end = span.rfind("\n", begin, begin + PIECE_CHARACTERS) + 1
            end = end if end > begin else begin + PIECE_CHARACTERS
            yield span[begin:end]
            begin = end
        if span[begin:]:
            yield span[begin:]


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Plain ints. Ids that the model has beyond the vocabulary, to round its size, stand for nothing: left out."""
    return [i for i in np.asarray(ids, np.int64).tolist() if 0 <= i < vocab_size]


@functools.cache
def _byte_characters() -> dict[str, bytes]:
    """The characters by which byte-level vocabularies spell bytes: printable ones themselves, others from 256 up."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    spelt = {chr(byte): bytes([byte]) for byte in printable}
    return spelt | {chr(256 + number): bytes([byte]) for number, byte in enumerate(others)}


def _take_ids(tokenizer: "SentencePiece | HuggingFace", settings: TokenizerSettings) -> None:
    tokenizer.eos_id, tokenizer.stop_ids = settings.eos_id, settings.stop_ids
    tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id = settings.bos_id, settings.pad_id, settings.unk_id
    tokenizer.prompt_frame = settings.prefix, settings.suffix


def _without_dummy_prefix(model: bytes) -> Any:
    """The same SentencePiece model, which does not begin a text with a space of its own."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    message: Any = sentencepiece_model_pb2  # its classes are made at import
    proto = message.ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def _given(token: int) -> int | None:
    return token if token >= 0 else None


def _first(tokens: dict[str, int], names: tuple[str, ...]) -> int | None:
    return next((tokens[name] for name in names if name in tokens), None)
