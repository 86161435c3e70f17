"""What to do next, ranked by how many of the task's examples it concerns, each line with its evidence."""

from collections.abc import Sequence

import numpy as np

from llmjax.analysis.result import Analysis, NextStep

_CONFIDENT = 0.5  # score of a label error; many of those below it are none
_MANY_ERRORS = 0.01  # share of such label errors from which labels are worth a review
_MIN_COPIES = 0.005  # share of examples
_TRAINING_SET = 0.5  # share of copies from which a task scores the training set, such as to find its label errors
_MIN_GAIN = 0.005  # of error, from more data


def rank_steps(analysis: Analysis) -> list[NextStep]:
    """The steps for which the analysis has evidence, the most important first.

    On the training set, the score, the slices and the learning curve say little about new texts, so they are left out.
    """
    steps = [*_about_copies(analysis), *_about_labels(analysis)]
    if not _is_training_set(analysis):
        steps += [
            *_about_mismatch(analysis),
            *_about_slices(analysis),
            *_about_confusions(analysis),
            *_about_data(analysis),
        ]
    if not steps:
        steps = [
            NextStep(
                text="Read the worst examples and look for what they have in common.",
                reason="No test of this analysis found a single cause of the errors.",
                evidence="worst",
                share=0.0,
            )
        ]
    return sorted(steps, key=lambda step: (not step.is_first, -step.share))


def _measure_copies(analysis: Analysis) -> float:
    """The share of examples that are near-duplicates of training texts."""
    return len(analysis.near_copies or ()) / analysis.count


def _is_training_set(analysis: Analysis) -> bool:
    return _measure_copies(analysis) >= _TRAINING_SET


def _about_copies(analysis: Analysis) -> Sequence[NextStep]:
    share = _measure_copies(analysis)
    if share < _MIN_COPIES:
        return ()
    text = (
        "Judge the model on other examples: most of these are training texts. Use this analysis to check their labels."
        if _is_training_set(analysis)
        else "Remove the copies of training texts from the task, or from the training data, and score again."
    )
    count, change = len(analysis.near_copies or ()), ""
    found = f"{count:,} examples ({share:.1%}) are near-duplicates"
    if count == 1:
        found = f"1 example ({share:.1%}) is a near-duplicate"
    if analysis.score_of_copies is not None and analysis.score_of_others is not None:
        change = (
            f" The mean {analysis.measure} of copies is {analysis.score_of_copies:.3f}, that of the others "
            f"{analysis.score_of_others:.3f}."
        )
    return (
        NextStep(
            text=text,
            reason=f"{found} of training texts.{change}",
            evidence="near_copies",
            share=share,
            is_first=True,
        ),
    )


def _about_mismatch(analysis: Analysis) -> Sequence[NextStep]:
    mismatch = analysis.mismatch
    if mismatch is None or not mismatch.is_alarm:
        return ()
    auc = next(test.value for test in mismatch.tests if test.measure == "ROC AUC")
    return (
        NextStep(
            text="Train on texts like those of the task: add some, or weight the sources that resemble them.",
            reason=f"A classifier tells training texts from the task's with a ROC AUC of {auc:.2f} (0.5 is chance).",
            evidence="mismatch",
            share=min(1.0, max(0.0, 2 * auc - 1)),
        ),
    )


def _about_labels(analysis: Analysis) -> Sequence[NextStep]:
    errors = analysis.label_errors or ()
    confident = sum(error.score >= _CONFIDENT for error in errors)
    share = confident / analysis.count
    if not errors or (share < _MANY_ERRORS and not _is_training_set(analysis)):
        return ()
    return (
        NextStep(
            text="Review the labels from the top of the list, and correct the wrong ones (`--fix` writes a file).",
            reason=f"{len(errors):,} labels may be wrong, {confident:,} of them ({share:.1%} of all) with a score of "
            f"{_CONFIDENT} or more. Stop where most of the labels that you read are right.",
            evidence="label_errors",
            share=share,
        ),
    )


def _about_slices(analysis: Analysis) -> Sequence[NextStep]:
    steps = []
    for each in analysis.slices:
        if each.is_significant:
            excess = (each.error - each.rest) * each.size / analysis.count
            steps.append(
                NextStep(
                    text=f"Get more training examples where {each.field} is {each.value}, and look at those that fail.",
                    reason=f"The mean {analysis.error_name} is {each.error:.3f} on these {each.size:,} examples, and "
                    f"{each.rest:.3f} on the others (corrected p = {each.corrected:.2g}).",
                    evidence="slices",
                    share=float(np.clip(excess, 0, 1)) if analysis.is_binary else each.size / analysis.count,
                )
            )
    return steps[:3]


def _about_confusions(analysis: Analysis) -> Sequence[NextStep]:
    if len(analysis.classes) < 3 or not analysis.confusions:
        return ()
    top = analysis.confusions[0]
    total = sum(each.count for each in analysis.confusions)
    if top.count < 0.2 * total:
        return ()
    return (
        NextStep(
            text=f"Look at what distinguishes {top.target!r} from {top.prediction!r}, and at how both are labelled.",
            reason=f"{top.count:,} of {total:,} errors are {top.target!r} predicted as {top.prediction!r}.",
            evidence="confusions",
            share=top.count / analysis.count,
        ),
    )


def _about_data(analysis: Analysis) -> Sequence[NextStep]:
    curve = analysis.learning_curve
    if curve is None:
        return ()
    twice = curve.forecasts[0]
    interval = f"[{twice.low:.3f}, {twice.high:.3f}]"
    if twice.low <= 0 or twice.gain < _MIN_GAIN:
        return ()
    return (
        NextStep(
            text=f"Label more training examples: {twice.size:,} instead of {curve.sizes[-1]:,}.",
            reason=f"The error of a simple classifier would fall by {twice.gain:.3f} {interval}, if the fitted law "
            "holds.",
            evidence="learning_curve",
            share=twice.gain,
        ),
    )
