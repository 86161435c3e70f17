"""Train and score the tasks of tools/finetune_recipes.py, each by the commands of llmjax."""

import dataclasses
import json
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

from finetune_data import (
    SPLITS,
    Splits,
    read_instructions,
    read_preferences,
    read_review_text,
    read_rte,
    read_sst2,
    read_stsb,
    write_splits,
)
import numpy as np

from llmjax.evals.label_scores import spearman
from llmjax.train.best import find_best

ROOT = Path(__file__).resolve().parents[1]
# The checkpoint with the best accuracy on the validation split is the one that is tested.
CHOOSE_STEP = {"eval.every": 50, "eval.metric": "accuracy", "checkpoint.keep_best": "true"}
SETTINGS = {  # of a task, beside those of its config
    "sst2": {"train.steps": 540, **CHOOSE_STEP, "eval.every": 90},
    "agnews": {"train.steps": 300},
    "rte": {"train.steps": 400, "data.seq_len": 256, "train.global_batch": 4, "model.num_outputs": 0, **CHOOSE_STEP},
    "stsb": {"train.steps": 300, "optimizer.learning_rate": 1e-4},
    "embed": {"data.seq_len": 64, "train.steps": 180, "eval.every": 0},
    "sst2-bert": {"train.steps": 400, "optimizer.learning_rate": 1e-3, **CHOOSE_STEP},
    "sst2-gpt": {"train.steps": 400, "optimizer.learning_rate": 1e-3, **CHOOSE_STEP},
    "sst2-t5": {"train.steps": 800, "optimizer.learning_rate": 1e-3, **CHOOSE_STEP},
    "sst2-lstm": {"train.steps": 400, "optimizer.learning_rate": 1e-3, **CHOOSE_STEP},
    "instructions": {
        "data.seq_len": 384,
        "model.lora.rank": 16,
        "train.steps": 40,
        "train.global_batch": 4,
        "optimizer.learning_rate": 5e-4,
        "optimizer.warmup_steps": 4,
        "checkpoint.every": 20,
        "sample.prompts": "()",
    },
    "dpo": {
        "data.seq_len": 224,
        "model.lora.rank": 16,
        "train.steps": 40,
        "train.global_batch": 4,
        "optimizer.learning_rate": 2e-4,
        "optimizer.warmup_steps": 4,
        "eval.every": 0,
        "checkpoint.every": 20,
        "sample.prompts": "()",
    },
}
MAX_HELD_OUT = 60  # answers of instructions whose loss is computed
NUM_ANSWERS, ANSWER_TOKENS, SHOWN = 6, 80, 160  # questions in the table of answers; characters of each that it shows


@dataclasses.dataclass(frozen=True)
class Result:
    """The score of the test split of a task, and what it is compared with.

    measure    what the scores are: accuracy, Spearman, or loss (lower is better)
    baselines  by name, of the same texts
    notes      lines to print beside the scores
    """

    measure: str
    score: float
    baselines: dict[str, float]
    notes: tuple[str, ...] = ()

    def beats(self, bound: float) -> bool:
        """Whether the score is better than another."""
        return self.score < bound if self.measure == "loss" else self.score > bound


def classify(records: Splits, model: Path, workdir: Path) -> Result:
    """Labels of texts or pairs, beside TF-IDF with logistic or ridge regression, and the majority class or the mean."""
    total = finetune(workdir.name, records, model, workdir)
    measure = "accuracy" if total["accuracy"] is not None else "spearman"
    return Result(measure, total[measure], run_baselines(records))


def entail(data: Path, model: Path, workdir: Path) -> Result:
    """RTE from the model that learned STS-B first: the 1,590 pairs of RTE are few to learn to compare texts from."""
    compared = workdir.with_name("stsb")
    finetune("stsb", read_stsb(data), model, compared)
    return classify(read_rte(data), compared, workdir)


def classify_from_scratch(name: str, data: Path, workdir: Path) -> Result:
    """SST-2 with a model that is pretrained here, beside the same model without pretraining."""
    records = read_sst2(data)
    pretrained = pretrain(name, data, workdir)
    total = finetune(workdir.name, records, pretrained, workdir)
    untrained = pretrain(
        name, data, workdir, {"train.steps": 1, "optimizer.warmup_steps": 0, "optimizer.learning_rate": 1e-9}
    )
    from_random = finetune(workdir.name, records, untrained, workdir.with_name(f"{workdir.name}-random"))
    return Result("accuracy", total["accuracy"], {"no pretraining": from_random["accuracy"], **run_baselines(records)})


def pretrain(name: str, data: Path, workdir: Path, changes: dict[str, Any] | None = None) -> Path:
    """Pretrain a model of finetune_pretrain.py on sentences of film reviews; returns its workdir.

    The token store is that of all these models. With `changes` of its config it is another run.
    """
    folder = workdir.parent
    sentences, pretrained = folder / "reviews.jsonl", folder / f"{name}-{'untrained' if changes else 'pretrained'}"
    if not sentences.exists():
        sentences.write_text("".join(json.dumps({"text": text}) + "\n" for text in read_review_text(data)))
    settings = {"data.sources.text.path": sentences, "data.store": folder / "reviews", **(changes or {})}
    config = f"--config={ROOT / 'tools' / 'finetune_pretrain.py'}:{name}"
    run("train", config, f"--workdir={pretrained}", *override(settings))
    return pretrained


def finetune(task: str, records: Splits, model: Path, workdir: Path) -> dict[str, Any]:
    """Import the model, train it on the labels of the task, and return the scores of the test split."""
    example, is_number = records["train"][0], isinstance(records["train"][0]["label"], float)
    fields = {"label_field": "label"} | ({"pair_field": "pair"} if "pair" in example else {})
    settings = {"model.dropout": 0.1, **list_sources(records, workdir, fields), **SETTINGS[task]}
    if not is_number:
        settings["data.classes"] = tuple(sorted({record["label"] for record in records["train"]}))
    import_model(model, workdir)
    config = f"--config={ROOT / 'configs' / 'classify.py'}:{'number' if is_number else 'classes'}"
    run("train", config, f"--workdir={workdir}", *override(settings))
    return evaluate(workdir, find_best_step(workdir) if "checkpoint.keep_best" in settings else None)


def run_baselines(records: Splits) -> dict[str, float]:
    """Scores of the test split: accuracies, or for numbers rank correlations."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import (  # pyright: ignore[reportMissingImports]  (the extra `bench`)
        TfidfVectorizer,
    )
    from sklearn.linear_model import LogisticRegression, Ridge  # pyright: ignore[reportMissingImports]

    train, test = records["train"], records["test"]
    labels, expected = ([record["label"] for record in part] for part in (train, test))
    tfidf: Any = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    tfidf.fit([record["text"] for record in train] + [record["pair"] for record in train if "pair" in record])

    def features(part: list[dict[str, Any]]) -> Any:
        first = tfidf.transform([record["text"] for record in part])
        if "pair" not in part[0]:
            return first
        second = tfidf.transform([record["pair"] for record in part])
        common = first.multiply(second)  # words of both texts; their sum is the cosine
        return hstack([first, second, common, np.asarray(common.sum(axis=1))]).tocsr()

    if isinstance(labels[0], float):
        predicted = Ridge().fit(features(train), labels).predict(features(test))
        return {"TF-IDF": spearman(predicted, np.array(expected)), "mean": 0.0}
    classifier = LogisticRegression(C=10, max_iter=1000).fit(features(train), labels)
    majority = max(set(labels), key=labels.count)
    return {
        "TF-IDF": float(np.mean(classifier.predict(features(test)) == np.array(expected))),
        "majority class": float(np.mean(np.array(expected) == majority)),
    }


def tune_embeddings(data: Path, model: Path, workdir: Path) -> Result:
    """The rank correlation of the cosines of pairs of texts with their scores, after training on scores, and before."""
    records = read_stsb(data)
    pairs = {split: [{**record, "score": record["label"] / 5} for record in records[split]] for split in SPLITS}
    settings = list_sources(pairs, workdir, {"pair_field": "pair", "score_field": "score"}) | SETTINGS["embed"]
    test = workdir.parent / f"{workdir.name}-test.jsonl"
    if import_model(model, workdir):
        np.save(workdir / "untuned.npy", embed_pairs(workdir, test))
    config = f"--config={ROOT / 'configs' / 'embed.py'}:similarity"
    run("train", config, f"--workdir={workdir}", *override(settings))
    scores = np.array([record["label"] for record in records["test"]])
    untuned, tuned = np.load(workdir / "untuned.npy"), embed_pairs(workdir, test)
    return Result("spearman", spearman(tuned, scores), {"before training": spearman(untuned, scores)})


def embed_pairs(workdir: Path, records: Path) -> np.ndarray:
    """The cosine of the two texts of each record, by `llmjax embed`."""
    vectors = []
    for field in ("text", "pair"):
        output = workdir / f"{field}.npy"
        output.unlink(missing_ok=True)
        run("embed", f"--workdir={workdir}", f"--input={records}", f"--field={field}", f"--output={output}")
        vectors.append(np.load(output))
    return np.sum(vectors[0] * vectors[1], axis=1)


def tune_instructions(data: Path, model: Path, workdir: Path) -> Result:
    """The loss of held-out answers, and answers to the same questions, before and after training adapters."""
    records = {
        split: part[:MAX_HELD_OUT] if split != "train" else part for split, part in read_instructions(data).items()
    }
    settings = list_sources(records, workdir, {"chat": "alpaca"}) | SETTINGS["instructions"]
    if import_model(model, workdir):
        run("prepare", f"--workdir={workdir}", *override(settings))
        run("eval", f"--workdir={workdir}", "--split=test", f"--config.data.seq_len={settings['data.seq_len']}")
    run("train", f"--workdir={workdir}", *override(settings))
    after = evaluate(workdir)["loss"]
    steps = list_scored_steps(workdir)
    before = read_scores(workdir, steps[0])["loss"]
    questions = [record["instruction"] for record in records["test"] if not record["input"]][:NUM_ANSWERS]
    answers = [ask(workdir, step, questions) for step in (steps[0], steps[-1])]
    show = lambda text: " ".join(text.split())[:SHOWN].replace("|", "/")
    rows = [f"| {' | '.join(map(show, row))} |" for row in zip(questions, *answers, strict=True)]
    table = ("| instruction | answer before | answer after |", "|---|---|---|", *rows)
    return Result("loss", after, {"before training": before}, table)


def ask(workdir: Path, step: int, questions: list[str]) -> list[str]:
    """The most likely answers of a checkpoint."""
    prompts = [f"--prompt={question}" for question in questions]
    flags = ["--chat", "--temperature=0", f"--max_tokens={ANSWER_TOKENS}", f"--step={step}", *prompts]
    printed = run("generate", f"--workdir={workdir}", *flags)
    answers = []
    for question in questions:
        printed = printed.partition(f"--- {question!r} ---\n")[2]
        answers.append(re.split(r"(?m)^--- ['\"]", printed)[0])
    return answers


def prefer(data: Path, model: Path, workdir: Path) -> Result:
    """How often the chosen answer of held-out preferences is preferred after DPO, beside the likelihoods of the model
    before, and the longer answer."""
    records = read_preferences(data)
    fields = {"text_field": "prompt", "chosen_field": "chosen", "rejected_field": "rejected"}
    settings = list_sources(records, workdir, fields) | SETTINGS["dpo"]
    import_model(model, workdir)
    run("train", f"--config={ROOT / 'configs' / 'preferences.py'}", f"--workdir={workdir}", *override(settings))
    accuracy = evaluate(workdir)["accuracy"]
    likelihoods = np.load(workdir / "reference.npz")["test/test"]
    return Result(
        "accuracy",
        accuracy,
        {
            "likelihood before training": float(np.mean(likelihoods[:, 0] > likelihoods[:, 1])),
            "longer answer": prefer_longer(records["test"]),
        },
    )


def prefer_longer(records: list[dict[str, Any]]) -> float:
    """How often the chosen answer has more characters; equal lengths count half."""
    lengths = [(len(record["chosen"]), len(record["rejected"])) for record in records]
    return float(np.mean([(chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in lengths]))


def list_sources(records: Splits, workdir: Path, fields: dict[str, str]) -> dict[str, Any]:
    """Write the records of each split beside the workdir; returns the settings that read them."""
    paths = write_splits(records, workdir.parent, workdir.name)
    settings: dict[str, Any] = {"data.split.near_copies": "false"}
    for split, path in paths.items():
        source = {"path": path, "split": split, **fields}
        settings |= {f"data.sources.{split}.{name}": value for name, value in source.items()}
    return settings


def import_model(model: Path, workdir: Path) -> bool:
    """Import the model, unless a run was started in the workdir; returns whether it was imported."""
    if (workdir / "config.json").exists():
        return False
    run("import", f"--from={model}", f"--workdir={workdir}")
    return True


def evaluate(workdir: Path, step: int | None = None) -> dict[str, Any]:
    """The scores of a checkpoint (None: the last one) on the test split."""
    run("eval", f"--workdir={workdir}", "--split=test", *([] if step is None else [f"--step={step}"]))
    return read_scores(workdir, list_scored_steps(workdir)[-1] if step is None else step)


def find_best_step(workdir: Path) -> int:
    """The step with the best accuracy on the validation split."""
    steps = {int(path.parent.name): path for path in (workdir / "eval").glob("*/validation.json")}
    best = find_best({step: json.loads(path.read_text())["total"] for step, path in steps.items()}, "accuracy")
    assert best is not None, f"{workdir} has no evaluation"
    return best


def list_scored_steps(workdir: Path) -> list[int]:
    """Checkpoints that have scores of the test split, in order."""
    return sorted(int(path.name) for path in (workdir / "eval").iterdir() if (path / "test.json").exists())


def read_scores(workdir: Path, step: int) -> dict[str, Any]:
    """The scores of a checkpoint on the test split."""
    return json.loads((workdir / "eval" / str(step) / "test.json").read_text())["total"]


def override(settings: dict[str, Any]) -> list[str]:
    """The flags that set these fields of a config."""
    return [f"--config.{name}={value}" for name, value in settings.items()]


def run(command: str, *flags: str) -> str:
    """Run a command of llmjax, print its lines as they come, and return them."""
    print(f"$ llmjax {command} {' '.join(flags)}"[:SHOWN], flush=True)
    arguments = [str(Path(sys.executable).with_name("llmjax")), command, *flags]
    lines = []
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode != 0:
        raise SystemExit(f"llmjax {command} ended with status {process.returncode}")
    return "".join(lines)
