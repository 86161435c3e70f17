"""Memorisation: training text that greedy decoding writes again, and the exposure of canaries."""

from collections.abc import Callable, Sequence
import dataclasses
import logging
import math
import pathlib

import numpy as np

from llmjax.data.store.manifest import read_manifest
from llmjax.data.store.token_store import TokenStore
from llmjax.errors import UserError
from llmjax.evals.config import TaskConfig
from llmjax.evals.requests import LanguageModel
from llmjax.evals.tasks.outcome import Outcome, Scores
from llmjax.run.loading import Loaded

logger = logging.getLogger(__name__)

MAX_DOCUMENTS = 1000  # of a split, unless the task has a limit
NOTE = (
    "control is the same of validation documents, which the model was not trained on; what it extracts there is common "
    "text, not memorised text"
)
_TRAIN, _CONTROL = "train", "validation"
_SEED = 0
_DIGITS = "0123456789"


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """The beginning of a document: split and source, its number there, and the token ids of prompt and continuation."""

    split: str
    source: str
    document: int
    prompt: np.ndarray
    continuation: np.ndarray


def fingerprint_store(loaded: Loaded, where: str) -> str:
    """That of the run's token store. Raises UserError without one."""
    manifest = read_manifest(loaded.store)
    if manifest is None:
        raise UserError(
            f"{where}.kind='memorisation': {loaded.store} holds no token store, so the training documents are unknown; "
            "use a run that was trained here, or set --config.data.store"
        )
    return manifest["fingerprint"]


def run(task: TaskConfig, loaded: Loaded, model: LanguageModel, where: str) -> Outcome:
    """Score documents of the training and the validation split, and the canaries.

    extraction_rate   share of training documents of which greedy decoding, after the first `prompt_tokens`, writes the
                      next `continuation_tokens` exactly (Carlini et al. 2023, arXiv:2202.07646)
    control_rate      the same of validation documents
    matched_tokens    mean number of tokens up to the first one that is another
    exposure          mean over the canaries, in bits; see `find_exposure`
    """
    size = task.prompt_tokens + task.continuation_tokens
    if size > model.max_length:
        raise UserError(
            f"{where}.prompt_tokens={task.prompt_tokens}: with continuation_tokens={task.continuation_tokens}, more "
            f"than the {model.max_length} tokens that the model reads; lower one of them"
        )
    excerpts = [*_draw_excerpts(task, loaded.store, _TRAIN), *_draw_excerpts(task, loaded.store, _CONTROL)]
    splits = [excerpt.split for excerpt in excerpts]
    if _TRAIN not in splits:
        raise UserError(
            f"{where}.prompt_tokens={task.prompt_tokens}: no training document of {loaded.store} has the {size} tokens "
            "of a prompt and its continuation; lower prompt_tokens or continuation_tokens"
        )
    if _CONTROL not in splits:
        logger.info("  no validation document has %d tokens, so there is no control", size)
    matched = model.count_greedy([([model.prefix_id, *each.prompt.tolist()], each.continuation) for each in excerpts])
    lines = [
        _describe(index, each, count, model) for index, (each, count) in enumerate(zip(excerpts, matched, strict=True))
    ]
    canaries = [_score_canary(model, canary, task.alternatives) for canary in task.canaries]
    lines += [{"index": len(excerpts) + number, **canary} for number, canary in enumerate(canaries)]

    columns = {
        name: np.array([line.get(name, np.nan) for line in lines], np.float64)
        for name in ("extraction_rate", "matched_tokens", "exposure")
    }
    is_train = np.array([line["split"] == _TRAIN for line in lines])

    details = {
        "note": NOTE,
        "documents": {split: splits.count(split) for split in (_TRAIN, _CONTROL)},
        "canaries": [
            {name: canary[name] for name in ("input", "exposure", "rank", "alternatives")} for canary in canaries
        ],
    }
    return Outcome(lines, _make_score(columns, is_train), "extraction_rate", details)


def _make_score(columns: dict[str, np.ndarray], is_train: np.ndarray) -> Callable[[np.ndarray], Scores]:
    def score(indices: np.ndarray) -> Scores:
        chosen = is_train[indices]
        rate, matched = columns["extraction_rate"][indices], columns["matched_tokens"][indices]
        scores = {
            "extraction_rate": _mean(rate[chosen]),
            "control_rate": _mean(rate[~chosen]),
            "matched_tokens": _mean(matched[chosen]),
            "control_matched_tokens": _mean(matched[~chosen]),
        }
        scores["extraction_gap"] = scores["extraction_rate"] - scores["control_rate"]
        if not np.isnan(columns["exposure"]).all():
            scores["exposure"] = _mean(columns["exposure"][indices])
        return scores

    return score


def _mean(values: np.ndarray) -> float:
    """The mean of the values that are not nan; nan without any."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _draw_excerpts(task: TaskConfig, folder: pathlib.Path, split: str) -> list[Excerpt]:
    """Random documents of a split that are long enough, without their EOS."""
    size, manifest, found = task.prompt_tokens + task.continuation_tokens, read_manifest(folder), []
    assert manifest is not None
    stores = {
        name: TokenStore(folder / name / split)
        for name, source in manifest["sources"].items()
        if source[split]["tokens"]
    }
    for name, store in stores.items():
        long_enough = np.flatnonzero(store.lengths() > size)
        found += [(name, int(number)) for number in long_enough]
    rng = np.random.default_rng(_SEED)
    chosen = sorted(rng.permutation(len(found))[: task.limit or MAX_DOCUMENTS].tolist())
    starts = {name: store.starts() for name, store in stores.items()}
    excerpts = []
    for name, number in (found[index] for index in chosen):
        ids = stores[name].read(int(starts[name][number]), size)
        excerpts.append(Excerpt(split, name, number, ids[: task.prompt_tokens], ids[task.prompt_tokens :]))
    return excerpts


def _describe(index: int, excerpt: Excerpt, matched: int, model: LanguageModel) -> dict:
    decode = lambda ids: model.tokenizer.decode(ids.tolist())
    return {
        "index": index,
        "split": excerpt.split,
        "source": excerpt.source,
        "document": excerpt.document,
        "input": decode(excerpt.prompt),
        "target": decode(excerpt.continuation),
        "prediction": decode(excerpt.continuation[:matched]),  # what was written up to the first wrong token
        "matched_tokens": matched,
        "extraction_rate": float(matched == len(excerpt.continuation)),
    }


def _score_canary(model: LanguageModel, canary: str, count: int) -> dict:
    texts = [canary, *draw_alternatives(canary, count)]
    nats = np.array([-value for value in model.rolling([model.encode(text) for text in texts])])
    exposure, rank = find_exposure(nats[0], nats[1:])
    return {
        "split": "canary",
        "input": canary,
        "target": None,
        "prediction": None,
        "nats": float(nats[0]),
        "rank": rank,
        "alternatives": len(texts) - 1,
        "exposure": exposure,
    }


def draw_alternatives(canary: str, count: int) -> list[str]:
    """Up to `count` different texts with random digits in place of those of the canary, none of which is the canary."""
    places = [place for place, letter in enumerate(canary) if letter in _DIGITS]
    # With few digits all alternatives are taken.
    space = 10 ** len(places)
    own = int("".join(canary[place] for place in places))
    rng = np.random.default_rng(_SEED)
    numbers: dict[int, None] = {}
    if space - 1 <= count:
        numbers = dict.fromkeys(range(space))
        numbers.pop(own)
    while len(numbers) < min(count, space - 1):
        number = int("".join(map(str, rng.integers(0, 10, len(places)))))
        if number != own:
            numbers[number] = None
    texts = []
    for number in numbers:
        letters = list(canary)
        for place, digit in zip(places, str(number).zfill(len(places)), strict=True):
            letters[place] = digit
        texts.append("".join(letters))
    return texts


def find_exposure(canary: float, alternatives: Sequence[float] | np.ndarray) -> tuple[float, int]:
    """(exposure in bits, rank from 1) of a canary by its log-perplexity and those of alternatives, all in one unit.

    log2 of the number of texts minus log2 of the canary's rank among them (Carlini et al. 2019, "The Secret Sharer",
    arXiv:1802.08232, definition 4): about 1.4 bits on average without memorisation, and log2 of the number of texts at
    most. An alternative of equal log-perplexity ranks before the canary.
    """
    rank = 1 + int(np.sum(np.asarray(alternatives) <= canary))
    return math.log2(len(alternatives) + 1) - math.log2(rank), rank
