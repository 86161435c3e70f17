"""Distillation: a model learns the predictions of another one beside its targets (Hinton et al., arXiv 1503.02531)."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.batch import Batch
from llmjax.errors import UserError
from llmjax.nn.losses import LossSums, sum_beside_teacher, token_sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A teacher, whose predictions the model learns beside the targets.

    The loss of a target is (1 - alpha) x cross-entropy + alpha x temperature^2 x KL(teacher || model), where both
    softmaxes of the divergence are taken of logits over the temperature (Hinton et al., 2015, arXiv 1503.02531).

    teacher      workdir of another run, with the same tokenizer and objective; "": none
    step         its checkpoint; None: the newest when training starts, which a resumed run keeps
    alpha        share of the teacher in the loss, above 0 and up to 1
    temperature  above 1, the teacher's less likely predictions count more; above 0
    """

    teacher: str = ""
    step: int | None = None
    alpha: float = 0.5
    temperature: float = 2.0

    def __post_init__(self):
        if not self.teacher:
            for field in dataclasses.fields(self)[1:]:
                if (value := getattr(self, field.name)) != field.default:
                    raise UserError(f"distill.{field.name}={value!r}: has no use without distill.teacher; set it too")
        if self.step is not None and self.step < 0:
            raise UserError(f"distill.step={self.step}: must be a step of the teacher's run, from 0 on, or None")
        if not 0 < self.alpha <= 1:
            raise UserError(f"distill.alpha={self.alpha}: must be above 0 and at most 1")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"distill.temperature={self.temperature}: must be above 0")


def make_distillation_loss(teacher: Any, distill: DistillConfig) -> Callable[..., LossSums]:
    """The loss of a batch beside the predictions of `teacher` (a model), with the signature of `losses.batch_loss`."""

    def loss(hidden: jax.Array, unembed: Callable, batch: Batch, *, chunk: int, z_loss: float) -> LossSums:
        return distillation_loss(
            hidden,
            unembed,
            teacher(batch).hidden,
            teacher.unembed,
            batch,
            chunk=chunk,
            z_loss=z_loss,
            alpha=distill.alpha,
            temperature=distill.temperature,
        )

    return loss


def distillation_loss(
    hidden: jax.Array,
    unembed: Callable[[jax.Array], jax.Array],
    teacher_hidden: jax.Array,
    teacher_unembed: Callable[[jax.Array], jax.Array],
    batch: Batch,
    *,
    chunk: int,
    z_loss: float,
    alpha: float,
    temperature: float,
) -> LossSums:
    """The loss of DistillConfig at the targets of a batch, weighted and summed; `nats` holds both of its terms.

    hidden, teacher_hidden   [batch, seq, embed of each model]
    The gradient of the divergence by the model's logits is (softmax of the model - softmax of the teacher), divided by
    the temperature (equation 2 of Hinton et al.); the factor temperature^2 keeps the size of the gradient when the
    temperature changes. Other arguments as of `losses.cross_entropy`.
    """
    score = functools.partial(_distillation_sums, z_loss=z_loss, alpha=alpha, temperature=temperature)
    return sum_beside_teacher(
        hidden, unembed, teacher_hidden, teacher_unembed, batch.targets, batch.weights, chunk, score
    )


def _distillation_sums(
    logits, teacher_logits, targets, weights, *, z_loss: float, alpha: float, temperature: float
) -> tuple[LossSums, jax.Array]:
    """(sums, gradient of nats + z by `logits`), both logits [..., vocab] in float32."""
    hard, d_hard = token_sums(logits, targets, weights, z_loss=z_loss, share=1 - alpha)
    log_student, log_teacher = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher_logits))
    teacher = jnp.exp(log_teacher)
    weights = weights[..., None]
    kl = jnp.sum(weights * teacher * (log_teacher - log_student))
    sums = dataclasses.replace(hard, nats=hard.nats + alpha * temperature**2 * kl, kl=kl)
    return sums, d_hard + alpha * temperature * weights * (jnp.exp(log_student) - teacher)
