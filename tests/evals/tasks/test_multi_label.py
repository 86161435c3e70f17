"""Sets of classes, by a head that decides each class by itself: scores equal scikit-learn's."""

from etils import epath
import numpy as np
import pytest
from sklearn import metrics as sklearn

from llmjax.analysis import task_examples
from llmjax.errors import UserError
from llmjax.evals.config import TaskConfig, check_metric
from llmjax.inference.predict import predict
from llmjax.parallel import axes
from tests.evals.tasks.models import CLASSES, evaluate, make_loaded, write_records
from tests.serve import runs
from tests.train.trainer import one_device

RNG = np.random.default_rng(0)
ACTUAL = RNG.random((24, 3)) < [0.3, 0.5, 0.7]
TEXTS = ["".join(RNG.choice(list("abcdefgh "), size)) for size in RNG.integers(3, 30, 24)]
RECORDS = [
    {"text": text, "label": [str(number) for number in np.flatnonzero(row)], "from": text[0] in "abcd"}
    for text, row in zip(TEXTS, ACTUAL, strict=True)
]


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with axes.use_mesh(one_device(), runs.make_config().parallel.rules):
        yield


def test_scores_of_sets_of_classes_equal_scikit_learns(tmp_path):
    loaded = make_loaded("classify", 3.0, multi_label=True)
    path = write_records(tmp_path / "a.jsonl", [{**each, "from": str(each["from"])} for each in RECORDS])
    task = TaskConfig(kind="classify", path=path, labels=("0", "1", "2"), group_field="from")
    record, lines = evaluate(tmp_path, loaded, task)
    labels, _ = predict(loaded, [(text, None) for text in TEXTS])
    assert [line["prediction"] for line in lines] == [label["labels"] for label in labels]
    assert [line["target"] for line in lines] == [list(np.array(CLASSES)[row]) for row in ACTUAL]
    predicted = np.array([[name in line["prediction"] for name in CLASSES] for line in lines])
    assert 0 < predicted.sum() < predicted.size
    probabilities = np.array([list(line["probabilities"].values()) for line in lines])
    expected = {
        "subset_accuracy": sklearn.accuracy_score(ACTUAL, predicted),
        "roc_auc": sklearn.roc_auc_score(ACTUAL, probabilities),
        "pr_auc": sklearn.average_precision_score(ACTUAL, probabilities),
    }
    for average in ("macro", "micro", None):
        values = sklearn.precision_recall_fscore_support(ACTUAL, predicted, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            names = [f"{name}_{average}"] if average else [f"{name}/{each}" for each in CLASSES]
            expected |= dict(zip(names, np.atleast_1d(value), strict=True))
    for group in (False, True):
        part = [each["from"] == group for each in RECORDS]
        score = sklearn.f1_score(ACTUAL[part], predicted[part], average="macro", zero_division=0)
        expected[f"f1_macro/{group}"] = score
    assert {name: number["value"] for name, number in record["metrics"].items()} == pytest.approx(expected)
    assert record["main"] == "f1_macro" and np.mean([line["subset_accuracy"] for line in lines]) == pytest.approx(
        expected["subset_accuracy"]
    )
    with pytest.raises(UserError, match="examples of several classes; error analysis reads those of one class"):
        task_examples.read(epath.Path(tmp_path), "mine")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("good", r"has 'good', which is not a list of classes \(data\.multi_label=True\)"),
        (["good", "god"], r"has the unknown label 'god' \(did you mean 'good'\?\); expected some of bad, fair, good"),
    ],
)
def test_labels_that_are_no_list_of_classes(tmp_path, label, message):
    path = write_records(tmp_path / "a.jsonl", [{"text": "a", "label": []}, {"text": "b", "label": label}])
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path, make_loaded("classify", 3.0, multi_label=True), TaskConfig(kind="classify", path=path))


def test_metrics_of_training():
    tasks = {"mine": TaskConfig(kind="classify", path="a.jsonl")}
    for metric in ("mine/subset_accuracy", "mine/f1/good"):
        check_metric(metric, tasks, multi_label=True)
    with pytest.raises(UserError, match="the scores of a task of kind='classify' are f1_macro, precision_macro"):
        check_metric("mine/accuracy", tasks, multi_label=True)
