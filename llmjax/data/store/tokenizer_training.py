"""Train a SentencePiece model on the documents of a run."""

from collections.abc import Iterable
import io
import re

from llmjax.data.store.tokenizer_kinds import split_text
from llmjax.errors import UserError

# The names that the trainer gives to special tokens.
SPECIAL_TOKENS = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>"}


def train_sentencepiece(texts: Iterable[str], *, algorithm: str, vocab_size: int) -> bytes:
    """Train a lossless SentencePiece model: byte fallback, no normalisation, all spaces kept.

    Deterministic. Raises UserError if the text is too small for the vocabulary.
    """
    import sentencepiece

    if algorithm not in ("bpe", "unigram"):
        raise UserError(f"data.tokenizer.algorithm={algorithm!r}: expected 'bpe' or 'unigram'")
    if vocab_size < 300:
        raise UserError(f"data.tokenizer.vocab_size={vocab_size}: give 300 or more (256 are bytes, 4 special tokens)")
    # The trainer skips texts that hold its own marks; without the marks it learns from the rest of them.
    spans = (re.sub("[\0\u2581\u2585]", " ", span) for text in texts for span in split_text(text))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=spans,
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
            num_threads=2,  # the result does not depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]  # without the line of the library's source
        raise UserError(
            f"data.tokenizer.vocab_size={vocab_size}: cannot be trained on this text ({reason}); "
            "give a smaller vocabulary or more text, or data.tokenizer.kind='bytes'"
        ) from None
    return model.getvalue()
