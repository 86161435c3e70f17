"""Config of the data: sources, tokenizer, split, packing, mixture, and the objective."""

from collections.abc import Mapping
import dataclasses

from llmjax.errors import UserError, suggest

# The fields of ObjectiveConfig that each objective uses.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "causal": (),
    "prefix": ("target_len", "prompt_form"),
    "masked": ("rate", "whole_words"),
    "span": ("rate", "mean_span", "target_len", "prompt_form"),
    "ul2": ("target_len", "prompt_form"),
    "fim": ("fim_rate",),
    "classify": ("class_weights",),
    "regress": (),
    "contrastive": ("pooling", "temperature"),
    "similarity": ("pooling",),
    "dpo": ("beta",),
    "reward": (),
}
LABELLED = ("classify", "regress")  # those that read the labels of documents
PREFERENCES = ("dpo", "reward")  # those whose records have a prompt, a chosen answer and a rejected one
EMBEDDING = ("contrastive", "similarity")  # those that train vectors of texts
SEVERAL_TEXTS = (*EMBEDDING, *PREFERENCES)  # those that read several texts of a record, each by itself
PROMPT_FORMS = ("trained", "plain")
DEFAULT_TEMPLATE = "default"
POOLINGS = ("mean", "first", "last", "max")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One named source of documents.

    path         a file, a glob (`**` crosses folders), `tfds:NAME[:SPLIT][@DATA_DIR]`, or `stdlib:` (Python's sources)
    weight       relative share of training samples; None: its share of the tokens. Set it for all sources, or for none
    text_field   the field or column of the text in JSON, CSV, TSV, Parquet and TFDS records
    split_field  the field of JSONL records that names their split (train, validation, test), as `llmjax curate` writes
                 it; empty: data.split decides
    split        the split of all documents of the source, for data that come as one file a split; empty: data.split
                 decides
    label_field  the field or column of the label, for objective.name="classify" or "regress"; empty: no labels
    pair_field   the field or column of the second text where each label is of two texts, or without labels of the text
                 that belongs to the first or is compared with it, for objective.name="contrastive" and "similarity";
                 empty: one text
    negative_field  the field or column of a text that is similar to the first and does not belong to it (a hard
                 negative), for objective.name="contrastive"; empty: none
    score_field  the field or column of the similarity of the two texts, from -1 to 1, for objective.name="similarity";
                 empty: none
    chosen_field, rejected_field  the fields or columns of a better and a worse answer to the first text, a prompt, for
                 objective.name="dpo" and "reward"; empty: the source has none
    chat         the records are dialogues, of which the assistant's turns are scored: "messages" (role, content),
                 "sharegpt" (from, value), "alpaca" (instruction, input, output), "prompt" (prompt, completion), or
                 "auto": by each record's fields; text_field can name another field of the turns. Empty: plain text,
                 all of which is scored
    columns      names of the columns of CSV and TSV files without a header line
    format       "text", "jsonl", "json" (arrays, or objects over several lines), "csv", "tsv" or "parquet"; empty: by
                 each file's content, its ending a hint
    max_record_bytes  a longer record is left out and counted; text files are not records
    accept_truncated  use what precedes the damage of a file that ends early or is damaged, instead of an error
    """

    path: str = "stdlib:"
    weight: float | None = None
    text_field: str = "text"
    split_field: str = ""
    split: str = ""
    label_field: str = ""
    pair_field: str = ""
    negative_field: str = ""
    score_field: str = ""
    chosen_field: str = ""
    rejected_field: str = ""
    chat: str = ""
    columns: tuple[str, ...] = ()
    format: str = ""
    max_record_bytes: int = 1 << 26
    accept_truncated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Text to token ids.

    kind            "sentencepiece", "huggingface" (a tokenizer.json) or "bytes"
    path            a model file; empty: `prepare` trains one (SentencePiece only)
    algorithm       "bpe" or "unigram", for training
    vocab_size      tokens, for training
    training_bytes  the most bytes of text that training reads, sampled across the training documents
    """

    kind: str = "sentencepiece"
    path: str = ""
    algorithm: str = "bpe"
    vocab_size: int = 4096
    training_bytes: int = 10_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class FractionsConfig:
    """Which fractions of the documents are for validation and test; the others are for training."""

    validation: float = 0.05
    test: float = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig(FractionsConfig):
    """Which documents are for training, validation and test: by a hash of the content, so new data moves none.

    validation, test   fractions of the documents
    near_copies        put near-duplicates of a document into its split (MinHash of 5-word shingles)
    """

    near_copies: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Everything between text on disk and a batch.

    sources           sources by name: section data.sources.NAME
    tokenizer, split  sections data.tokenizer and data.split
    classes           the classes of labelled text, in the order of their numbers; (): its labels are numbers
    multi_label       whether a label is a list of classes, possibly empty, instead of one class
    chat_template     a Jinja file that writes dialogues as text, or "default" (llmjax's own); empty: that of the
                      tokenizer, and for a tokenizer that is trained here, or bytes, the default one
    store             folder of the token store; empty: WORKDIR/store
    seq_len           tokens in a row
    packing           best_fit (a plan that keeps documents whole), concat (windows over the stream of all documents),
                      stream (windows as one text: a document sees those before it in the row, and attention needs no
                      segments) or none (one document, or a part of a longer one, in a row, the rest of which is padded)
    mixture_block     samples in a mixture block; at the end of each, every source is within one sample of its share
    weight_schedule   ((from_sample, ((name, weight), ...)), ...): weights from that global sample index on
    at_source_end     "repeat" (a new epoch in a new order) or "redistribute" (its weight goes to the others)
    skip              ((from, to), ...): spans of global sample indices that training skips
    max_bad_fraction  fraction of unreadable records from which `prepare` stops; rejects.jsonl lists them in any case
    workers           processes that prepare the store; 0: one per core
    prefetch          batches assembled ahead of the step, by one thread
    """

    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerConfig = TokenizerConfig()
    split: SplitConfig = SplitConfig()
    classes: tuple[str, ...] = ()
    multi_label: bool = False
    chat_template: str = ""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What a model predicts of a text. A field that the objective does not use must stay unset.

    name         causal (each token from those before it), prefix (the rest of a chunk from a random prefix),
                 masked (masked tokens from both sides: BERT), span (corrupted spans, written by the decoder: T5),
                 ul2 (corrupted spans of seven denoisers, with a mode token), fim (causal, with the middle of a chunk
                 moved to the end), classify (the class of a document, or with data.multi_label its classes; an
                 encoder-decoder writes the name of the class), regress (the number that is its label), contrastive
                 (which text of a batch belongs to which), similarity (the similarity of two texts by the cosine of
                 their vectors), dpo (which of two answers is better, by their likelihoods), reward (the same by a
                 number for each answer)
    class_weights  classify: weight of the loss of each class in training, in the order of data.classes; (): 1 each
    pooling      contrastive, similarity: how a text's vector is made of the hidden states of its tokens: mean, first,
                 last or max; "": that of the imported folder (1_Pooling of sentence-transformers), or mean
    temperature  contrastive: cosines are divided by it, above 0; None: 0.05
    beta         dpo: how strongly the model is kept near the reference model, above 0; None: 0.1
    rate         masked, span: fraction of tokens that is masked or corrupted, above 0 and below 1; None: 0.15
    mean_span    span: mean tokens of a corrupted span, at least 1; None: 3.0
    whole_words  masked: the tokens of a word are masked together
    fim_rate     fim: fraction of chunks whose middle is moved, above 0 and up to 1; None: 0.5
    target_len   span, ul2, and prefix of an encoder-decoder: tokens in a row of the decoder, where data.seq_len is the
                 encoder's; 0: what full rows of the encoder need
    prompt_form  span, ul2, and prefix of an encoder-decoder: the form of a prompt for the encoder. trained: as in the
                 training batches, such as the text and a sentinel, for a model that only learned to complete texts;
                 plain: the text and EOS, for one that was tuned on instructions. No batch depends on it
    """

    name: str = "causal"
    class_weights: tuple = ()
    pooling: str = ""
    temperature: float | None = None
    beta: float | None = None
    rate: float | None = None
    mean_span: float | None = None
    whole_words: bool = False
    fim_rate: float | None = None
    target_len: int = 0
    prompt_form: str = "trained"

    def __post_init__(self):
        if self.name not in OBJECTIVES:
            raise UserError(
                f"objective.name={self.name!r}{suggest(self.name, OBJECTIVES)}: expected one of {', '.join(OBJECTIVES)}"
            )
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default and field.name not in OBJECTIVES[self.name]:
                users = ", ".join(name for name, used in OBJECTIVES.items() if field.name in used)
                raise UserError(
                    f"objective.{field.name}={value!r}: objective.name={self.name!r} does not use it, only {users}; "
                    "leave it unset"
                )
        if self.rate is not None and not 0 < self.rate < 1:
            raise UserError(f"objective.rate={self.rate}: must be above 0 and below 1")
        if self.mean_span is not None and not 1 <= self.mean_span < float("inf"):
            raise UserError(f"objective.mean_span={self.mean_span}: must be at least 1")
        if self.fim_rate is not None and not 0 < self.fim_rate <= 1:
            raise UserError(f"objective.fim_rate={self.fim_rate}: must be above 0 and at most 1")
        if self.prompt_form not in PROMPT_FORMS:
            raise UserError(
                f"objective.prompt_form={self.prompt_form!r}{suggest(self.prompt_form, PROMPT_FORMS)}: expected one of "
                f"{', '.join(PROMPT_FORMS)}"
            )
        if self.pooling not in ("", *POOLINGS):
            raise UserError(
                f"objective.pooling={self.pooling!r}{suggest(self.pooling, POOLINGS)}: choose one of "
                f"{', '.join(POOLINGS)}, or leave it empty"
            )
        for name in ("temperature", "beta"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"objective.{name}={value}: must be above 0")
        if not all(isinstance(weight, int | float) and weight > 0 for weight in self.class_weights):
            raise UserError(f"objective.class_weights={self.class_weights}: expected numbers above 0")
        if self.target_len < 0:
            raise UserError(f"objective.target_len={self.target_len}: must be at least 1, or 0")
