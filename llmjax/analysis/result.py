"""What an error analysis found: the parts of the page and of analysis.json."""

from collections.abc import Mapping, Sequence
import dataclasses

from llmjax.analysis.label_errors import LabelError
from llmjax.analysis.learning_curve import LearningCurve
from llmjax.analysis.mismatch import Mismatch
from llmjax.analysis.near_copies import NearCopy
from llmjax.analysis.slices import Slice
from llmjax.analysis.token_losses import TokenLosses


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextStep:
    """A recommendation.

    text      what to do; reason: why, with numbers
    evidence  the section of the page that shows it, which is also a field of the JSON file
    share     share of the examples that it concerns, by which steps are ranked
    is_first  it decides whether the score can be trusted, so it comes before the others
    """

    text: str
    reason: str
    evidence: str
    share: float
    is_first: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confusion:
    """How often a class was predicted as another one, and the first such examples."""

    target: str
    prediction: str
    count: int
    indices: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorstExample:
    """An example that the model has most wrong, and the losses of its tokens where the model has some."""

    index: int
    loss: float
    token_losses: list[TokenLosses]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """All parts. None for a part that the task or the run cannot have; `missing` says why.

    measure          the main score; error_name: what is compared between slices, and is_binary: whether it is 0 or 1
    vectors          what the vectors of the label errors and the learning curve are
    score_of_copies  the mean of the main score over the examples that are near-copies of training texts
    score_of_others  the same of all others
    """

    task: str
    step: int
    kind: str
    count: int
    measure: str
    score: Mapping[str, float | None]
    error_name: str
    is_binary: bool
    classes: tuple[str, ...]
    vectors: str
    worst: Sequence[WorstExample]
    confusion_matrix: Sequence[Sequence[int]] | None
    confusions: Sequence[Confusion] | None
    slices: Sequence[Slice]
    label_errors: Sequence[LabelError] | None
    mismatch: Mismatch | None
    near_copies: Sequence[NearCopy] | None
    score_of_copies: float | None
    score_of_others: float | None
    learning_curve: LearningCurve | None
    train_origin: str
    train_total: int
    train_read: int
    missing: Mapping[str, str]
    next_steps: Sequence[NextStep] = ()
