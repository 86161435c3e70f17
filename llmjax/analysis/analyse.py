"""Analyse what a run gets wrong on a task: the parts of the report, and its JSON file."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import logging
from typing import Any

import numpy as np

from llmjax.analysis import label_errors, learning_curve, mismatch, near_copies, next_steps, slices
from llmjax.analysis.result import Analysis, Confusion, WorstExample
from llmjax.analysis.task_examples import TaskExamples, list_fields
from llmjax.analysis.token_losses import TokenLosses
from llmjax.analysis.train_texts import TrainTexts
from llmjax.analysis.vectors import compute_tfidf, make_analyzer
from llmjax.evals import results

logger = logging.getLogger(__name__)

NUM_WORST = 20
MANY_COPIES = 0.1  # share of examples from which a model knows their labels
_SHOWN = 3  # examples of a confusion

Embed = Callable[[Sequence[str]], np.ndarray]


def find_worst(scored: TaskExamples) -> list[int]:
    """The examples with the largest losses, of those that are wrong if some are."""
    order = np.argsort(-scored.losses, kind="stable")
    if scored.has_answers and (scored.errors > 0).any():
        order = order[scored.errors[order] > 0]
    return order[:NUM_WORST].tolist()


def analyse(
    scored: TaskExamples,
    train: TrainTexts | str,
    *,
    embed: Embed | None = None,
    vectors_name: str = "",
    is_trained: bool = True,
    token_losses: Mapping[int, list[TokenLosses]] | None = None,
) -> Analysis:
    """Run all parts.

    train         training texts, or why there are none
    embed         texts -> vectors float [texts, dimensions] of a model named `vectors_name`; None: TF-IDF
    is_trained    whether that model was trained on the training texts: then its vectors do not show a mismatch, and do
                  not find label errors among examples that it was trained on
    token_losses  of the worst examples
    """
    missing: dict[str, str] = {}
    worst = [
        WorstExample(
            index=index, loss=float(scored.losses[index]), token_losses=list((token_losses or {}).get(index, ()))
        )
        for index in find_worst(scored)
    ]
    logger.info("slices: %d examples", len(scored.lines))
    frequencies = None if isinstance(train, str) else slices.count_words(map(make_analyzer(), train.texts))
    texts = list(scored.texts) if isinstance(train, str) else train.test
    masks = slices.make_masks(texts, list_fields(scored), frequencies)
    copies, compared = None, None
    if isinstance(train, str):
        missing |= dict.fromkeys(("near_copies", "mismatch"), train)
    else:
        logger.info("near-duplicates: %d training texts", len(train.texts))
        copies = near_copies.find_near_copies(train.texts, train.test)
        compared = _compare(train, None if is_trained else embed, missing)
    errors, curve, used = None, None, ""
    has_copies = len(copies or ()) > MANY_COPIES * len(scored.lines)
    if scored.classes:
        if embed is not None and is_trained and has_copies:
            missing["vectors"] = (
                f"{len(copies or ()):,} examples are copies of training texts, whose labels the model's vectors know, "
                "so TF-IDF is used; name another model with --vectors"
            )
            embed = None
        used = vectors_name if embed is not None else "TF-IDF"
        errors, curve = _fit_classifiers(scored, train, embed, missing, has_copies=has_copies)
    else:
        missing |= dict.fromkeys(
            ("label_errors", "learning_curve", "confusions"), f"kind={scored.task.kind!r} has no classes"
        )
    confusions = list_confusions(scored) if scored.classes else None
    main = results.find_main(scored.record)
    on_copies, on_others = _split_scores(scored, copies)
    analysis = Analysis(
        task=scored.name,
        step=scored.step,
        kind=scored.task.kind,
        count=len(scored.lines),
        measure=main,
        score=scored.record["metrics"][main],
        error_name="error rate"
        if scored.has_answers
        else main
        if scored.task.kind == "perplexity"
        else "squared error",
        is_binary=scored.has_answers,
        classes=scored.classes,
        vectors=used,
        worst=worst,
        confusion_matrix=scored.record.get("confusion") if scored.classes else None,
        confusions=confusions,
        slices=slices.find_slices(scored.errors, masks),
        label_errors=errors,
        mismatch=compared,
        near_copies=copies,
        score_of_copies=on_copies,
        score_of_others=on_others,
        learning_curve=curve,
        train_origin="" if isinstance(train, str) else train.origin,
        train_total=0 if isinstance(train, str) else train.total,
        train_read=0 if isinstance(train, str) else len(train.texts),
        missing=missing,
    )
    return dataclasses.replace(analysis, next_steps=next_steps.rank_steps(analysis))


def list_confusions(scored: TaskExamples) -> list[Confusion]:
    """The pairs of a class and a wrong prediction, the most frequent first."""
    members: dict[tuple[str, str], list[int]] = {}
    for index, line in enumerate(scored.lines):
        if line["target"] != line["prediction"]:
            members.setdefault((line["target"], line["prediction"]), []).append(index)
    ordered = sorted(members.items(), key=lambda item: -len(item[1]))
    return [Confusion(target=t, prediction=p, count=len(i), indices=i[:_SHOWN]) for (t, p), i in ordered]


def to_json(analysis: Analysis) -> dict[str, Any]:
    """The content of analysis.json. Indices are those of the lines of eval/<step>/<task>.jsonl."""
    fields = dataclasses.asdict(analysis)
    fields["slices"] = [
        {
            **{name: value for name, value in dataclasses.asdict(each).items() if name != "indices"},
            "significant": each.is_significant,
        }
        for each in analysis.slices
    ]
    if analysis.mismatch is not None:
        fields["mismatch"] |= {"alarm": analysis.mismatch.is_alarm, "level": mismatch.LEVEL}
    return fields


def list_suggestions(scored: TaskExamples, analysis: Analysis) -> list[dict[str, Any]]:
    """The records of the task's file, those that are likely mislabelled with `suggested_label` and `label_error_score`.

    The label itself is kept: of the likely errors many are none, so a person decides.
    """
    names = scored.task.labels or scored.classes
    by_index = {error.index: error for error in analysis.label_errors or ()}
    records = []
    for index, example in enumerate(scored.examples):
        record = {str(name): _json_ready(value) for name, value in example.fields.items()}
        if (error := by_index.get(index)) is not None:
            suggested = names[scored.classes.index(error.suggested)]
            given = example.fields[scored.task.label_field]
            record["suggested_label"] = int(suggested) if isinstance(given, int) else suggested
            record["label_error_score"] = error.score
        records.append(record)
    return records


def _json_ready(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else json.loads(json.dumps(value, default=str))


def _compare(train: TrainTexts, embed: Embed | None, missing: dict[str, str]) -> mismatch.Mismatch | None:
    first, second = mismatch.draw_sample(train.texts), mismatch.draw_sample(train.test)
    if min(len(first), len(second)) < mismatch.MIN_TEXTS:
        missing["mismatch"] = f"a sample has fewer than {mismatch.MIN_TEXTS} texts"
        return None
    logger.info("train/dev mismatch: %d training texts, %d of the task", len(first), len(second))
    return mismatch.compare_samples(first, second, None if embed is None else embed([*first, *second]))


def _fit_classifiers(
    scored: TaskExamples, train: TrainTexts | str, embed: Embed | None, missing: dict[str, str], *, has_copies: bool
) -> tuple[list[label_errors.LabelError] | None, learning_curve.LearningCurve | None]:
    """(likely label errors, learning curve) by logistic regression on vectors of the texts.

    has_copies  whether many examples are training texts, which no learning curve may be measured on
    """
    from sklearn.model_selection import train_test_split

    texts = list(scored.texts) if isinstance(train, str) else train.test
    train_labels = None if isinstance(train, str) else train.labels
    logger.info("label errors and learning curve: logistic regression on vectors of %d texts", len(texts))
    if train_labels is None or isinstance(train, str) or has_copies:
        vectors = compute_tfidf(texts) if embed is None else embed(texts)
        reason = "many of them are training texts" if has_copies else "no labelled training texts"
        missing["learning_curve_train"] = f"{reason}: four fifths of the task's examples are learned from"
        chosen, held_out = train_test_split(np.arange(len(texts)), test_size=0.2, random_state=0, shuffle=True)
        curve = learning_curve.measure_curve(
            vectors[chosen], scored.labels[chosen], vectors[held_out], scored.labels[held_out]
        )
    else:
        chosen = np.random.default_rng(0).permutation(len(train.texts))[: learning_curve.MAX_TRAIN]
        some = [*texts, *(train.texts[index] for index in chosen)]
        every = compute_tfidf(some) if embed is None else embed(some)
        vectors, learned = every[: len(texts)], every[len(texts) :]
        curve = learning_curve.measure_curve(learned, train_labels[chosen], vectors, scored.labels)
    if curve is None:
        missing["learning_curve"] = "there are too few labelled examples"
    probabilities = None
    if len(np.unique(scored.labels)) == len(scored.classes):
        probabilities = label_errors.predict_out_of_fold(vectors, scored.labels)
    if probabilities is None:
        missing["label_errors"] = f"a class has fewer than {label_errors.FOLDS} examples"
        return None, curve
    return label_errors.find_label_errors(scored.labels, probabilities, scored.classes), curve


def _split_scores(
    scored: TaskExamples, copies: Sequence[near_copies.NearCopy] | None
) -> tuple[float | None, float | None]:
    """The mean of the main score over copies, and over the others; None where it is no mean, or there are none."""
    if not copies or not scored.has_answers or len(copies) == len(scored.lines):
        return None, None
    right = 1 - scored.errors
    mask = np.zeros(len(right), bool)
    mask[[copy.index for copy in copies]] = True
    return float(right[mask].mean()), float(right[~mask].mean())
