"""The config of a run: all sections, bound once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import json
import operator
from typing import Any

from llmjax.binding import bind_overridden, find_file, load_file, load_module, shipped_files
from llmjax.checkpoint.manager import CheckpointConfig
from llmjax.data.batches.batch_sizes import MAX_SIZE, BatchSizes
from llmjax.data.batches.packing import ONE_SEGMENT
from llmjax.data.config import SEVERAL_TEXTS, DataConfig, ObjectiveConfig
from llmjax.data.objectives.objective import Objective, open_objective
from llmjax.data.objectives.text_fields import check_text_fields
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.evals.config import TaskConfig, check_tasks
from llmjax.models.decoder_config import DecoderConfig
from llmjax.models.registry import ModelConfig
from llmjax.nn.distillation import DistillConfig
from llmjax.nn.kernels import Choice
from llmjax.optim.config import OptimizerConfig
from llmjax.parallel.compiler_options import XlaConfig
from llmjax.parallel.mesh import MeshConfig, ParallelConfig
from llmjax.parallel.phases import WatchdogConfig
from llmjax.run.objective_checks import check_chat, check_distillation, check_labels
from llmjax.run.phase_config import PhaseConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of training, and the shape of a step.

    steps         optimizer steps, and the horizon of every schedule
    epochs        passes over the training rows, in place of `steps`, which becomes as many as they need; rows of
                  several sources are counted together, and weights decide how often each comes; 0: `steps` decides
    stop_at       end the run at this step without touching the schedules; 0: at `steps`
    global_batch  sequences of a step, over all devices
    batch_schedule  ((from_sample, global_batch), ...): other values of global_batch from these global sample indices
                  on, each of which compiles its own step. Steps and schedules count updates, whatever their size
    accumulation  microbatches of a step; their gradients are added, and the sum is divided by the targets once
    loss_chunk    positions of a row whose logits are in memory at one time
    z_loss        weight of log(normaliser)^2 in the loss
    log_every     steps between lines of metrics.jsonl
    max_skipped   consecutive bad steps after which the run stops with exit status 76 (diverged): those that are not
                  finite, which are skipped, and those whose loss is too high
    max_loss_rise  nats by which a loss may exceed the lowest median of 32 steps; 0: any loss is accepted
    recompute_every  steps between two that are computed twice, in the memory of a second training state; results that
                  differ in a bit end the run with exit status 77 (hardware suspected); 0: none
    compilation_cache  folder of compiled programs, reused by the next start; "": WORKDIR/compilation_cache; "off": none
    profile       (first step, number of steps) to trace with the JAX profiler, into WORKDIR/profile; (): none
    preemption_notice  "gce": save and stop when Google Compute Engine announces that it will stop the machine, for a
                  preemption or maintenance; "": only on signals
    wandb_project  log to this project of Weights & Biases as well (extra `wandb`); "": none
    """

    steps: int = 1000
    epochs: float = 0.0
    stop_at: int = 0
    global_batch: int = 8
    batch_schedule: tuple = ()
    accumulation: int = 1
    loss_chunk: int = 128
    z_loss: float = 0.0
    log_every: int = 10
    max_skipped: int = 100
    max_loss_rise: float = 3.0
    recompute_every: int = 0
    compilation_cache: str = ""
    profile: tuple = ()
    preemption_notice: str = ""
    wandb_project: str = ""

    @property
    def batch_sizes(self) -> BatchSizes:
        """The size of each global batch."""
        return BatchSizes(self.global_batch, self.batch_schedule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training and by `llmjax eval`.

    every       steps between evaluations of the validation split; 0: at the end only
    batch       sequences in an evaluation batch; 0: train.global_batch
    metric      the score that stop_after and checkpoint.keep_best compare: loss, perplexity or bits_per_byte, of which
                less is better, or any other in eval/<step>/validation.json, such as accuracy, of which more is better;
                or TASK/METRIC of a task in during_training
    stop_after  evaluations in a row without a better score after which training ends; 0: it goes to the last step
    tasks       tasks on your own files by name, for `llmjax eval --tasks=NAME`: section eval.tasks.NAME
    during_training  names of tasks that each evaluation of training scores as well
    """

    every: int = 0
    batch: int = 0
    metric: str = "loss"
    stop_after: int = 0
    tasks: Mapping[str, TaskConfig] = dataclasses.field(default_factory=dict)
    during_training: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Text written at the end of training, for the report.

    prompts      one sample each
    max_tokens   tokens of a sample
    temperature, top_p   see `llmjax generate --help`
    """

    prompts: tuple = ()
    max_tokens: int = 120
    temperature: float = 0.8
    top_p: float = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report and the model card cannot know from the run: prices, power, licence, languages.

    price_per_device_hour   of one device, in `currency`; 0: no price, so no cost in money
    currency                of the price
    device_watts            (low, high) power of one device in watts, measured or from a data sheet; (): the table of
                            known devices
    pue                     power usage effectiveness: energy of the data centre over that of its computers; 0: unknown,
                            a range
    grid_intensity          grams of CO2 equivalent per kWh of the electricity; 0: unknown, a range
    license                 of the model, in its card: an identifier such as apache-2.0; "": not stated
    languages               of the model, in its card: ISO 639 codes such as ("en", "de"); (): those that curation found
    """

    price_per_device_hour: float = 0.0
    currency: str = "USD"
    device_watts: tuple[float, ...] = ()
    pue: float = 0.0
    grid_intensity: float = 0.0
    license: str = ""
    languages: tuple[str, ...] = ()

    def __post_init__(self):
        watts = self.device_watts
        if watts and (len(watts) != 2 or not 0 < watts[0] <= watts[1]):
            raise UserError(f"report.device_watts={watts}: expected (low, high) in watts, such as (350, 700), or ()")
        if self.pue and not self.pue >= 1:
            raise UserError(f"report.pue={self.pue}: must be at least 1, or 0 where it is unknown")


# Fields of the model that change how it is computed, not its parameters or its function.
FREE_MODEL_FIELDS = {
    "scan", "remat", "quantization", "attention", "attention_block", "recurrence", "unroll", "dtype", "dropout",
}  # fmt: skip
# Fields of each section that must be at least 1, and those that must not be negative.
_POSITIVE = {
    "train": ("steps", "global_batch", "accumulation", "loss_chunk", "log_every", "max_skipped"),
    "checkpoint": ("every", "keep", "timeout_seconds"),
    "data": ("seq_len", "tokenizer.training_bytes"),
}
_NOT_NEGATIVE = {
    "data": ("workers", "max_bad_fraction"),
    "train": ("stop_at", "z_loss", "epochs", "max_loss_rise", "recompute_every"),
    "checkpoint": ("keep_every",),
    "report": ("price_per_device_hour", "grid_intensity"),
    "eval": ("every", "batch", "stop_after"),
}
# Fields whose value decides the size of arrays in the host's memory, which are allocated before anything else fails.
_SIZES = {"train": ("global_batch",), "eval": ("batch",), "data": ("seq_len",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `seed` keys the initial parameters, the data order, the draws of objectives, and dropout.

    phases   changes after given steps, by name: section phases.NAME
    """

    seed: int = 0
    model: ModelConfig = DecoderConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    distill: DistillConfig = DistillConfig()
    mesh: MeshConfig = MeshConfig()
    parallel: ParallelConfig = ParallelConfig()
    xla: XlaConfig = XlaConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    report: ReportConfig = ReportConfig()
    phases: Mapping[str, PhaseConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self._check_fields(_POSITIVE, lambda value: value >= 1, "must be at least 1")
        self._check_fields(_NOT_NEGATIVE, lambda value: value >= 0, "must not be negative")
        self._check_fields(_SIZES, lambda value: value <= MAX_SIZE, f"must be at most {MAX_SIZE}")
        if not 0 <= self.seed < 1 << 32:  # JAX's keys have 32 bits: a larger seed would repeat draws of a smaller one
            raise UserError(f"seed={self.seed}: must be from 0 to {(1 << 32) - 1}")
        for field, is_set in (
            ("eval.stop_after", self.eval.stop_after),
            ("checkpoint.keep_best", self.checkpoint.keep_best),
        ):
            if is_set and not self.eval.every:
                raise UserError(
                    f"{field}={is_set}: compares evaluations, and there is one at the end only; set eval.every"
                )
        if self.train.epochs and self.train.batch_schedule:
            raise UserError(
                f"train.epochs={self.train.epochs}: an epoch has no fixed number of steps with train.batch_schedule; "
                "set train.steps instead"
            )
        if self.train.stop_at > self.train.steps and not self.train.epochs:
            raise UserError(f"train.stop_at={self.train.stop_at} is beyond train.steps={self.train.steps}: lower it")
        _check_profile(self.train)
        if self.objective.name not in self.model.objectives:
            raise UserError(
                f"objective.name={self.objective.name!r}: model.family={self.model.family!r} supports objectives "
                f"{', '.join(self.model.objectives)}; set one of these, or another family"
            )
        check_labels(self.objective, self.data, self.model)
        check_chat(self.objective, self.data)
        check_distillation(self.distill, self.objective, self.data)
        self._check_texts()
        check_tasks(self.eval.tasks)
        if self.data.packing == "stream" and self.objective.name != "causal":
            raise UserError(
                f"data.packing='stream': objective.name={self.objective.name!r} needs documents that are kept apart; "
                "set data.packing='best_fit'"
            )
        for field in ("target_len", "prompt_form"):
            value = getattr(self.objective, field)
            if value != getattr(ObjectiveConfig, field) and not self.model.reads_source:
                raise UserError(
                    f"objective.{field}={value!r}: model.family={self.model.family!r} is not an "
                    "encoder-decoder; unset it"
                )
        for field, size in self.train.batch_sizes.fields:
            if size % self.train.accumulation:
                raise UserError(
                    f"{field}={size} is not divisible by train.accumulation={self.train.accumulation}: change one of "
                    "them"
                )

    def _check_texts(self) -> None:
        """UserError where the objective and the texts of the records do not fit, or where a step would be another."""
        name, train = self.objective.name, self.train
        check_text_fields(name, self.data.sources)
        if name not in SEVERAL_TEXTS:
            return
        if self.data.packing != "none":
            raise UserError(
                f"data.packing={self.data.packing!r}: objective.name={name!r} needs one record in each row; set it to "
                "'none'"
            )
        if train.z_loss:
            raise UserError(f"train.z_loss={train.z_loss}: objective.name={name!r} has no term for it; set it to 0")
        if name == "dpo" and self.model.dropout:
            raise UserError(
                f"model.dropout={self.model.dropout}: objective.name='dpo' compares with a reference model without "
                "dropout; set it to 0"
            )
        if name == "contrastive":
            self._check_negatives()

    def _check_negatives(self) -> None:
        """UserError where a step would not compare each record with all others of the global batch."""
        train = self.train
        if train.accumulation > 1:
            raise UserError(
                f"train.accumulation={train.accumulation}: objective.name='contrastive' compares each record with all "
                "others of the global batch, which a microbatch does not have; set it to 1"
            )
        if self.parallel.backend == "pmap":
            raise UserError(
                "parallel.backend='pmap': objective.name='contrastive' compares each record with those of all devices; "
                "use 'jit'"
            )
        for field, size in train.batch_sizes.fields:
            if size < 2:
                raise UserError(
                    f"{field}={size}: objective.name='contrastive' compares records with others; set it to 2 or more"
                )

    def _check_fields(self, fields: dict[str, tuple[str, ...]], is_valid: Callable[[Any], bool], expected: str) -> None:
        for section, names in fields.items():
            for name in names:
                value = operator.attrgetter(f"{section}.{name}")(self)
                if not is_valid(value):
                    raise UserError(f"{section}.{name}={value}: {expected}")


def _check_profile(train: TrainConfig) -> None:
    profile = train.profile
    if not profile:
        return
    if len(profile) != 2 or not all(type(value) is int and value >= 1 for value in profile):
        raise UserError(f"train.profile={profile}: expected (first step, number of steps), such as (10, 5), or ()")
    first, steps = profile
    if (last := first + steps - 1) > train.steps:
        raise UserError(
            f"train.profile={profile} ends at step {last}, beyond train.steps={train.steps}: "
            "choose earlier or fewer steps"
        )


def resolve(file: str, overrides: Sequence[tuple[str, str]]) -> RunConfig:
    """The config of `--config=FILE[:ARG]` with `(FIELD, TEXT)` overrides."""
    return apply_overrides(load_run_file(file), overrides)


def load_run_file(file: str) -> dict[str, Any]:
    """`binding.load_file` for a training run. Raises UserError for a config of `llmjax curate`."""
    tree = load_file(file)
    if "curate" in tree:
        raise UserError(f"--config={file}: a config of `llmjax curate`; give one of a training run, such as quickstart")
    return tree


def shipped_specs() -> dict[str, list[str]]:
    """Name -> the values NAME, NAME:SIZE, ... of `--config`, for every shipped config of training."""
    sizes = {name: getattr(load_module(path), "SIZES", ()) for name, path in shipped_files().items()}
    specs = {name: [name, *(f"{name}:{size}" for size in table)] for name, table in sizes.items()}
    return {name: values for name, values in specs.items() if "curate" not in load_file(name)}


def published_vocab_size(spec: str) -> int | None:
    """The vocabulary of the published models that a config `NAME[:SIZE]` describes; None if it names none."""
    sizes = getattr(load_module(find_file(spec)), "VOCAB_SIZE", None)
    return sizes.get(spec.partition(":")[2]) if isinstance(sizes, dict) else sizes


def with_fields(config: RunConfig, fields: Iterable[tuple[str, Any]]) -> RunConfig:
    """The config with other values of fields, such as ("model.remat", "full"); each value has its field's type."""
    for field, value in fields:
        section, name = field.split(".")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def apply_overrides(tree: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> RunConfig:
    """A RunConfig from a nested dict and `(FIELD, TEXT)` overrides."""
    return bind_overridden(RunConfig, tree, overrides, inputs="data.sources")


def to_json(config: RunConfig) -> dict[str, Any]:
    """The config as a JSON object: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def objective(config: RunConfig, tokenizer: Tokenizer) -> Objective:
    """The run's objective, with the tokenizer's ids and those that the objective adds."""
    return open_objective(
        config.objective,
        tokenizer,
        seq_len=config.data.seq_len,
        start_id=config.model.decoder_start_id,
        one_segment=config.data.packing in ONE_SEGMENT,
        classes=config.data.classes,
        multi_label=config.data.multi_label,
        labels_first=config.model.bidirectional,
        num_texts=3 if any(source.negative_field for source in config.data.sources.values()) else 2,
    )


def with_objective(config: RunConfig, objective: Objective) -> RunConfig:
    """The config with what the model has from the objective filled in: the vocabulary size, the outputs of its head,
    and the first id that a decoder reads."""
    if config.model.reads_source:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, start_id=objective.decoder_start_id)
        )
    config = with_fields(config, [("model.num_outputs", objective.num_outputs)])
    return with_vocabulary(config, objective.min_vocab_size)


def choose_attention(config: RunConfig) -> Choice | None:
    """The attention kernel of the train step on this mesh; None for a family without attention.

    Raises UserError where the configured kernel cannot be used.
    """
    model, objective = config.model, config.objective
    has_prefix = objective.name == "prefix" and not model.reads_source
    return model.choose_attention(max(config.data.seq_len, objective.target_len), has_prefix=has_prefix)


def flops_per_token(config: RunConfig, target_len: int) -> float:
    """Model FLOPs of one position of a row of `target_len` targets, its share of an encoder's source included."""
    lengths = {"target_len": target_len} if config.model.reads_source else {}
    return config.model.flops_per_token(config.data.seq_len, **lengths)


def with_vocabulary(config: RunConfig, vocab_size: int) -> RunConfig:
    """The config with model.vocab_size filled in, or checked, for the ids of the tokenizer and of the objective."""
    configured = config.model.vocab_size
    if configured and configured < vocab_size:
        raise UserError(
            f"model.vocab_size={configured} is smaller than the {vocab_size} ids of the tokenizer and of "
            f"objective.name={config.objective.name!r}: set it to 0, which takes these"
        )
    return with_fields(config, [("model.vocab_size", configured or vocab_size)])
