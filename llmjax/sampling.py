"""Text from a checkpoint: prompts in, continuations out."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from llmjax.data.objectives import Objective
from llmjax.data.tokenizer import Tokenizer
from llmjax.generate import generate
from llmjax.models.registry import ModelConfig
from llmjax.parallel import axes


def complete(
    prompts: Sequence[str],
    *,
    graph: Any,
    params: dict,
    model: ModelConfig,
    mesh: Mesh,
    rules: axes.type_of_rules,
    tokenizer: Tokenizer,
    objective: Objective,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """A continuation of each prompt, of `max_tokens` tokens at most; it ends where the model ends the document.

    Prompts are put to the model as its objective has it: behind BOS, or as a source with a gap at its end.
    Raises UserError for settings out of range, for a prompt with special tokens that the tokenizer does not know, and
    where a prompt and its continuation exceed a model's learned positions.
    """
    for prompt in prompts:
        tokenizer.check_special(prompt)
    tokens = [objective.prompt(ids) for ids in tokenizer.encode_batch(list(prompts))]
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
            eos_id=tokenizer.eos_id,
        )
    return [tokenizer.decode(ids) for ids in continuations]
