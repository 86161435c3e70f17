"""Text to token ids and back: SentencePiece, Hugging Face tokenizer.json, or bytes, behind one protocol."""

from collections.abc import Iterable, Iterator
import functools
import hashlib
import io
import json
from pathlib import Path
import re
from typing import Any, Protocol

import numpy as np

from llmjax.config import UserError, suggest

KINDS = ("sentencepiece", "huggingface", "bytes")
FILE_NAMES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json", "bytes": "tokenizer.bytes"}
_SPECIAL = re.compile(r"<\|[^|<>\s]{1,60}\|>|</?(?:s|unk|pad|bos|eos|mask|cls|sep)>")
_DEEPSEEK = "<\uff5c{}\u2581of\u2581sentence\uff5c>"  # full-width bars, and U+2581 for spaces
_EOS_NAMES = (
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

    kind, sha256     its family, and the hash of its file
    vocab_size       number of ids
    special_tokens   name -> id; text never becomes one of them
    bos_id, pad_id, unk_id   None where it has no such token; every tokenizer has an EOS
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
    lossless: bool
    joiner: str

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without BOS and EOS."""
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


def encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids of a text that a user typed: here, other than in documents, special tokens stand for themselves.

    Raises UserError as `check_special` does, and for bytes that the shell passed on and that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the text {text!r} holds bytes that are no UTF-8; give it as UTF-8") from None
    tokenizer.check_special(text)
    names = sorted(tokenizer.special_tokens, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    ids = tokenizer.encode_batch(parts)
    ids[1::2] = [np.array([tokenizer.special_tokens[name]], np.int32) for name in parts[1::2]]
    return np.concatenate(ids)


class SentencePiece:
    """A SentencePiece model. Models that keep every space (as those trained here) take U+2581 by its bytes."""

    kind, joiner = "sentencepiece", ""
    check_special = check_special

    def __init__(self, model: bytes, *, lossless: bool = True):
        import sentencepiece

        if not model:
            raise ValueError("the file is empty")
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.sha256, self.lossless = hashlib.sha256(model).hexdigest(), lossless
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.pad_id = _given(self._model.bos_id()), _given(self._model.pad_id())
        self.unk_id = _given(self._model.unk_id())
        if self._model.eos_id() < 0:
            raise UserError("data.tokenizer.path: this SentencePiece model has no EOS; train one with eos_id")
        self.eos_id: int = self._model.eos_id()
        ids = range(self.vocab_size)
        self.special_tokens = {
            self._model.id_to_piece(i): i for i in ids if self._model.is_control(i) or self._model.is_unknown(i)
        }
        probe = "  a\n\n b \t\r\n "
        self._exact = self._model.decode(self._model.encode(probe)) == probe and self._model.is_byte(
            self._model.piece_to_id("<0xE2>")
        )
        self._mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

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

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(_checked(ids, self.vocab_size))

    def piece(self, number: int) -> bytes:
        piece = self._model.id_to_piece(number)
        return bytes([int(piece[3:5], 16)]) if self._model.is_byte(number) else piece.replace(_SPACE_MARK, " ").encode()


class HuggingFace:
    """A tokenizer.json. Special tokens are never read out of text."""

    kind = "huggingface"
    check_special = check_special

    def __init__(self, model: bytes, *, lossless: bool = True):
        import tokenizers

        self._model = tokenizers.Tokenizer.from_buffer(model)
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        self.sha256, self.lossless = hashlib.sha256(model).hexdigest(), lossless
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
        added = self._model.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in sorted(added.items()) if token.special}
        parts = json.loads(self._model.to_str())
        self._by_bytes = "ByteLevel" in json.dumps(parts["decoder"])
        self.joiner: str = (parts["model"].get("continuing_subword_prefix") or "") if not self._by_bytes else ""
        eos = _first(self.special_tokens, _EOS_NAMES)
        if eos is None:
            raise UserError(
                f"data.tokenizer.path: this tokenizer.json has no end-of-text token; one of {', '.join(_EOS_NAMES)} "
                "must be among its special added_tokens"
            )
        self.eos_id = eos
        self.bos_id = _first(self.special_tokens, _BOS_NAMES)
        self.pad_id = _first(self.special_tokens, _PAD_NAMES)
        self.unk_id = _first(self.special_tokens, _UNK_NAMES)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(e.ids, np.int32) for e in self._model.encode_batch_fast(texts, add_special_tokens=False)]

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
    sha256 = hashlib.sha256(b"llmjax bytes 1").hexdigest()
    check_special = check_special

    def __init__(self) -> None:
        self.special_tokens = {"<s>": 256, "</s>": 257, "<pad>": 258}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(_checked(ids, 256)).decode(errors="replace")

    def piece(self, number: int) -> bytes:
        return bytes([number]) if number < 256 else list(self.special_tokens)[number - 256].encode()


def read_tokenizer(kind: str, model: bytes, *, lossless: bool = True) -> Tokenizer:
    """A tokenizer from the content of its file. Raises UserError for an unknown kind or a file that is no tokenizer."""
    if kind == "bytes":
        return Bytes()
    readers = {"sentencepiece": SentencePiece, "huggingface": HuggingFace}
    if kind not in readers:
        raise UserError(f"data.tokenizer.kind={kind!r}{suggest(kind, KINDS)}: expected one of {', '.join(KINDS)}")
    try:
        return readers[kind](model, lossless=lossless)
    except UserError:
        raise
    except Exception as error:  # the libraries raise RuntimeError, OSError and bare Exception for a damaged file
        reason = f"not a {kind} model ({error})"
        raise UserError(f"data.tokenizer.path: {reason}; give one, or set the kind it is of") from None


def load_tokenizer(store: Path | str) -> Tokenizer:
    """The tokenizer that a store was made with, from the store's own copy.

    Raises UserError where there is no finished store, or the copy is not the one that the manifest names.
    """
    store = Path(store)
    try:
        record: dict[str, Any] = json.loads((store / "manifest.json").read_text())["tokenizer"]
        model = (store / FILE_NAMES[record["kind"]]).read_bytes() if record["kind"] != "bytes" else b""
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no complete token store at {store} ({error}); run `llmjax prepare`") from None
    tokenizer = read_tokenizer(record["kind"], model, lossless=record["lossless"])
    if tokenizer.sha256 != record["sha256"]:
        raise UserError(
            f"{store}: the tokenizer's file is not the one that the store was made with "
            f"(sha256 {tokenizer.sha256[:12]}, expected {record['sha256'][:12]}); restore it, or prepare again"
        )
    return tokenizer


def train_sentencepiece(texts: Iterable[str], *, algorithm: str, vocab_size: int) -> bytes:
    """A SentencePiece model that gives every text back exactly: byte fallback, no normalisation, all spaces kept.

    Deterministic. Raises UserError where the text is too small for the vocabulary.
    """
    import sentencepiece

    if algorithm not in ("bpe", "unigram"):
        raise UserError(f"data.tokenizer.algorithm={algorithm!r}: expected 'bpe' or 'unigram'")
    if vocab_size < 300:
        raise UserError(f"data.tokenizer.vocab_size={vocab_size}: give 300 or more (256 are bytes, 4 special tokens)")
    # The trainer skips texts that hold its own marks; what it learns from the rest of them is not lost this way.
    pieces = (re.sub("[\0\u2581\u2585]", " ", piece) for text in texts for piece in pieces_of(text))
    model = io.BytesIO()
    train = functools.partial(
        sentencepiece.SentencePieceTrainer.train,
        model_writer=model,
        model_type=algorithm,
        vocab_size=vocab_size,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        byte_fallback=True,
        character_coverage=0.9995,
        max_sentence_length=1 << 20,
        num_threads=2,  # what is learned does not depend on it
        minloglevel=2,
    )
    try:
        train(sentence_iterator=pieces)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]  # without the place in the source
        raise UserError(
            f"data.tokenizer.vocab_size={vocab_size}: cannot be trained on this text ({reason}); "
            "give a smaller vocabulary or more text, or data.tokenizer.kind='bytes'"
        ) from None
    return model.getvalue()


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


def _given(token: int) -> int | None:
    return token if token >= 0 else None


def _first(tokens: dict[str, int], names: tuple[str, ...]) -> int | None:
    return next((tokens[name] for name in names if name in tokens), None)
