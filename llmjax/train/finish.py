"""The end of training: evaluate, sample, write the report, log a summary."""

import logging
import time
from typing import Any

from llmjax import report
from llmjax.checkpoint.fingerprint import fingerprint
from llmjax.data.store.manifest import has_dialogues
from llmjax.evals.label_scores import describe_baseline
from llmjax.inference.generate import complete, sampling_from_config
from llmjax.parallel import hosts
from llmjax.report.files import list_compressors
from llmjax.run import next_commands, workdir as workdirs
from llmjax.train import best, record
from llmjax.train.context import Progress, TrainContext
from llmjax.train.phases import summarize_data

logger = logging.getLogger(__name__)


def write_final_report(context: TrainContext, progress: Progress) -> None:
    """Write eval/<step>/validation.json, samples.json and report.html for the state of `progress`.

    Scores and samples that an earlier start wrote for this state and these settings are read instead.
    """
    context.watchdog.enter("report", progress.step)
    state = fingerprint(progress.state.params, progress.state.opt_state)
    scores = _evaluate(context, progress, state)
    context.watchdog.enter("report", progress.step)
    samples = _sample(context, progress, state)
    if not hosts.is_primary():
        return
    context.lock.check()
    workdirs.write_json(
        context.workdir / workdirs.DATA, summarize_data(context.phases, progress.step, progress.data_state)
    )
    record.write_end(context.workdir, time.time())
    path = report.write_report(context.workdir)
    for line in _summary(context, progress, scores, samples):
        logger.info("%s", line)
    if progress.evaluations and scores is not None and (line := _describe_best(context, progress, scores)):
        logger.info("%s", line)
    logger.info("\nreport: %s", path)
    if has_dialogues(context.manifest):
        logger.info("next:   %s", next_commands.chat(context.workdir))
    else:
        prompt = (context.config.sample.prompts or ("Once upon a time",))[0]
        logger.info("next:   %s", next_commands.use_model(context.workdir, context.config.objective.name, prompt))
    logger.info("        %s", next_commands.score_model(context.workdir, context.evaluator.store))


def _describe_best(context: TrainContext, progress: Progress, scores: dict[str, Any]) -> str:
    """A line where an earlier step had a better score than the last one."""
    metric = context.config.eval.metric
    evaluations = {**progress.evaluations, progress.step: best.select_scores(scores, metric)}
    step = best.find_best(evaluations, metric)
    if step is None or step == progress.step:
        return ""
    is_kept = step in context.checkpoints.steps()
    text = f"use it by --step={step}" if is_kept else "its checkpoint was not kept (checkpoint.keep_best)"
    return f"\nbest validation {metric}: {evaluations[step][metric]:.4f} at step {step}; {text}"


def _evaluate(context: TrainContext, progress: Progress, state: str) -> dict[str, Any] | None:
    """The scores of the validation split, from their file if it is of this state; None where the split is empty."""
    if not any(source["validation"]["tokens"] for source in context.manifest["sources"].values()):
        return None
    saved = workdirs.read_json(workdirs.eval_path(context.workdir, progress.step, "validation"))
    expected = (state, context.evaluator.settings)
    if hosts.agree(saved is not None and (saved["fingerprint"], saved.get("settings")) == expected, "evaluated"):
        assert saved is not None
        return {**saved, "tasks": context.score_tasks(progress.step, progress.state, state)}
    name = context.spec.optimizer.eval_params_name
    logger.info("evaluating the validation split at step %d (%s)", progress.step, name)
    return context.evaluate(progress.step, progress.state)


def _sample(context: TrainContext, progress: Progress, state: str) -> list[dict[str, Any]]:
    """The samples of the report, from their file if it is of this state and these settings."""
    path, prompts = context.workdir / workdirs.SAMPLES, context.config.sample.prompts
    if not prompts:
        return []
    if not context.config.model.generates:
        logger.info("no samples: this model does not generate text")
        return []
    sampling = sampling_from_config(context.config.sample, context.config.seed)
    settings = {
        "step": progress.step,
        "fingerprint": state,
        "seed": sampling.seed,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "prompt_form": context.config.objective.prompt_form,
    }
    without_text = [{**settings, "prompt": prompt} for prompt in prompts]
    saved = workdirs.read_json(path, list) or []
    saved_without_text = [{name: sample.get(name) for name in without_text[0]} for sample in saved]
    if hosts.agree(saved_without_text == without_text, "sampled"):
        return saved
    texts = complete(context.loaded(progress.step, progress.state, state), prompts, sampling)
    samples = [{**sample, "text": text} for sample, text in zip(without_text, texts, strict=True)]
    if hosts.is_primary():
        context.lock.check()
        workdirs.write_json(path, samples)
    return samples


def _summary(
    context: TrainContext, progress: Progress, scores: dict[str, Any] | None, samples: list[dict[str, Any]]
) -> list[str]:
    manifest = context.manifest
    corpus = f"Python {manifest['python']}, corpus sha256 {manifest['corpus_sha256'][:16]}"
    lines = [f"\nstep {progress.step}, {progress.total_targets:,} targets scored; {corpus}"]
    for sample in samples:
        lines += [f"\n--- sample, prompt {sample['prompt']!r} ---", sample["prompt"] + sample["text"]]
    if scores is None:
        return [*lines, "\nthe validation split is empty, so nothing was evaluated"]
    total, name = scores["total"], context.spec.optimizer.eval_params_name
    lines += [
        f"\nvalidation split, {total['documents']:,} documents, {total['text_bytes']:,} bytes; {name} of this step",
        f"  loss            {total['loss']:.4f}{'' if total['perplexity'] is None else ' nats per token'}",
    ]
    if total["perplexity"] is not None:
        lines.append(f"  perplexity      {total['perplexity']:.2f}")
    for name in ("margin", "macro_f1", "pearson", "spearman"):
        if name in total:
            lines.append(f"  {name:<15} {total[name]:.4f}")
    if total["accuracy"] is None:
        return lines
    if total["bits_per_byte"] is None:
        name, baseline = describe_baseline(total)
        lines += [
            f"  accuracy        {total['accuracy']:.2%}   this model, of {total['num_targets']:,} scored targets",
            f"                  {baseline:.2%}   {name}",
        ]
    else:
        lines.append(f"  bits per byte   {total['bits_per_byte']:.4f}   this model")
        for label, size in list_compressors(manifest):
            lines.append(f"                  {8 * size / total['text_bytes']:.4f}   {label}")
    return [*lines, f"  note: {scores['note']}"] if "note" in scores else lines
