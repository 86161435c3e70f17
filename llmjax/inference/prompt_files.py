"""Completions of a file of prompts, written in its order; an interrupted run continues after its last whole line."""

from collections.abc import Iterator
import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from llmjax import atomic
from llmjax.binding import differences
from llmjax.data.chat_template import ChatTemplate
from llmjax.errors import UserError
from llmjax.inference.generate import (
    Method,
    check_model,
    check_prompts,
    continue_prompts,
    encode_dialogues,
    encode_prompts,
)
from llmjax.inference.text_batches import group_by_length, read_objects
from llmjax.parallel import hosts
from llmjax.run import config as run_config
from llmjax.run.loading import Loaded

logger = logging.getLogger(__name__)

_BATCHES_PER_WRITE = 8  # prompts of different lengths, of which batches of similar lengths are made


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptJob:
    """A file of prompts to complete.

    prompts     JSON lines, one object a line: a text in the field `prompt`, or with a template a list in `messages`
    output      JSON lines: the prompt and one `completion` a line, `samples` lines a prompt
    method      how completions are found
    samples     completions of each prompt
    batch_size  prompts that are computed at a time
    template    with which messages, and prompts as a user's turn, become text; None: prompts are text
    system      the system message before each dialogue; None: none
    """

    prompts: Path
    output: Path
    method: Method
    samples: int = 1
    batch_size: int = 16
    template: ChatTemplate | None = None
    system: str | None = None


def complete_file(loaded: Loaded, job: PromptJob) -> tuple[int, int]:
    """Write the completions that the output lacks; returns (lines that it had, lines that it has now).

    A completion does not depend on the other prompts, nor on where the work was interrupted. OUTPUT.settings.json holds
    all that it depends on: UserError if the output was made otherwise, and for a line that is no prompt, before
    anything is computed. Runs on the mesh of `use_mesh`. A collective: all processes call it, and process 0 writes.
    """
    check_model(loaded.config.model, job.method)
    prompts = _read_prompts(job)
    tokens = _encode(loaded, job, prompts)
    before = _prepare_output(job, _describe_settings(loaded, job))
    done, skip = divmod(before, job.samples)
    total = len(prompts) * job.samples
    if before > total:
        raise UserError(f"--output={job.output}: has {before} lines, more than its prompts need ({total})")
    if before:
        logger.info("%s: %d of %d completions are there", job.output, before, total)
    file = atomic.AppendFile(job.output) if hosts.is_primary() else None
    step = _BATCHES_PER_WRITE * job.batch_size
    for start in range(done, len(prompts), step):
        window = range(start, min(start + step, len(prompts)))
        texts = dict(_complete_window(loaded, job, tokens, window))
        records = [prompts[number][1] | {"completion": text} for number in window for text in texts[number]]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records][skip if start == done else 0 :]
        if file is not None:
            file.write("".join(lines).encode())
            file.sync()
        logger.info("%s: %d of %d completions", job.output, window.stop * job.samples, total)
    if file is not None:
        file.close()
    return before, total


def _complete_window(
    loaded: Loaded, job: PromptJob, tokens: list[np.ndarray], window: range
) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of a prompt, its completions). The shape of a prompt's batch depends on its own length alone."""
    for part, count, length in group_by_length([len(tokens[number]) for number in window], rows=job.batch_size):
        numbers = [window[index] for index in part]
        texts = continue_prompts(
            loaded,
            [tokens[number] for number in numbers],
            job.method,
            samples=job.samples,
            numbers=numbers,
            shape=(count, length),
            template=job.template,
        )
        for index, number in enumerate(numbers):
            yield number, texts[index * job.samples : (index + 1) * job.samples]


def _read_prompts(job: PromptJob) -> list[tuple[int, dict[str, Any]]]:
    """(number of the line, {"prompt": text} or {"messages": [...]}) of each prompt."""
    prompts = []
    for number, record in read_objects(job.prompts, "--prompts"):
        field = "messages" if job.template is not None and "messages" in record else "prompt"
        value = record.get(field)
        if field == "prompt" and not isinstance(value, str):
            hint = "" if job.template else "; `messages` need --chat" if "messages" in record else ""
            raise UserError(f"{job.prompts}, line {number}: has no text in the field 'prompt'{hint}")
        if field == "messages":
            _check_messages(value, f"{job.prompts}, line {number}", job.system)
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{job.prompts}, line {number}: {field} contains half of a surrogate pair") from None
        prompts.append((number, {field: value}))
    return prompts


def _check_messages(messages: Any, where: str, system: str | None) -> None:
    is_message = lambda message: isinstance(message, dict) and isinstance(message.get("role"), str)
    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise UserError(f'{where}: messages must be a list of objects such as {{"role": "user", "content": "..."}}')
    if system is not None and messages[0]["role"] == "system":
        raise UserError(f"{where}: messages has a system message of its own; leave --system out")


def _encode(loaded: Loaded, job: PromptJob, prompts: list[tuple[int, dict[str, Any]]]) -> list[np.ndarray]:
    """Token ids of each prompt. UserError names the line of one that the model cannot continue."""
    tokens = []
    for number, record in prompts:
        try:
            if job.template is None:
                ids = encode_prompts(loaded, [record["prompt"]])[0]
            else:
                system = [] if job.system is None else [{"role": "system", "content": job.system}]
                messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
                ids = encode_dialogues(loaded, [[*system, *messages]], job.template)[0]
            check_prompts(loaded.config.model, [ids], job.method)
        except UserError as error:
            raise UserError(f"{job.prompts}, line {number}: {error}") from None
        tokens.append(ids)
    return tokens


def _describe_settings(loaded: Loaded, job: PromptJob) -> dict[str, Any]:
    """All that decides the completions."""
    content = hashlib.sha256(job.prompts.read_bytes()).hexdigest()
    hosts.all_equal(f"--prompts={job.prompts}", content)
    template = job.template and hashlib.sha256(job.template.source.encode()).hexdigest()
    return {
        "prompts_sha256": content,
        "step": loaded.step,
        "parameters": loaded.fingerprint,
        "model": run_config.to_json(loaded.config)["model"],
        "prompt_form": loaded.config.objective.prompt_form,
        "chat_template_sha256": template,
        "system": job.system,
        "n": job.samples,
        "batch_size": job.batch_size,
        "method": type(job.method).__name__,
        **dataclasses.asdict(job.method),
    }


def _prepare_output(job: PromptJob, settings: dict[str, Any]) -> int:
    """The number of whole lines of the output, of which part of another line is cut off.

    Process 0 looks; all processes return its answer, or raise its error.
    """
    problem, lines = "", 0
    if hosts.is_primary():
        try:
            lines = _open_output(job.output, settings)
        except UserError as error:
            problem = str(error)
    answer = json.loads(hosts.broadcast("output", json.dumps([problem, lines])))
    if answer[0]:
        raise UserError(answer[0])
    return answer[1]


def _open_output(output: Path, settings: dict[str, Any]) -> int:
    record = output.with_name(f"{output.name}.settings.json")
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.parent}; create it")
    if record.exists():
        for field, old, new in differences(json.loads(record.read_bytes()), settings):
            raise UserError(
                f"--output={output}: was made with {field}={old!r}, not {new!r} ({record.name}); give the same "
                "settings to continue it, or a new file"
            )
    elif output.exists():
        raise UserError(f"--output={output}: already exists, without {record.name}; give a new file")
    else:
        atomic.write_bytes(record, (json.dumps(settings, indent=2) + "\n").encode())
    if not output.exists():
        return 0
    data = output.read_bytes()
    os.truncate(output, data.rfind(b"\n") + 1)  # a killed run may have written part of a line
    return data.count(b"\n")
