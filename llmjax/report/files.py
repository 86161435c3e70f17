"""Read the files of a workdir for a report; missing or unreadable ones are None or empty."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from etils import epath

from llmjax import metrics
from llmjax.errors import UserError
from llmjax.report.profile import Profile, read_profile
from llmjax.run import workdir as workdirs


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The files of one run.

    evals      split -> step -> the JSON object of eval/<step>/<split>.json
    plan       of the step, by `llmjax plan --workdir`
    manifest   of the token store in data.store or WORKDIR/store
    profile    the newest trace of train.profile
    unreadable names of damaged files
    """

    workdir: epath.Path
    config: dict[str, Any] | None
    run: dict[str, Any] | None
    data: dict[str, Any] | None
    plan: dict[str, Any] | None
    manifest: dict[str, Any] | None
    samples: list[dict[str, Any]] | None
    metrics: list[dict[str, Any]]
    evals: dict[str, dict[int, dict[str, Any]]]
    profile: Profile | None
    unreadable: list[str]

    def last_eval(self, split: str) -> dict[str, Any] | None:
        """The scores of a split at its last evaluated step."""
        by_step = self.evals.get(split, {})
        return by_step[max(by_step)] if by_step else None

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of one field of the metrics, for the steps that logged it."""
        lines = ((line["step"], line.get(name)) for line in self.metrics)
        return [(step, float(value)) for step, value in lines if isinstance(value, int | float)]

    def sum_over_steps(self, name: str) -> float:
        """The sum over all steps of a field whose value is that of one step, taken as equal since the line before."""
        before, total = 0, 0.0
        for step, value in self.curve(name):
            total += value * (step - before)
            before = step
        return total


def read(workdir: epath.PathLike) -> RunFiles:
    """Read every file that the report uses."""
    root = epath.Path(workdir)
    unreadable: list[str] = []

    def load(path: epath.Path, kind: type) -> Any:
        try:
            return workdirs.read_json(path, kind)
        except UserError:
            unreadable.append(str(path))
            return None

    config = load(root / workdirs.CONFIG, dict)
    store = (config or {}).get("data", {}).get("store") or root / workdirs.STORE
    evals: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(root.glob(f"{workdirs.EVAL}/*/*.json")):
        if path.parent.name.isdecimal() and (scores := load(path, dict)) is not None:
            if "step" not in scores or not {"total", "metrics"} & scores.keys():  # not one that llmjax wrote
                unreadable.append(str(path))
                continue
            evals.setdefault(path.stem, {})[int(path.parent.name)] = scores
    try:
        profile = read_profile(root)
    except UserError:
        profile = None
        unreadable.append(str(root / workdirs.PROFILE))
    return RunFiles(
        workdir=root,
        config=config,
        run=load(root / workdirs.RUN, dict),
        data=load(root / workdirs.DATA, dict),
        plan=load(root / workdirs.PLAN, dict),
        manifest=load(epath.Path(store).expanduser() / "manifest.json", dict),
        samples=load(root / workdirs.SAMPLES, list),
        metrics=metrics.read_metrics(root),
        evals=evals,
        profile=profile,
        unreadable=unreadable,
    )


def list_phases(config: Mapping[str, Any], step: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    """(name, fields that are set) of the phases of a run's config.json, in order; with `step` those begun before it."""
    phases = sorted((config.get("phases") or {}).items(), key=lambda item: item[1]["after_step"])
    return [
        (name, {field: value for field, value in phase.items() if value not in (None, [], {})})
        for name, phase in phases
        if step is None or phase["after_step"] < step
    ]


def list_row_lengths(config: Mapping[str, Any], step: int | None = None) -> list[int]:
    """Tokens in a row in each phase (with `step` those begun before it), in order; [] where they are not known."""
    lengths = [(config.get("data") or {}).get("seq_len")]
    lengths += [phase.get("seq_len") for _, phase in list_phases(config, step)]
    return list(dict.fromkeys(filter(None, lengths)))


def describe_phase(phase: Mapping[str, Any]) -> str:
    """What a phase of `list_phases` changes."""
    changes = {name: value for name, value in phase.items() if name not in ("after_step", "weights")}
    listed = [f"{name} {value}" for name, value in changes.items()]
    if weights := phase.get("weights"):
        listed.append("weights " + ", ".join(f"{name} {weight:g}" for name, weight in weights.items()))
    return f"after step {phase['after_step']:,}: {'; '.join(listed)}"


def list_compressors(manifest: dict[str, Any] | None) -> list[tuple[str, int]]:
    """(label, bytes) of the validation text compressed by general compressors, smallest first; [] if not measured.

    The manifest has {"gzip -9": {"concatenated": bytes, "per_document": bytes}, ...} under "compressors".
    """
    sizes = [
        (f"{name}, {scope.replace('_', ' ')}", size)
        for name, by_scope in ((manifest or {}).get("compressors") or {}).items()
        if isinstance(by_scope, dict)
        for scope, size in by_scope.items()
    ]
    return sorted(sizes, key=lambda item: item[1])
