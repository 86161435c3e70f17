"""What trains with the same bits on any number of devices (parallel.reduction="fixed_tree"); the rest is refused."""

import jax

from llmjax.data.config import LABELLED, SEVERAL_TEXTS
from llmjax.errors import UserError
from llmjax.parallel import virtual_shards
from llmjax.parallel.fixed_tree import DATA, FSDP
from llmjax.parallel.virtual_shards import refusal
from llmjax.run.config import RunConfig


def check(config: RunConfig) -> None:
    """Raise UserError where the bits of a step cannot be the same on every number of devices."""
    parallel, train, mesh = config.parallel, config.train, jax.sharding.get_mesh().shape
    shards = parallel.virtual_shards
    if (parallel.reduction == "fixed_tree") != (shards > 0):
        raise UserError(
            f"parallel.virtual_shards={shards}: set it to a power of two, such as 8, for parallel.reduction="
            "'fixed_tree', and to 0 for 'xla'"
        )
    if not shards:
        return
    eval_batch = [("eval.batch", config.eval.batch)] if config.eval.batch else []
    for field, size in train.batch_sizes.fields + eval_batch:
        virtual_shards.check(parallel, field, size)
    count = shards // (mesh[DATA] * mesh[FSDP])
    if count % train.accumulation:
        raise refusal(
            f"train.accumulation={train.accumulation}", f"runs {count} micro-steps on each device; set it to 1"
        )
    if parallel.backend != "jit":
        raise refusal(f"parallel.backend={parallel.backend!r}", "needs 'jit'")
    if parallel.gradient_dtype:
        raise refusal(f"parallel.gradient_dtype={parallel.gradient_dtype!r}", "adds in float32; set it to ''")
    if config.distill.teacher:
        raise refusal(
            f"distill.teacher={config.distill.teacher}", "has no teacher beside the virtual shards; set it to ''"
        )
    if config.objective.name in LABELLED:
        raise refusal(f"objective.name={config.objective.name!r}", "was not tried with labels; use another objective")
    if config.objective.name in SEVERAL_TEXTS:
        raise refusal(
            f"objective.name={config.objective.name!r}", "computes the loss of a part of the batch at a time; use 'xla'"
        )
    if config.model.param_dtype != "float32":
        raise refusal(f"model.param_dtype={config.model.param_dtype!r}", "needs 'float32'")
    frozen = [f"optimizer.{field}" for field in ("trainable", "frozen") if getattr(config.optimizer, field)]
    for field in [*frozen, *(["model.lora.rank"] if config.model.lora.rank else [])]:
        raise refusal(field, "trains all parameters; unset it")
    for field, neutral in (("layer_decay", 1), ("unfreeze_every", 0)):
        if (value := getattr(config.optimizer, field)) != neutral:
            raise refusal(f"optimizer.{field}={value}", f"was not tried with it; set it to {neutral}")
    if config.model.quantization != "none":
        raise refusal(f"model.quantization={config.model.quantization!r}", "was not tried with it; set it to 'none'")
