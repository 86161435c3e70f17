"""Tokenizers of published checkpoints: imported into a workdir, and exported with a checkpoint."""

from collections.abc import Callable, Iterable
import dataclasses
import json
from typing import Any

from etils import epath

from llmjax.data.store.tokenizer import FILE_NAMES, Tokenizer, read_tokenizer
from llmjax.data.store.tokenizer_kinds import SPAN_CHARACTERS
from llmjax.data.store.tokenizer_settings import FILE as SETTINGS_FILE, TokenizerSettings
from llmjax.errors import UserError
from llmjax.interop import special_tokens
from llmjax.run.workdir import TOKENIZER

# Files that only other programs read; they are copied unchanged.
_COPIED_FILES = """
    tokenizer_config.json special_tokens_map.json added_tokens.json generation_config.json chat_template.jinja
    chat_template.json modules.json sentence_bert_config.json config_sentence_transformers.json
    1_Pooling/config.json 2_Normalize/config.json
""".split()  # noqa: SIM905
_TEMPLATES = "additional_chat_templates"  # a folder, copied as well
# (kind, file in a published folder), in order of preference
_PUBLISHED = (
    ("huggingface", "tokenizer.json"),
    ("sentencepiece", "tokenizer.model"),
    ("sentencepiece", "spiece.model"),
    ("sentencepiece", "sentencepiece.bpe.model"),
)
# Texts on which a converted tokenizer may differ from its original.
_HARD_TEXTS = (
    "  a\n\n b \t\r\n ",
    "def f(x):\n    return x  # 12345, 0x1F\n\n\n\tif  not\tx:\n        pass\n",
    "The quick brown fox; jumps over: the 'lazy' dog - 3.14159 (2nd time) ...",
    "naïve café Ωμέγα Привет мир 日本語のテキスト 🙂🏽\u200d\u00a0x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa          =============== ((((((( ____________ \x00\x01\x7f",
)


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """The tokenizer of a published folder: its file's name and content, what other files say about it, and itself."""

    name: str
    content: bytes
    settings: TokenizerSettings
    tokenizer: Tokenizer


def find_tokenizer(folder: epath.Path, hf: dict[str, Any], *, num_rows: int) -> TokenizerFile:
    """Read the tokenizer of a published folder.

    hf, num_rows   the folder's config.json, and the number of ids of its model
    Raises UserError if there is none, or if it cannot be read.
    """
    kind, name = next(((kind, name) for kind, name in _PUBLISHED if (folder / name).exists()), ("", ""))
    if not kind:
        names = ", ".join(name for _, name in _PUBLISHED)
        raise UserError(f"{folder}: has no tokenizer; one of {names} is needed")
    content = (folder / name).read_bytes()
    try:
        settings = special_tokens.read(folder, kind, content, hf, num_rows=num_rows)
        return TokenizerFile(name, content, settings, read_tokenizer(kind, content, settings=settings))
    except UserError as error:
        raise UserError(f"{folder / name}: {error}") from None


def copy_to_workdir(folder: epath.Path, tokenizer_file: TokenizerFile, workdir: epath.Path) -> None:
    """Copy the tokenizer that `find_tokenizer` read, and the files beside it that other programs read."""
    to = workdir / TOKENIZER
    to.mkdir(parents=True, exist_ok=True)
    (to / FILE_NAMES[tokenizer_file.tokenizer.kind]).write_bytes(tokenizer_file.content)
    (to / SETTINGS_FILE).write_bytes(tokenizer_file.settings.to_bytes())
    _copy_files(folder, to)


def _copy_files(folder: epath.Path, to: epath.Path) -> None:
    for name in _COPIED_FILES:
        if (folder / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes((folder / name).read_bytes())
    if (folder / _TEMPLATES).is_dir():
        (to / _TEMPLATES).mkdir(parents=True, exist_ok=True)
        for template in (folder / _TEMPLATES).glob("*.jinja"):
            (to / _TEMPLATES / template.name).write_bytes(template.read_bytes())


def restore_original(content: bytes, name: str, workdir: epath.Path, folder: epath.Path) -> str:
    """Write a tokenizer that `copy_to_workdir` copied, and the files beside it, under their original names."""
    (folder / name).write_bytes(content)
    _copy_files(workdir / TOKENIZER, folder)
    return f"{name} as it was imported"


def write(
    tokenizer: Tokenizer,
    content: bytes,
    folder: epath.Path,
    *,
    texts: Iterable[str] = (),
    max_length: int | None = None,
    bos_id: int | None = None,
) -> str:
    """Write a tokenizer so that AutoTokenizer reads it; returns a line that says what was written.

    content      of the tokenizer's own file
    texts        on which a SentencePiece model and its tokenizer.json must agree, besides some hard ones
    max_length   of sequences that the model reads; None: no limit
    bos_id       the id that the exported tokenizer puts before a text, as training did; None: none
    """
    if tokenizer.kind == "bytes":
        return "no tokenizer: no published class expresses bytes with BOS 256, EOS 257 and padding 258"
    if tokenizer.kind == "huggingface":
        exported = _set_bos(content.decode(), bos_id, tokenizer)
        summary = "tokenizer.json unchanged"
        summary += f", but texts begin with id {bos_id}" if exported != content.decode() else ""
    else:
        (folder / "tokenizer.model").write_bytes(content)
        texts, converted = [*_HARD_TEXTS, *texts], _convert_sentencepiece(content)
        if converted is None or not _encode_equally(tokenizer, converted, texts):
            return "only tokenizer.model, for sentencepiece: no tokenizer.json gives the same ids"
        exported = _set_bos(converted, bos_id, tokenizer)
        summary = f"tokenizer.json, which gives the same ids as tokenizer.model on {len(texts)} texts"
    (folder / "tokenizer.json").write_text(exported)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(_make_tokenizer_config(tokenizer, max_length, bos_id), indent=2) + "\n"
    )
    return summary


def _make_tokenizer_config(tokenizer: Tokenizer, max_length: int | None, bos_id: int | None) -> dict[str, Any]:
    """tokenizer_config.json."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    ids = {
        "bos": tokenizer.bos_id if bos_id is None else bos_id,
        "eos": tokenizer.eos_id,
        "pad": tokenizer.pad_id,
        "unk": tokenizer.unk_id,
    }
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": names[i] for role, i in ids.items() if i in names}
    return config | ({} if max_length is None else {"model_max_length": max_length})


def _set_bos(content: str, bos_id: int | None, tokenizer: Tokenizer) -> str:
    """The tokenizer.json `content`, changed if needed so that it puts `bos_id` before a text and nothing after it."""
    from tokenizers import Tokenizer as HfTokenizer, processors

    hf_tokenizer = HfTokenizer.from_str(content)
    affixes = special_tokens.read_affixes(hf_tokenizer) or ((), ())
    if affixes == (() if bos_id is None else (bos_id,), ()):
        return content
    if bos_id is None:
        hf_tokenizer.post_processor = processors.Sequence([])  # type: ignore[assignment]
        return hf_tokenizer.to_str()
    name = next(name for name, i in tokenizer.special_tokens.items() if i == bos_id)
    hf_tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=[name, "$A"], pair=[name, "$A", "$B:1"], special_tokens=[(name, bos_id)]
    )
    return hf_tokenizer.to_str()


def _convert_sentencepiece(content: bytes) -> str | None:
    """The tokenizer.json of a SentencePiece model trained by llmjax; None for other models.

    Spaces are encoded as U+2581 (and U+2581 itself by its bytes), characters without a piece by their bytes, and long
    texts in parts cut after a line. A BPE model merges any two neighbours whose union is a piece, the best piece first,
    as merge rules in that order do. If several pairs make one piece, or pieces have equal scores, the two may differ,
    so the caller compares them.
    """
    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer as HfTokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE, Unigram

    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    ids = range(processor.vocab_size())
    pieces = {processor.id_to_piece(i): i for i in ids}
    spaces = "  a  b "
    if processor.decode(processor.encode(spaces)) != spaces or processor.unk_id() < 0 or "<0xE2>" not in pieces:
        return None
    unk = processor.id_to_piece(processor.unk_id())
    is_special = lambda i: processor.is_control(i) or processor.is_unknown(i)
    scores = {
        piece: float(processor.get_score(i))
        for piece, i in pieces.items()
        if not (is_special(i) or processor.is_byte(i))
    }
    # BPE scores are the negated ranks of the merges, and Unigram scores are logarithms.
    if len(set(scores.values())) == len(scores) and all(score.is_integer() for score in scores.values()):
        merges = [
            (piece[:at], piece[at:])
            for piece in sorted(scores, key=lambda piece: -scores[piece])
            for at in range(1, len(piece))
            if piece[:at] in scores and piece[at:] in scores
        ]
        model: Any = BPE(pieces, merges, unk_token=unk, byte_fallback=True, fuse_unk=False)
    else:
        all_scores = [(processor.id_to_piece(i), float(processor.get_score(i))) for i in ids]
        model = Unigram(all_scores, unk_id=processor.unk_id(), byte_fallback=True)
    converted = HfTokenizer(model)
    converted.normalizer = normalizers.Replace(" ", "\u2581")  # type: ignore[assignment]
    most = SPAN_CHARACTERS
    parts = Regex(rf"[\s\S]{{1,{most}}}\z|[\s\S]{{0,{most - 1}}}\n|[\s\S]{{{most}}}")
    converted.pre_tokenizer = pre_tokenizers.Split(parts, "isolated")  # type: ignore[assignment]
    converted.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [processor.id_to_piece(i) for i in ids if is_special(i)]
    converted.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return converted.to_str()


def _encode_equally(tokenizer: Tokenizer, converted: str, texts: list[str]) -> bool:
    """Whether a tokenizer and a tokenizer.json give the same ids and the same decoded texts."""
    other = read_tokenizer("huggingface", converted.encode())
    ids, other_ids = tokenizer.encode_batch(texts), other.encode_batch(texts)
    is_same: Callable[[Any, Any], bool] = lambda a, b: a.tolist() == b.tolist()
    return all(map(is_same, ids, other_ids)) and all(tokenizer.decode(row) == other.decode(row) for row in ids)
