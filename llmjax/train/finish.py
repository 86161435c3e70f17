"""The end of training: evaluate, sample, report, and say in a few lines what came out."""

import shlex

from llmjax import report
from llmjax.checkpoint.fingerprint import fingerprint
from llmjax.data.store import prepare
from llmjax.inference import sampling
from llmjax.parallel import hosts
from llmjax.report.files import compressors
from llmjax.run import workdir as workdirs
from llmjax.train.context import Job, Progress


def finish(job: Job, progress: Progress) -> None:
    """Write eval/<step>/validation.json, samples.json and report.html for the state of `progress`.

    What is there of this state and these settings is taken as it is.
    """
    state = fingerprint(progress.state.params, progress.state.opt_state)
    scores = _evaluate(job, progress, state)
    samples = _sample(job, progress, state)
    if not hosts.is_primary():
        return
    job.lock.check()
    workdirs.write_json(job.workdir / workdirs.DATA, job.data.summary(progress.data_state))
    path = report.write_report(job.workdir)
    for line in _summary(job, progress, scores, samples):
        job.say(line)
    job.say(f"\nreport: {path}")
    commands = [f"llmjax eval --workdir={job.workdir} --split=test"]
    if job.config.model.generates:
        prompt = shlex.quote((job.config.sample.prompts or ("Once upon a time",))[0])
        commands.insert(0, f"llmjax generate --workdir={job.workdir} --prompt={prompt}")
    if job.config.objective.name == "masked":
        commands.insert(0, f"llmjax fill --workdir={job.workdir} --text='The [MASK] of the'")
    for lead, command in zip(("next:  ", "       "), commands, strict=False):
        job.say(f"{lead} {command}")


def _evaluate(job: Job, progress: Progress, state: str) -> dict | None:
    path = job.workdir / workdirs.EVAL / str(progress.step) / "validation.json"
    manifest = prepare.read_manifest(job.store)
    assert manifest is not None
    if not any(source["validation"]["tokens"] for source in manifest["sources"].values()):
        return None
    old = workdirs.read_json(path)
    wanted = (state, job.evaluator.settings)
    if hosts.agree(old is not None and (old["fingerprint"], old.get("settings")) == wanted, "evaluated"):
        return old
    job.say(f"evaluating the validation split at step {progress.step} ({job.plan.optimizer.evaluated_name})")
    return job.evaluate(progress.step, progress.state, "validation")


def _sample(job: Job, progress: Progress, state: str) -> list[dict]:
    path, settings = job.workdir / workdirs.SAMPLES, job.config.sample
    if not settings.prompts:
        return []
    if not job.config.model.generates:
        job.say(f"no samples: model.family={job.config.model.family!r} continues no text")
        return []
    old = workdirs.read_json(path, list)
    shared = {
        "step": progress.step,
        "fingerprint": state,
        "seed": job.config.seed,
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "prompt_form": job.config.objective.prompt_form,
    }
    wanted = [{**shared, "prompt": prompt} for prompt in settings.prompts]
    known = [{name: sample.get(name) for name in wanted[0]} for sample in old or []]
    if hosts.agree(known == wanted, "sampled"):
        return old
    texts = sampling.complete(
        settings.prompts,
        graph=job.plan.graph,
        params=job.evaluated(progress.state),
        model=job.config.model,
        mesh=job.mesh,
        rules=job.config.parallel.rules,
        tokenizer=job.tokenizer,
        objective=job.evaluator.objective,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=job.config.seed,
    )
    samples = [{**sample, "text": text} for sample, text in zip(wanted, texts, strict=True)]
    if hosts.is_primary():
        job.lock.check()
        workdirs.write_json(path, samples)
    return samples


def _summary(job: Job, progress: Progress, scores: dict | None, samples: list[dict]) -> list[str]:
    manifest = prepare.read_manifest(job.store)
    assert manifest is not None
    corpus = f"Python {manifest['python']}, corpus sha256 {manifest['corpus_sha256'][:16]}"
    lines = [f"\nstep {progress.step}, {progress.tokens:,} tokens seen; {corpus}"]
    for sample in samples:
        lines += [f"\n--- sample, prompt {sample['prompt']!r} ---", sample["prompt"] + sample["text"]]
    if scores is None:
        return [*lines, "\nthe validation split is empty, so nothing was evaluated"]
    total, weights = scores["total"], job.plan.optimizer.evaluated_name
    lines += [
        f"\nvalidation split, {total['documents']:,} documents, {total['text_bytes']:,} bytes; {weights} of this step",
        f"  loss            {total['loss']:.4f} nats per token",
        f"  perplexity      {total['perplexity']:.2f}",
    ]
    if total["bits_per_byte"] is None:
        lines += [
            f"  accuracy        {total['accuracy']:.2%}   this model, of {total['tokens']:,} scored places",
            f"                  {total['baseline_accuracy']:.2%}   always the commonest target",
        ]
    else:
        lines.append(f"  bits per byte   {total['bits_per_byte']:.4f}   this model")
        for name, size in compressors(manifest):
            lines.append(f"                  {8 * size / total['text_bytes']:.4f}   {name}")
    return [*lines, f"  note: {scores['note']}"] if "note" in scores else lines
