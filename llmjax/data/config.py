"""What the data room is told: sources, tokenizer, split, packing, mixture."""

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One named source of documents.

    path         a file, a glob (`**` crosses folders), `tfds:NAME[:SPLIT][@DATA_DIR]`, or `stdlib:` (Python's sources)
    weight       relative share of training samples; None: its share of the tokens (give all sources a weight, or none)
    text_field   the field that holds the text in JSONL, Parquet and TFDS records
    """

    path: str = "stdlib:"
    weight: float | None = None
    text_field: str = "text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Text to token ids.

    kind            "sentencepiece", "huggingface" (a tokenizer.json) or "bytes"
    path            a given model file; empty: `prepare` trains one (SentencePiece only)
    algorithm       "bpe" or "unigram", for training
    vocab_size      tokens, for training
    training_bytes  text that training reads at most, in bytes, spread over the training documents
    """

    kind: str = "sentencepiece"
    path: str = ""
    algorithm: str = "bpe"
    vocab_size: int = 4096
    training_bytes: int = 10_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which documents train, validate and test: by hash of the content, so adding data moves no old document.

    validation, test   fractions of the documents
    near_copies        keep near copies of a document on its side (MinHash of 5-word shingles)
    """

    validation: float = 0.05
    test: float = 0.05
    near_copies: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Everything between text on disk and a batch.

    sources           named entries; a name that is new gets SourceConfig's defaults
    tokenizer, split  see there
    store             folder of the token store; empty: WORKDIR/store
    seq_len           tokens in a row
    packing           "best_fit" (a plan that keeps documents whole) or "concat" (windows over the stream)
    mixture_block     samples in a mixture block; at its edges every source is within one sample of its share
    weight_schedule   ((from_sample, ((name, weight), ...)), ...): weights from that global sample index on
    at_source_end     "repeat" (a new epoch in a new order) or "redistribute" (its weight goes to the others)
    skip              ((from, to), ...): spans of global sample indices that training leaves out
    max_bad_fraction  of unreadable records before `prepare` stops; they are counted, and kept in rejects.jsonl anyway
    workers           processes that prepare the store; 0: one a core
    prefetch          batches assembled ahead of the step, by one thread
    """

    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerConfig = TokenizerConfig()
    split: SplitConfig = SplitConfig()
    store: str = ""
    seq_len: int = 256
    packing: str = "best_fit"
    mixture_block: int = 1024
    weight_schedule: tuple = ()
    at_source_end: str = "repeat"
    skip: tuple = ()
    max_bad_fraction: float = 0.01
    workers: int = 0
    prefetch: int = 3
