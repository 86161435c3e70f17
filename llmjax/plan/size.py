"""The output of `llmjax size`: a size for a budget, or the parts and cost of a config's model."""

import math

from llmjax.errors import UserError
from llmjax.models import registry
from llmjax.plan import budget as budgets, count
from llmjax.plan.devices import Device
from llmjax.plan.units import duration, gib, short
from llmjax.run import config as run_config
from llmjax.run.config import RunConfig
from llmjax.run.teacher import read_teacher_config, teacher_bytes, teacher_flops_per_token

_STATE_SHARE = 0.8  # of a device's memory; the rest is for activations


def describe_budget(budget: budgets.Budget, device: Device, *, mfu: float, seq_len: int) -> list[str]:
    """Parameters, tokens, loss, learning rate, batch, the nearest config, and time and memory by number of devices."""
    rows = max(1, round(budget.batch_tokens / seq_len))
    lines = [
        f"{budget.flops:.3g} FLOPs (6 x parameters x tokens)",
        f"  parameters      {short(budget.parameters):>8}   {budget.tokens / budget.parameters:.1f} tokens each",
        f"  tokens          {short(budget.tokens):>8}",
        f"  expected loss   {budget.loss:8.3f}   nats per token on the study's text; {budgets.LOSS_SOURCE}",
        f"  learning rate   {budget.learning_rate:8.2g}   1.79 N^-0.713 D^0.307; {budgets.STEP_LAW_SOURCE}",
        f"  tokens a step   {short(budget.batch_tokens):>8}   0.58 D^0.571: train.global_batch={rows} of {seq_len}, "
        f"train.steps={math.ceil(budget.tokens / (rows * seq_len)):,}",
    ]
    low, high = budgets.STUDIED
    if not low <= budget.parameters <= high:
        lines.append(
            f"  outside the study's {short(low)} to {short(high)} parameters: loss, rate and batch are extrapolated"
        )
    best = budgets.for_flops(budget.flops)
    if not 0.9 < best.parameters / budget.parameters < 1.1:
        lines.append(
            f"  the same FLOPs are best spent on {short(best.parameters)} parameters and {short(best.tokens)} tokens "
            f"(loss {best.loss:.3f})"
        )
    lines += ["", f"on {device.name} at {mfu:.0%} of {device.peak:.3g} FLOPs a second; AdamW in float32, 16 bytes each"]
    lines += ["  devices   state, GiB each   time"]
    for devices in _device_counts(budget, device):
        seconds = budget.flops / (devices * device.peak * mfu)
        lines.append(f"  {devices:7,}   {16 * budget.parameters / devices / 2**30:15.2f}   {duration(seconds)}")
    spec, parameters = nearest_config(budget.parameters)
    lines += ["", f"nearest config: {spec}, {short(parameters)} parameters with the vocabulary of its data.tokenizer"]
    lines += [f"next: llmjax size --config={spec}"]
    return lines


def describe_config(config: RunConfig, spec: str, device: Device) -> list[str]:
    """Parameters by part, FLOPs per token, and memory by remat policy of one config's model."""
    model, seq = config.model, count.target_len(config)
    parts = registry.parameters_by_part(registry.abstract(model)[1])
    total = sum(parts.values())
    state = count.state_bytes_per_parameter(model, config.optimizer)
    flops, batch = run_config.flops_per_token(config, seq), config.train.batch_sizes.largest
    source = f" targets with sources of {config.data.seq_len:,}" if config.model.reads_source else ""
    lines = [f"{spec}: {model.family}, {total:,} parameters, vocabulary {model.vocab_size:,} (--vocab_size)"]
    lines += [f"  {name:<14} {size:>18,}   {size / total:6.1%}" for name, size in parts.items()]
    lines += [
        "",
        f"FLOPs per token, rows of {seq:,}{source}: {flops:.4g} to train, {flops / 3:.4g} for a forward pass",
        "  matmuls and attention, without the scores that a causal mask hides; training is three forward passes",
        f"  6 x parameters would be {6 * total:.4g}",
        f"  a step of {batch:,} rows: {flops * batch * seq:.4g}; all {config.train.steps:,} steps: "
        f"{flops * batch * seq * config.train.steps:.4g}",
        f"  at the peak of one {device.name}: {duration(flops * batch * seq / device.peak)} a step",
        "",
        f"state: {state:.2f} bytes a parameter with {config.optimizer.name} (parameter, gradient, moments), "
        f"{gib(state * total)} in total, sharded over mesh.fsdp x mesh.tensor devices",
        f"activations that a device keeps for the backward pass of a row of {seq:,} tokens, by model.remat:",
    ]
    if (teacher := read_teacher_config(config)) is not None:
        lines[-1:-1] = [
            f"teacher of distillation, not in these figures: {gib(teacher_bytes(config))} of parameters, "
            f"{teacher_flops_per_token(config, teacher, seq):.4g} FLOPs per token for its forward pass"
        ]
    mark = lambda name: "   <- this config" if name == model.remat else ""
    for name, size in count.residual_bytes(config).items():
        host = f", {gib(size.host)} in the host's memory" if size.host else ""
        lines.append(f"  {name:<17} {gib(size.device):>12}{host}{mark(name)}")
    return lines


def nearest_config(parameters: float) -> tuple[str, int]:
    """(`NAME:SIZE`, parameters) of the shipped decoder config whose number of parameters is nearest by ratio."""
    models = {spec: resolve(spec, None).model for specs in run_config.shipped_specs().values() for spec in specs}
    candidates = [(s, registry.count_parameters(model)) for s, model in models.items() if model.family == "decoder"]
    return min(candidates, key=lambda item: abs(math.log(item[1] / parameters)))


def resolve(spec: str, vocab_size: int | None, overrides: tuple[tuple[str, str], ...] = ()) -> RunConfig:
    """The config with a vocabulary size: the argument, the model's, or that of the tokenizer it would train.

    Raises UserError if none of them is known.
    """
    config = run_config.resolve(spec, overrides)
    vocab_size = vocab_size or config.model.vocab_size or config.data.tokenizer.vocab_size
    if vocab_size < 1:
        raise UserError(f"--vocab_size={vocab_size}: must be at least 1")
    return run_config.with_fields(config, [("model.vocab_size", vocab_size)])


def _device_counts(budget: budgets.Budget, device: Device) -> list[int]:
    """Six numbers of devices, powers of two, from the first whose memory fits the state; 1 if memory is unknown."""
    if device.memory is None:
        return [1]
    minimum = 16 * budget.parameters / (_STATE_SHARE * device.memory)
    first = max(0, math.ceil(math.log2(max(minimum, 1e-9))))
    return [2**power for power in range(first, first + 6)]
