"""The end of training: evaluate, sample, write the report, print a summary."""

import shlex

from llmjax import report
from llmjax.checkpoint.fingerprint import fingerprint
from llmjax.data.store import prepare
from llmjax.inference import sampling
from llmjax.parallel import hosts
from llmjax.report.files import compressors
from llmjax.run import workdir as workdirs
from llmjax.train.context import Progress, TrainContext


def write_final_report(context: TrainContext, progress: Progress) -> None:
    """Write eval/<step>/validation.json, samples.json and report.html for the state of `progress`.

    What is there of this state and these settings is taken as it is.
    """
    state = fingerprint(progress.state.params, progress.state.opt_state)
    scores = _evaluate(context, progress, state)
    samples = _sample(context, progress, state)
    if not hosts.is_primary():
        return
    context.lock.check()
    workdirs.write_json(context.workdir / workdirs.DATA, context.data.summary(progress.data_state))
    path = report.write_report(context.workdir)
    for line in _summary(context, progress, scores, samples):
        context.say(line)
    context.say(f"\nreport: {path}")
    commands = [f"llmjax eval --workdir={context.workdir} --split=test"]
    if context.config.model.generates:
        prompt = shlex.quote((context.config.sample.prompts or ("Once upon a time",))[0])
        commands.insert(0, f"llmjax generate --workdir={context.workdir} --prompt={prompt}")
    if context.config.objective.name == "masked":
        commands.insert(0, f"llmjax fill --workdir={context.workdir} --text='The [MASK] of the'")
    for lead, command in zip(("next:  ", "       "), commands, strict=False):
        context.say(f"{lead} {command}")


def _evaluate(context: TrainContext, progress: Progress, state: str) -> dict | None:
    path = context.workdir / workdirs.EVAL / str(progress.step) / "validation.json"
    manifest = prepare.read_manifest(context.store)
    assert manifest is not None
    if not any(source["validation"]["tokens"] for source in manifest["sources"].values()):
        return None
    old = workdirs.read_json(path)
    wanted = (state, context.evaluator.settings)
    if hosts.agree(old is not None and (old["fingerprint"], old.get("settings")) == wanted, "evaluated"):
        return old
    context.say(f"evaluating the validation split at step {progress.step} ({context.spec.optimizer.eval_params_name})")
    return context.evaluate(progress.step, progress.state, "validation")


def _sample(context: TrainContext, progress: Progress, state: str) -> list[dict]:
    path, settings = context.workdir / workdirs.SAMPLES, context.config.sample
    if not settings.prompts:
        return []
    if not context.config.model.generates:
        context.say(f"no samples: model.family={context.config.model.family!r} continues no text")
        return []
    old = workdirs.read_json(path, list)
    shared = {
        "step": progress.step,
        "fingerprint": state,
        "seed": context.config.seed,
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "prompt_form": context.config.objective.prompt_form,
    }
    wanted = [{**shared, "prompt": prompt} for prompt in settings.prompts]
    known = [{name: sample.get(name) for name in wanted[0]} for sample in old or []]
    if hosts.agree(known == wanted, "sampled"):
        return old
    texts = sampling.complete(
        settings.prompts,
        graph=context.spec.graph,
        params=context.eval_params(progress.state),
        model=context.config.model,
        mesh=context.mesh,
        rules=context.config.parallel.rules,
        tokenizer=context.tokenizer,
        objective=context.evaluator.objective,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=context.config.seed,
    )
    samples = [{**sample, "text": text} for sample, text in zip(wanted, texts, strict=True)]
    if hosts.is_primary():
        context.lock.check()
        workdirs.write_json(path, samples)
    return samples


def _summary(context: TrainContext, progress: Progress, scores: dict | None, samples: list[dict]) -> list[str]:
    manifest = prepare.read_manifest(context.store)
    assert manifest is not None
    corpus = f"Python {manifest['python']}, corpus sha256 {manifest['corpus_sha256'][:16]}"
    lines = [f"\nstep {progress.step}, {progress.tokens:,} tokens seen; {corpus}"]
    for sample in samples:
        lines += [f"\n--- sample, prompt {sample['prompt']!r} ---", sample["prompt"] + sample["text"]]
    if scores is None:
        return [*lines, "\nthe validation split is empty, so nothing was evaluated"]
    total, weights = scores["total"], context.spec.optimizer.eval_params_name
    lines += [
        f"\nvalidation split, {total['documents']:,} documents, {total['text_bytes']:,} bytes; {weights} of this step",
        f"  loss            {total['loss']:.4f} nats per token",
        f"  perplexity      {total['perplexity']:.2f}",
    ]
    if total["bits_per_byte"] is None:
        lines += [
            f"  accuracy        {total['accuracy']:.2%}   this model, of {total['tokens']:,} scored places",
            f"                  {total['baseline_accuracy']:.2%}   majority-class baseline",
        ]
    else:
        lines.append(f"  bits per byte   {total['bits_per_byte']:.4f}   this model")
        for name, size in compressors(manifest):
            lines.append(f"                  {8 * size / total['text_bytes']:.4f}   {name}")
    return [*lines, f"  note: {scores['note']}"] if "note" in scores else lines
