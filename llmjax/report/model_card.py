"""The model card of a checkpoint, in the Hugging Face layout: YAML front matter and sections, from the run's files.

Sections after Mitchell et al. 2019, Model Cards for Model Reporting (arXiv 1810.03993).
"""

from collections.abc import Iterator, Mapping
import hashlib
import pathlib
import re
from typing import Any

from etils import epath
import yaml

from llmjax import atomic
from llmjax.checkpoint.manager import Checkpoints
from llmjax.errors import UserError
from llmjax.report import card_data, card_sections
from llmjax.report.card_sections import CardFacts
from llmjax.report.files import read
from llmjax.run import workdir as workdirs

FILE = "README.md"
_PIPELINES = {
    "masked": "fill-mask",
    "classify": "text-classification",
    "regress": "text-classification",
    "reward": "text-classification",
    "contrastive": "sentence-similarity",
    "similarity": "sentence-similarity",
}
# What a task of a kind measures, as the Hub names it; any other is text generation.
_TASKS = {
    "choice": "multiple-choice",
    "classify": "text-classification",
    "regress": "text-classification",
    "similarity": "sentence-similarity",
}
_SPLIT_METRICS = ("loss", "perplexity", "bits_per_byte", "accuracy", "macro_f1", "pearson", "spearman")
_MAX_METRICS = 8  # of a task, in the front matter
_MIN_LANGUAGE_SHARE = 0.01  # of the kept documents of a corpus
_END = re.compile(r"\n<!-- Written by llmjax card\. SHA-256 of the text above: ([0-9a-f]{64}) -->\n\Z")


def make_card(workdir: epath.Path, *, step: int | None = None, transformers_class: str = "") -> str:
    """The text of README.md for one checkpoint, by the files of its run; what they lack is "not recorded".

    step                of the checkpoint whose scores are shown; None: the newest checkpoint
    transformers_class  that loads an exported folder; "": no class does
    Raises UserError where the workdir contains no run, or not that checkpoint.
    """
    facts = read_facts(workdir, step=step, transformers_class=transformers_class)
    header = yaml.safe_dump(dict(make_metadata(facts)), sort_keys=False, allow_unicode=True, width=1000)
    body = "\n\n".join(section(facts) for section in card_sections.SECTIONS)
    text = f"---\n{header}---\n\n{body}\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- Written by llmjax card. SHA-256 of the text above: {digest} -->\n"


def is_edited(text: str) -> bool:
    """Whether a file is not exactly what `make_card` wrote at some time."""
    end = _END.search(text)
    return end is None or hashlib.sha256(text[: end.start()].encode()).hexdigest() != end[1]


def find_edited(workdir: epath.Path) -> str | None:
    """The text of WORKDIR/README.md where a person wrote or changed it; else None."""
    path = workdir / FILE
    text = path.read_text() if path.exists() else None
    return text if text is not None and is_edited(text) else None


def write(path: pathlib.Path | epath.Path, text: str) -> None:
    """Write a card. Raises UserError where the file exists, unless it is a card that nobody edited."""
    if path.exists() and is_edited(path.read_text()):
        raise UserError(
            f"--out={path}: this file was not written by `llmjax card`, or was edited since; give another --out, or "
            "remove the file"
        )
    atomic.write_bytes(path, text.encode())


def read_facts(workdir: epath.Path, *, step: int | None, transformers_class: str) -> CardFacts:
    """What the card is made of. Errors as of `make_card`."""
    if workdirs.read_run_config(workdir) is None:
        raise UserError(f"--workdir={workdir}: no run there (no config.json); give the workdir of a run")
    steps = Checkpoints(workdir / workdirs.CHECKPOINTS).steps()
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise UserError(f"--step={step}: no such checkpoint in {workdir}; there are {known}")
    run = read(workdir)
    newest = steps[-1] if steps else run.metrics[-1]["step"] if run.metrics else 0
    chosen = newest if step is None else step
    scores = {name: by_step[chosen] for name, by_step in run.evals.items() if chosen in by_step}
    return CardFacts(
        run=run,
        name=workdir.name,
        step=chosen,
        imported=workdirs.read_json(workdir / workdirs.IMPORT),
        corpora=card_data.find_corpora(run.config or {}),
        splits={name: record for name, record in scores.items() if "total" in record},
        tasks={name: record for name, record in scores.items() if "metrics" in record},
        transformers_class=transformers_class,
    )


def make_metadata(facts: CardFacts) -> Iterator[tuple[str, Any]]:
    """The fields of the front matter, in order; those that are not known are left out."""
    report, objective = facts.section("report"), facts.section("objective").get("name", "causal")
    if report.get("license"):
        yield "license", report["license"]
    if languages := list_languages(facts):
        yield "language", languages
    yield "library_name", "transformers" if facts.transformers_class else "llmjax"
    yield "tags", list(dict.fromkeys(["llmjax", facts.section("model").get("family", ""), objective]))
    if sources := list(facts.section("data").get("sources") or {}):
        yield "datasets", sources
    if base := facts.base_model:
        yield "base_model", base
    yield "pipeline_tag", find_pipeline(facts)
    if results := [*_list_split_results(facts), *_list_task_results(facts)]:
        yield "model-index", [{"name": facts.name, "results": results}]


def find_pipeline(facts: CardFacts) -> str:
    """The Hub's name of what the model does."""
    objective = facts.section("objective").get("name", "causal")
    is_encdec = facts.section("model").get("family") == "encdec"
    return _PIPELINES.get(objective, "text2text-generation" if is_encdec else "text-generation")


def list_languages(facts: CardFacts) -> list[str]:
    """report.languages, or those that curation found in at least a hundredth of the kept documents of a corpus."""
    if languages := facts.section("report").get("languages"):
        return list(languages)
    found = {}
    for corpus in facts.corpora:
        languages = corpus.report.get("languages") or {}
        total = sum(entry["kept"] for entry in languages.values())
        for code, entry in languages.items():
            if total and entry["kept"] >= _MIN_LANGUAGE_SHARE * total:
                found[code] = found.get(code, 0) + entry["kept"]
    return sorted(found, key=lambda code: -found[code])


def _list_split_results(facts: CardFacts) -> Iterator[dict[str, Any]]:
    names = ", ".join(facts.section("data").get("sources") or {}) or facts.name
    for split, record in facts.splits.items():
        values = {name: record["total"].get(name) for name in _SPLIT_METRICS}
        metrics = [
            {"type": name, "value": value, "name": name.replace("_", " ")}
            for name, value in values.items()
            if value is not None
        ]
        dataset = {"name": names, "type": names, "split": split}
        yield {"task": {"type": find_pipeline(facts)}, "dataset": dataset, "metrics": metrics}


def _list_task_results(facts: CardFacts) -> Iterator[dict[str, Any]]:
    for name, record in facts.tasks.items():
        whole = ((metric, number) for metric, number in record["metrics"].items() if "/" not in metric)
        shown = [(metric, number) for metric, number in whole if number["value"] is not None]
        metrics = [
            {"type": metric, "value": number["value"], "name": _name_metric(metric, number)}
            for metric, number in shown[:_MAX_METRICS]
        ]
        kind = (record.get("settings") or {}).get("kind", "")
        if metrics:
            dataset = {"name": name, "type": name}
            yield {"task": {"type": _TASKS.get(kind, "text-generation")}, "dataset": dataset, "metrics": metrics}


def _name_metric(metric: str, number: Mapping[str, float | None]) -> str:
    interval = card_sections.format_interval(number)
    return f"{metric} (95% interval {interval})" if interval else metric
