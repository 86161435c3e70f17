"""The sections of a model card as Markdown; each is a function of the facts of a run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import os
import shlex
from typing import Any

import llmjax
from llmjax.errors import UserError
from llmjax.evals import results
from llmjax.report import cost
from llmjax.report.card_data import Corpus
from llmjax.report.files import RunFiles, describe_phase, list_phases, list_row_lengths
from llmjax.report.markup import format_count
from llmjax.run import loading, next_commands

_BIAS_KINDS = ("stereotypes",)  # tasks whose every score is about bias
_MEMORY_KINDS = ("memorisation",)  # tasks about training text that the model repeats
_SPLIT_SCORES = ("loss", "perplexity", "bits_per_byte", "accuracy", "macro_f1", "pearson", "spearman", "margin")
_MODEL_FIELDS = ("num_layers", "embed", "num_heads", "num_kv_heads", "mlp", "num_experts", "dtype", "param_dtype")
_OPTIMIZER_FIELDS = ("learning_rate", "schedule", "warmup_steps", "weight_decay", "b1", "b2", "clip_norm", "ema_decay")


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What the card of one checkpoint is made of.

    imported            the content of import.json; None for a model from random parameters
    corpora             the corpora of `llmjax curate` among the sources
    splits, tasks       the scores of this step: name -> the content of eval/<step>/NAME.json
    transformers_class  that loads an exported folder; "": none
    """

    run: RunFiles
    name: str
    step: int
    imported: Mapping[str, Any] | None
    corpora: Sequence[Corpus]
    splits: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, Any]]
    transformers_class: str

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the config."""
        return (self.run.config or {}).get(name) or {}

    @property
    def base_model(self) -> str:
        """The folder, file or run that was imported, without the path to it; "" for a model from random parameters."""
        origin = (self.imported or {}).get("from", "").partition(" at step ")[0]
        return os.path.basename(origin.rstrip("/")).removesuffix(".gguf")

    def command(self, name: str, *flags: str) -> str:
        """A command for this run, as Markdown; an absolute path, which may name a person, is left out."""
        workdir = self.name if self.run.workdir.is_absolute() else str(self.run.workdir)
        words = [f"--workdir={shlex.quote(workdir)}", *flags]
        return f"`llmjax {name} {' '.join(words)}`"


def format_interval(number: Mapping[str, float | None]) -> str:
    """`low to high` of an estimate; "" where it has no interval."""
    low, high = number["low"], number["high"]
    return "" if low is None or high is None else f"{low:.4f} to {high:.4f}"


def describe_model(facts: CardFacts) -> str:
    """Mitchell et al.'s model details."""
    model, data, about = facts.section("model"), facts.section("data"), facts.run.run or {}
    parameters = about.get("parameters") or _count_parameters(facts)
    architecture = [f"{field} {model[field]}" for field in _MODEL_FIELDS if model.get(field) not in (None, "", 0)]
    lora, tokenizer = model.get("lora") or {}, (facts.run.manifest or {}).get("tokenizer") or {}
    kind = tokenizer.get("kind") or (data.get("tokenizer") or {}).get("kind")
    size = tokenizer.get("vocab_size") or model.get("vocab_size")
    items = [
        ("Family", model.get("family")),
        ("Parameters", format_count(parameters) if parameters else None),
        ("Trained parameters", format_count(about["trained_parameters"]) if _trains_part(about) else None),
        ("Architecture", ", ".join(architecture)),
        ("Adapters", f"LoRA of rank {lora['rank']}, merged on export" if lora.get("rank") else None),
        ("Base model", facts.base_model or "none, trained from random parameters"),
        ("Tokenizer", f"{kind}, {format_count(size)} tokens" if size else kind),
        ("Tokens in a row", ", then ".join(map(format_count, list_row_lengths(facts.run.config or {}, facts.step)))),
        ("Objective", facts.section("objective").get("name")),
        ("Classes", ", ".join(data.get("classes") or ())),
        ("Checkpoint", f"{about.get('eval_params', 'imported parameters')} of step {facts.step:,}"),
        ("License", facts.section("report").get("license") or _missing("--config.report.license=NAME", facts)),
    ]
    return f"# {_plain(facts.name)}\n\n## Model description\n\n{_list_items(items)}"


def describe_use(facts: CardFacts) -> str:
    """What the model is for: a person has to say it."""
    text = "Not recorded: state here what the model is for, who uses it, and what it must not be used for."
    return f"## Intended use\n\n{text}"


def describe_data(facts: CardFacts) -> str:
    """The token store's sources, and what curation did with them."""
    parts, sources = ["## Training data"], (facts.run.manifest or {}).get("sources") or {}
    if sources:
        configured = facts.section("data").get("sources") or {}
        rows = []
        for name, source in sources.items():
            counts = [(source.get(split) or {}).get("documents", 0) for split in ("train", "validation", "test")]
            path = os.path.basename((configured.get(name) or {}).get("path", ""))
            rows.append((name, path, *map(format_count, counts), format_count(source["train"]["tokens"])))
        head = ("Source", "files", "train documents", "validation", "test", "train tokens")
        parts.append(_table(head, rows))
    elif facts.imported is not None:
        parts.append(f"Not recorded: the data of the base model, {facts.base_model}, are described by its own card.")
    else:
        parts.append(f"Not recorded. {facts.command('prepare')} records it.")
    for corpus in facts.corpora:
        parts.append(_describe_corpus(corpus))
    if sources and not facts.corpora:
        parts.append(
            "Origin, licences, filters and duplicates: not recorded. `llmjax curate --config=curate "
            "--workdir=runs/corpus` records them for a corpus that it cleans."
        )
    return "\n\n".join(parts)


def describe_personal_data(facts: CardFacts) -> str:
    """Which personal data curation found and what it did with them, and what the model repeats."""
    parts = ["## Personal data"]
    for corpus in facts.corpora:
        personal = corpus.report["personal_data"]
        if not personal:
            parts.append(f"{corpus.source}: not looked for; curate.stages lacks personal_data.")
            continue
        action = {"replace": "replaced by placeholders", "drop": "a reason to drop the document"}
        kinds = personal.get("kinds") or {}
        rows = [
            (kind, format_count(entry["documents"]), format_count(entry["occurrences"]))
            for kind, entry in sorted(kinds.items())
        ]
        done = action.get(personal["action"], "only counted, so that they are still in the text")
        found = _table(("Kind", "documents", "occurrences"), rows) if rows else "None was found."
        parts.append(f"{corpus.source}: each occurrence that patterns found is {done}.\n\n{found}")
    if not facts.corpora:
        parts.append(
            "Treatment: not recorded. `llmjax curate --config=curate --workdir=runs/corpus` finds personal data and "
            "replaces them."
        )
    parts += [_describe_task(name, record) for name, record in _select_kinds(facts, _MEMORY_KINDS)]
    parts.append("Patterns miss personal data in free text: a name, or what only a neighbour can know.")
    return "\n\n".join(parts)


def describe_training(facts: CardFacts) -> str:
    """How the model was trained."""
    about, train, optimizer = facts.run.run or {}, facts.section("train"), facts.section("optimizer")
    title = "## Training procedure"
    if not facts.run.metrics:
        return f"{title}\n\nNot recorded: llmjax has not trained this model."
    # Of an earlier checkpoint, what was trained up to there.
    last = next((line for line in reversed(facts.run.metrics) if line["step"] <= facts.step), {})
    known = [(name, optimizer[name]) for name in _OPTIMIZER_FIELDS if optimizer.get(name)]
    settings = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in known]
    phases = list_phases(facts.run.config or {}, facts.step)
    versions = ", ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items())
    starts = about.get("starts") or []
    devices = dict.fromkeys(f"{start['num_devices']} x {start['device']}" for start in starts)
    items = [
        ("Steps", f"{facts.step:,} of {train['steps']:,}" if train.get("steps") else None),
        ("Rows in a step", format_count(train["global_batch"]) if train.get("global_batch") else None),
        ("Scored targets", format_count(last["total_targets"]) if last.get("total_targets") else None),
        ("Optimizer", ", ".join(filter(None, (optimizer.get("name"), *settings)))),
        *((f"Phase {_plain(name)}", describe_phase(phase)) for name, phase in phases),
        ("Packing", facts.section("data").get("packing")),
        ("Seed", str(facts.run.config["seed"]) if facts.run.config and "seed" in facts.run.config else None),
        ("Devices", ", then ".join(devices)),
        ("Restarts", str(len(about.get("restarts") or []))),
        ("Token store", f"fingerprint {str((facts.run.manifest or {}).get('fingerprint') or '')[:12]}"),
        ("Versions", versions),
    ]
    return f"{title}\n\n{_list_items(items)}"


def describe_evaluation(facts: CardFacts) -> str:
    """The scores of splits, and of tasks with their intervals."""
    parts = ["## Evaluation"]
    if facts.splits:
        rows = []
        for split, record in facts.splits.items():
            total = record["total"]
            shown = (
                f"{name.replace('_', ' ')} {total[name]:.4f}" for name in _SPLIT_SCORES if total.get(name) is not None
            )
            rows.append((split, format_count(total.get("documents")), ", ".join(shown)))
        parts.append(f"Splits of the training sources at step {facts.step:,}:")
        parts.append(_table(("Split", "documents", "scores"), rows))
    if "test" not in facts.splits:
        parts.append(f"Test split: not recorded. {facts.command('eval', '--split=test')} records it.")
    others = [
        (name, record) for name, record in facts.tasks.items() if _kind(record) not in (*_BIAS_KINDS, *_MEMORY_KINDS)
    ]
    parts += [_describe_task(name, record) for name, record in others]
    if others:
        parts.append("In brackets: bootstrap 95% intervals over the examples of the task.")
    else:
        parts.append(f"Tasks: not recorded. {facts.command('eval', '--tasks=NAME')} records them.")
    return "\n\n".join(parts)


def describe_bias(facts: CardFacts) -> str:
    """Tasks about bias, and the gap between groups of examples of any task that has groups."""
    parts = [_describe_task(name, record) for name, record in _select_kinds(facts, _BIAS_KINDS)]
    has_task = bool(parts)
    parts += filter(None, (_describe_groups(name, record) for name, record in facts.tasks.items()))
    if not has_task:
        flags = [
            f"--config.eval.tasks.bias.{field}" for field in ("kind=stereotypes", "path=FILE", "group_field=FIELD")
        ]
        command = facts.command("eval", "--tasks=bias", *flags)
        parts.append(
            f"Tasks about bias: not recorded. {command} compares pairs of sentences, of which one stereotypes a group "
            "of people."
        )
    return "\n\n".join(["## Bias", *parts])


def describe_limits(facts: CardFacts) -> str:
    """The limits that follow from the files, and a place for those that a person knows."""
    lines = []
    if lengths := list_row_lengths(facts.run.config or {}, facts.step):
        lines.append(f"It was trained on rows of {max(lengths):,} tokens; longer contexts are untested.")
    if facts.splits and not facts.tasks:
        lines.append("It was scored on text like that of its training alone, which says little about other text.")
    if not facts.corpora:
        lines.append("The training data were not checked by llmjax for personal data, duplicates and evaluation sets.")
    for record in facts.splits.values():
        if record.get("note"):
            lines.append(f"{record['note'][:1].upper()}{record['note'][1:]}.")
    for name, record in facts.tasks.items():
        if record.get("note"):
            lines.append(f"{name}: {record['note']}")
    if facts.section("objective").get("name") not in ("classify", "regress", "contrastive", "similarity", "reward"):
        lines.append("It may write text that is false, offensive or copied from its training data.")
    lines.append("Not recorded: what a person found when using the model. Add it here.")
    return "## Limits\n\n" + "\n".join(f"- {_plain(line)}" for line in dict.fromkeys(lines))


def describe_cost(facts: CardFacts) -> str:
    """Device-hours, energy, CO2 and money, with formulas and assumptions."""
    total = cost.compute(facts.run)
    if total is None:
        text = "llmjax has not trained this model" if not facts.run.metrics else "run.json does not record the starts"
        return f"## Cost and energy\n\nNot recorded: {text}."
    amounts = cost.list_amounts(total)
    values = _list_items((name[:1].upper() + name[1:], value) for name, value, _ in amounts)
    lines = [*(f"{formula}." for _, _, formula in amounts), *cost.list_assumptions(total)]
    assumptions = "\n".join(f"- {line}" for line in lines)
    text = "Training alone, without that of a base model, curation and evaluation by command."
    return f"## Cost and energy\n\n{text}\n\n{values}\n\nFormulas and assumptions:\n\n{assumptions}"


def describe_how_to_use(facts: CardFacts) -> str:
    """Commands for the exported folder."""
    workdir = f"runs/{shlex.quote(facts.name)}"
    prompt = next(iter(facts.section("sample").get("prompts") or ()), "Once upon a time")
    objective = facts.section("objective").get("name", "causal")
    use = next_commands.use_model(workdir, objective, prompt)
    if next_commands.lacks_head(facts.run.workdir, facts.step):
        use = next_commands.embed_texts(workdir)
    commands = f"llmjax import --from=FOLDER --workdir={workdir}\n{use}"
    parts = [f"## How to use\n\nWith llmjax, where FOLDER holds these files:\n\n```\n{commands}\n```"]
    if name := facts.transformers_class:
        loader = "AutoModelForCausalLM" if name.endswith(("CausalLM", "LMHeadModel")) else name
        lines = (
            f"from transformers import AutoTokenizer, {loader}",
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            f'model = {loader}.from_pretrained("FOLDER")',
        )
        parts.append("With transformers:\n\n```python\n{}\n```".format("\n".join(lines)))
    parts.append(f"Written by llmjax {llmjax.__version__} from the files of the run {_plain(facts.name)}.")
    return "\n\n".join(parts)


SECTIONS: tuple[Callable[[CardFacts], str], ...] = (
    describe_model,
    describe_use,
    describe_data,
    describe_personal_data,
    describe_training,
    describe_evaluation,
    describe_bias,
    describe_limits,
    describe_cost,
    describe_how_to_use,
)


def _missing(flag: str, facts: CardFacts) -> str:
    return f"not recorded; {facts.command('train', flag)} records it"


def _trains_part(about: Mapping[str, Any]) -> bool:
    return about.get("trained_parameters") not in (None, about.get("parameters"))


def _count_parameters(facts: CardFacts) -> int | None:
    """By the config, where nothing was trained here; None where it cannot be read."""
    from llmjax.models import registry

    try:
        model = loading.read_config(facts.run.workdir).model
    except UserError:
        return None
    return sum(registry.parameters_by_part(registry.abstract(model)[1]).values())


def _kind(record: Mapping[str, Any]) -> str:
    return (record.get("settings") or {}).get("kind", "")


def _select_kinds(facts: CardFacts, kinds: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((name, record) for name, record in facts.tasks.items() if _kind(record) in kinds)


def _describe_corpus(corpus: Corpus) -> str:
    report = corpus.report
    records, kept = report["records"], report["kept"]
    stages = ", ".join(report["config"].get("stages") or ())
    items = [
        ("Documents", f"{kept['documents']:,} kept of {records['documents']:,}"),
        ("Stages", stages.replace("_", " ")),
    ]
    for field, title in (("licences", "Licences"), ("origins", "Origins")):
        counts = sorted((report.get(field) or {}).items(), key=lambda item: -item[1])
        items.append((title, ", ".join(f"{name} ({count:,})" for name, count in counts)))
    languages = sorted((report.get("languages") or {}).items(), key=lambda item: -item[1]["kept"])
    items.append(
        ("Languages", ", ".join(f"{code} ({entry['kept']:,})" for code, entry in languages[:8] if entry["kept"]))
    )
    if duplicates := report.get("duplicates"):
        items.append(("Duplicates removed", f"{duplicates['exact']:,} exact, {duplicates['near']:,} near"))
    for name, entry in (report.get("contamination") or {}).items():
        items.append((f"Contamination with {name}", f"{entry['documents']:,} documents, {entry['dropped']:,} dropped"))
    return f"### Curation of {_plain(corpus.source)}\n\n{_list_items(items)}"


def _describe_task(name: str, record: Mapping[str, Any]) -> str:
    main = results.find_main(record)
    rows = []
    for metric, number in record["metrics"].items():
        if "/" in metric and not metric.startswith(f"{main}/"):
            continue  # of a class
        interval = format_interval(number)
        value = "undefined" if number["value"] is None else f"{number['value']:.4f}"
        rows.append((metric, f"{value} [{interval}]" if interval else value))
    kind = _kind(record)
    title = f"### {_plain(name)}{f', {kind}' if kind else ''}, {record['n']:,} examples"
    return f"{title}\n\n{_table(('Metric', 'value'), rows)}"


def _describe_groups(name: str, record: Mapping[str, Any]) -> str:
    """The spread of the main score over the groups of a task; "" without groups."""
    main, counts = results.find_main(record), record.get("groups") or {}
    values = {
        group: number["value"]
        for group in counts
        if (number := record["metrics"].get(f"{main}/{group}")) and number["value"] is not None
    }
    if len(values) < 2:
        return ""
    low, high = min(values, key=lambda group: values[group]), max(values, key=lambda group: values[group])
    text = (
        f"{name}, {main} by {(record.get('settings') or {}).get('group_field', 'group')}: from {values[low]:.4f} "
        f"({low}, {counts[low]:,} examples) to {values[high]:.4f} ({high}, {counts[high]:,}), a gap of "
        f"{values[high] - values[low]:.4f} between {len(values)} groups; the intervals are above."
    )
    return _plain(text)


def _list_items(items: Iterable[tuple[str, str | None]]) -> str:
    """A line for each item; those without a value are left out, as they do not apply."""
    return "\n".join(f"- {name}: {_plain(str(value))}" for name, value in items if value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """The text on one line, without what Markdown could take for HTML."""
    return " ".join(str(text).split()).replace("<", "&lt;")
