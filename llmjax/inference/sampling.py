"""Text from a checkpoint: prompts in, continuations out."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from llmjax.data.objectives.objective import Objective
from llmjax.data.objectives.prompts import decode_continuation, encode_prompt
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.inference.generate import Sampling, check, generate
from llmjax.models.registry import ModelConfig
from llmjax.parallel import axes
from llmjax.run.config import SampleConfig


def complete(
    prompts: Sequence[str],
    *,
    graph: Any,
    params: dict,
    model: ModelConfig,
    mesh: Mesh,
    rules: axes.LogicalRules,
    tokenizer: Tokenizer,
    objective: Objective,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """A continuation of each prompt, of `max_tokens` tokens at most; it ends where the model ends the document.

    Prompts are put to the model as its objective has it: behind BOS, or as a source with a gap at its end; those of an
    imported model as its tokenizer frames them.
    Raises UserError for settings out of range, for a prompt with special tokens that the tokenizer does not know, and
    where a prompt and its continuation exceed a model's learned positions or the memory.
    """
    tokens = _tokens(prompts, tokenizer, objective)
    try:
        with jax.set_mesh(mesh), axes.use_rules(rules):
            continuations = generate(
                graph,
                params,
                model,
                tokens,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop_ids=tokenizer.stop_ids,
            )
    except jax.errors.JaxRuntimeError as error:
        if not any(sign in str(error) for sign in ("Out of memory", "RESOURCE_EXHAUSTED")):
            raise
        raise UserError(
            f"max_tokens={max_tokens}: out of memory with {len(tokens)} prompt(s) of up to {max(map(len, tokens))} "
            "tokens; lower it, or give fewer prompts at a time"
        ) from error
    if objective.answers:
        return [tokenizer.decode(ids) for ids in continuations]
    pairs = zip(tokens, continuations, strict=True)
    return [decode_continuation(tokenizer, prompt, new) for prompt, new in pairs]


def check_samples(sample: SampleConfig, *, model: ModelConfig, tokenizer: Tokenizer, objective: Objective) -> None:
    """Raise UserError, before anything is trained, for samples that could not be drawn at the end of training."""
    if not (sample.prompts and model.generates):
        return
    for prompt in sample.prompts:
        if not isinstance(prompt, str):
            raise UserError(f"sample.prompts: {prompt!r} is not a string; give strings, such as ('Once', 'Call me')")
    try:
        Sampling(temperature=sample.temperature, top_p=sample.top_p)
        check(model, _tokens(sample.prompts, tokenizer, objective), sample.max_tokens)
    except UserError as error:
        raise UserError(f"the samples after training: {error}; `llmjax fields sample` lists what to set") from None


def _tokens(prompts: Sequence[str], tokenizer: Tokenizer, objective: Objective) -> list[np.ndarray]:
    return [objective.prompt(encode_prompt(tokenizer, prompt)) for prompt in prompts]
