"""Tokenizers of published checkpoints: imported into a workdir, and exported with a checkpoint."""

from collections.abc import Callable, Iterable
import json
from typing import Any

from etils import epath

from llmjax.data.store.tokenizer import FILE_NAMES, PIECE_CHARACTERS, Tokenizer, read_tokenizer
from llmjax.data.store.tokenizer_settings import FILE as SETTINGS_FILE, TokenizerSettings
from llmjax.errors import UserError
from llmjax.interop import special_tokens
from llmjax.run.workdir import TOKENIZER

# Beside the model itself: read by others, kept as they are.
_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATES = "additional_chat_templates"  # a folder of them
# (kind, file in a published folder), in the order in which they are looked for
_PUBLISHED = (
    ("huggingface", "tokenizer.json"),
    ("sentencepiece", "tokenizer.model"),
    ("sentencepiece", "spiece.model"),
    ("sentencepiece", "sentencepiece.bpe.model"),
)
_PROBES = (
    "  a\n\n b \t\r\n ",
    "def f(x):\n    return x  # 12345, 0x1F\n\n\n\tif  not\tx:\n        pass\n",
    "The quick brown fox; jumps over: the 'lazy' dog - 3.14159 (2nd time) ...",
    "naïve café Ωμέγα Привет мир 日本語のテキスト 🙂🏽\u200d\u00a0x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa          =============== ((((((( ____________ \x00\x01\x7f",
)


def find(folder: epath.Path, hf: dict[str, Any], *, num_rows: int) -> tuple[str, bytes, TokenizerSettings, Tokenizer]:
    """The tokenizer of a published folder: its file's name, its content, what the other files say of it, and itself.

    hf, num_rows   the folder's config.json, and the ids that its model has
    Raises UserError where there is none that can be read.
    """
    kind, name = next(((kind, name) for kind, name in _PUBLISHED if (folder / name).exists()), ("", ""))
    if not kind:
        names = ", ".join(name for _, name in _PUBLISHED)
        raise UserError(f"{folder}: no tokenizer there; one of {names} is needed")
    content = (folder / name).read_bytes()
    try:
        settings = special_tokens.read(folder, kind, content, hf, num_rows=num_rows)
        return name, content, settings, read_tokenizer(kind, content, settings=settings)
    except UserError as error:
        raise UserError(f"{folder / name}: {error}") from None


def keep(folder: epath.Path, content: bytes, settings: TokenizerSettings, made: Tokenizer, workdir: epath.Path) -> None:
    """Put the tokenizer that `find` found into a workdir, with what lies beside it for other readers."""
    to = workdir / TOKENIZER
    to.mkdir(parents=True, exist_ok=True)
    (to / FILE_NAMES[made.kind]).write_bytes(content)
    (to / SETTINGS_FILE).write_bytes(settings.to_bytes())
    _copy_beside(folder, to)


def _copy_beside(folder: epath.Path, to: epath.Path) -> None:
    for name in _BESIDE:
        if (folder / name).exists():
            (to / name).write_bytes((folder / name).read_bytes())
    if (folder / _TEMPLATES).is_dir():
        (to / _TEMPLATES).mkdir(parents=True, exist_ok=True)
        for template in (folder / _TEMPLATES).glob("*.jinja"):
            (to / _TEMPLATES / template.name).write_bytes(template.read_bytes())


def write(
    made: Tokenizer,
    content: bytes,
    folder: epath.Path,
    *,
    texts: Iterable[str] = (),
    longest: int | None = None,
    begin: int | None = None,
) -> str:
    """Write a tokenizer so that AutoTokenizer reads it; returns a line that says what was written.

    content   of the tokenizer's own file
    texts     on which a SentencePiece model and its tokenizer.json must agree, beside some that are hard
    longest   sequence that the model reads; None: no limit
    begin     the id that documents were trained behind, which the tokenizer is to put before a text; None: none
    """
    if made.kind == "bytes":
        return "no tokenizer: no published class expresses bytes with BOS 256, EOS 257 and padding 258"
    if made.kind == "huggingface":
        framed = _begin_texts(content.decode(), begin, made)
        (folder / "tokenizer.json").write_text(framed)
        said = "tokenizer.json as it was given" + (
            f", but texts begin with id {begin}" if framed != content.decode() else ""
        )
    else:
        (folder / "tokenizer.model").write_bytes(content)
        tried, converted = [*_PROBES, *texts], _as_json(content)
        if converted is None or not _agree(made, converted, tried):
            return "tokenizer.model alone, to be read with sentencepiece: no tokenizer.json gives the same ids"
        (folder / "tokenizer.json").write_text(_begin_texts(converted, begin, made))
        said = f"tokenizer.json, which gives the same ids as tokenizer.model on all of {len(tried)} texts tried"
    (folder / "tokenizer_config.json").write_text(json.dumps(_config(made, longest, begin), indent=2) + "\n")
    return said


def give_back(content: bytes, name: str, workdir: epath.Path, folder: epath.Path) -> str:
    """Write a tokenizer that `keep` put into `workdir`, and what lay beside it, under its old names."""
    (folder / name).write_bytes(content)
    _copy_beside(workdir / TOKENIZER, folder)
    return f"{name} as it was imported"


def _config(made: Tokenizer, longest: int | None, begin: int | None) -> dict[str, Any]:
    names = {i: name for name, i in made.special_tokens.items()}
    first = made.bos_id if begin is None else begin
    special = {"bos": first, "eos": made.eos_id, "pad": made.pad_id, "unk": made.unk_id}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": names[i] for role, i in special.items() if i in names}
    return config | ({} if longest is None else {"model_max_length": longest})


def _begin_texts(content: str, begin: int | None, made: Tokenizer) -> str:
    """A tokenizer.json that puts `begin` before a text, and nothing else around it; as it is where it does so."""
    from tokenizers import Tokenizer as Json, processors

    converted = Json.from_str(content)
    frame = special_tokens.read_frame(converted) or ((), ())
    if frame == (() if begin is None else (begin,), ()):
        return content
    if begin is None:
        converted.post_processor = processors.Sequence([])  # type: ignore[assignment]
        return converted.to_str()
    name = next(name for name, i in made.special_tokens.items() if i == begin)
    converted.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=[name, "$A"], pair=[name, "$A", "$B:1"], special_tokens=[(name, begin)]
    )
    return converted.to_str()


def _as_json(content: bytes) -> str | None:
    """A SentencePiece model trained here as a tokenizer.json; None for one of another make.

    Spaces are read as U+2581 (and so is U+2581 itself, which we take by its bytes), characters without a piece by their
    bytes, long texts in pieces cut after a line. A BPE model merges any two neighbours whose union is a piece, the best
    piece first, as merge rules in that order do; where several pairs make one piece, or pieces score alike, the two
    may differ, hence a trial decides.
    """
    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer as Json, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE, Unigram

    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    ids = range(model.vocab_size())
    pieces = {model.id_to_piece(i): i for i in ids}
    probe = "  a  b "
    if model.decode(model.encode(probe)) != probe or model.unk_id() < 0 or "<0xE2>" not in pieces:
        return None
    unk = model.id_to_piece(model.unk_id())
    plain = {p: i for p, i in pieces.items() if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))}
    if len({model.get_score(i) for i in plain.values()}) == len(plain) and all(
        float(model.get_score(i)).is_integer() for i in plain.values()
    ):
        merges = [
            (piece[:at], piece[at:])
            for piece in sorted(plain, key=lambda p: -model.get_score(plain[p]))
            for at in range(1, len(piece))
            if piece[:at] in plain and piece[at:] in plain
        ]
        kind: Any = BPE(pieces, merges, unk_token=unk, byte_fallback=True, fuse_unk=False)
    else:
        scores = [(model.id_to_piece(i), float(model.get_score(i))) for i in ids]
        kind = Unigram(scores, unk_id=model.unk_id(), byte_fallback=True)
    made = Json(kind)
    made.normalizer = normalizers.Replace(" ", "\u2581")  # type: ignore[assignment]
    most = PIECE_CHARACTERS
    cut = Regex(rf"[\s\S]{{1,{most}}}\z|[\s\S]{{0,{most - 1}}}\n|[\s\S]{{{most}}}")
    made.pre_tokenizer = pre_tokenizers.Split(cut, "isolated")  # type: ignore[assignment]
    made.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [model.id_to_piece(i) for i in ids if model.is_control(i) or model.is_unknown(i)]
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return made.to_str()


def _agree(made: Tokenizer, converted: str, texts: list[str]) -> bool:
    other = read_tokenizer("huggingface", converted.encode())
    ours, theirs = made.encode_batch(texts), other.encode_batch(texts)
    same: Callable[[Any, Any], bool] = lambda a, b: a.tolist() == b.tolist()
    return all(map(same, ours, theirs)) and all(made.decode(ids) == other.decode(ids) for ids in ours)
