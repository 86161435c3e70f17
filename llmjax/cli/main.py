# PYTHON_ARGCOMPLETE_OK
"""Entry point: `llmjax COMMAND ...` runs a command and reports every bad input in one line with exit status 78."""

from collections.abc import Callable
import errno
import os
import signal
import sys
import traceback
import typing

import llmjax
from llmjax.atomic import NO_SPACE
from llmjax.cli.analyse import analyse
from llmjax.cli.card import card
from llmjax.cli.chat import chat
from llmjax.cli.compare import compare
from llmjax.cli.configs import configs
from llmjax.cli.curate import curate
from llmjax.cli.embed import embed
from llmjax.cli.evaluate import evaluate
from llmjax.cli.export import export
from llmjax.cli.fields import fields
from llmjax.cli.fill import fill
from llmjax.cli.generate import generate
from llmjax.cli.import_ import import_
from llmjax.cli.inspect import inspect
from llmjax.cli.logs import configure_logging, end_progress
from llmjax.cli.plan import plan
from llmjax.cli.platforms import skip_absent_tpu
from llmjax.cli.predict import predict
from llmjax.cli.prepare import prepare
from llmjax.cli.serve import serve
from llmjax.cli.size import size
from llmjax.cli.sweep import sweep
from llmjax.cli.train import train
from llmjax.cli.watch import watch
from llmjax.errors import HardwareError, UserError, suggest
from llmjax.parallel import interrupts

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "curate": curate,
    "prepare": prepare,
    "train": train,
    "watch": watch,
    "eval": evaluate,
    "analyse": analyse,
    "compare": compare,
    "card": card,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "fill": fill,
    "predict": predict,
    "embed": embed,
    "import": import_,
    "export": export,
    "inspect": inspect,
    "sweep": sweep,
    "size": size,
    "plan": plan,
    "fields": fields,
    "configs": configs,
}
BAD_INPUT, HARDWARE, HANG = 78, 77, 75
_RESULT_COMMANDS = ("generate", "chat", "fill", "plan")  # stdout has only their results
_ACCESS_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

OVERVIEW = """\
llmjax: pretrain language models, from a laptop to a pod

data
  llmjax curate    --config=NAME --workdir=DIR   raw text -> cleaned, deduplicated corpus with a data card
  llmjax prepare   --config=NAME --workdir=DIR   text -> tokenizer, token store, packing plan

train
  llmjax train     --config=NAME --workdir=DIR   prepares if needed, trains or resumes, evaluates, writes report.html
  llmjax watch     --workdir=DIR                 follows a run in the terminal: loss, speed, time left
  llmjax inspect   --workdir=DIR                 checkpoints, their fingerprints, the config
  llmjax sweep     --config=NAME --workdir=DIR --over=FIELD=RANGE   many trials: the best values of config fields

evaluate
  llmjax eval      --workdir=DIR                 scores a checkpoint on a split or on tasks
  llmjax analyse   --workdir=DIR --task=NAME     what a run gets wrong on a task, why, and what to do next
  llmjax compare   RUN RUN...                    configs, scores with paired tests, costs, on one HTML page
  llmjax card      --workdir=DIR                 the model card (README.md) of a checkpoint
  llmjax generate  --workdir=DIR --prompt=TEXT   continues a prompt with a checkpoint
  llmjax chat      --workdir=DIR                 talks to a chat model in the terminal
  llmjax serve     --workdir=DIR                 the OpenAI API and a page to chat, on this machine
  llmjax fill      --workdir=DIR --text=TEXT     predicts the masked tokens of a text
  llmjax predict   --workdir=DIR --input=FILE --output=FILE   classes or numbers for the texts of a file
  llmjax embed     --workdir=DIR --input=FILE --output=FILE   one vector for each text

interop
  llmjax import    --from=DIR --workdir=DIR      a Hugging Face checkpoint on disk -> a workdir
  llmjax export    --workdir=DIR --to=DIR        a checkpoint -> a folder that transformers loads

tools
  llmjax size      --flops=1e21 | --config=NAME  model size for a budget; parameters and FLOPs of a model
  llmjax plan      --config=NAME --topology=v6e:16x16   memory, FLOPs, traffic and time of a step, compiled ahead
  llmjax fields    [SECTION]                     every config field, its meaning and its default
  llmjax configs   [NAME]                        the configs that ship with llmjax, and their sizes

Every config field can be set on the command line: --config.train.steps=500
--config takes a name that `llmjax configs` lists, or a Python file. `llmjax COMMAND --help` explains a command.
To begin: llmjax train --config=quickstart --workdir=runs/quickstart
Completion in bash and zsh: eval "$(register-python-argcomplete llmjax)"
"""


def main() -> typing.NoReturn:
    """Run a command and exit.

    Exit statuses: 0 success, 75 hang, 76 diverged, 77 hardware suspected, 78 bad input (no restart helps), 85 saved and
    stopped on request, 129, 130 or 143 stopped by SIGHUP, Ctrl-C or SIGTERM, 141 the output was closed, any other a
    crash.
    """
    reason = ""
    try:
        interrupts.install()
        skip_absent_tpu()
        status = run(sys.argv[1:])
    except UserError as error:
        reason = str(error)
        status = _fail(reason)
    except (HardwareError, TimeoutError) as error:
        reason = str(error)
        status = _fail(reason, HARDWARE if isinstance(error, HardwareError) else HANG)
    except BrokenPipeError:  # as in `llmjax inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except KeyboardInterrupt as error:
        interrupts.exit_now(error if isinstance(error, interrupts.Stopped) else interrupts.Stopped(signal.SIGINT))
    except Exception as error:
        if reason := _hint_for(error):
            status = _fail(reason)
        else:
            reason = traceback.format_exception_only(error)[-1]
            traceback.print_exc()
            status = 1
    _exit(status, reason)


def _hint_for(error: Exception) -> str:
    """One line for an error of the system or of the device's memory that the user can fix; '' for any other error."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"out of memory ({str(error).partition(chr(10))[0][:200]}): lower train.global_batch, data.seq_len or the "
            "size of the model, raise train.accumulation, or use more devices"
        )
    if "No such compile option" in str(error) or "While setting option" in str(error):
        return (
            f"xla.flags: {str(error).partition(chr(10))[0]}; remove it, or write the value as the compiler expects it"
        )
    if isinstance(error, ImportError) and "gcsfs" in str(error):
        return "a path on gs:// needs the package gcsfs: run `pip install 'llmjax[gcs]'`"
    if not isinstance(error, OSError):
        return ""
    if error.errno in NO_SPACE:
        return f"no space left{f' for {error.filename}' if error.filename else ''}: free some and rerun the command"
    if error.errno in (errno.EISDIR, errno.ENOTEMPTY) and error.filename:
        return f"{error.filename}: is a folder where a file is expected; remove it or rename it"
    if error.errno in _ACCESS_ERRORS and error.filename:
        return f"{error.filename}: {os.strerror(error.errno).lower()}; make it accessible, or give another path"
    return ""


def _fail(message: str, status: int = BAD_INPUT) -> int:
    end_progress()
    print(f"llmjax: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _exit(status: int, reason: str) -> typing.NoReturn:
    """Exit. A failed process of a job says why to the others, and does not wait for them in JAX's shutdown barrier."""
    if status and "jax" in sys.modules:
        import jax

        from llmjax.parallel import hosts

        if jax.distributed.is_initialized():
            if reason and "llmjax.parallel.watchdog" in sys.modules:  # the others watch: training
                from llmjax.parallel import watchdog

                watchdog.announce_failure(status, reason)
            # Without a reason, as after SIGTERM, all processes end with this status.
            hosts.exit_now(status, hosts.END_SECONDS if reason else hosts.STOP_SECONDS)
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command line (without the program's name) and return its exit status."""
    if "_ARGCOMPLETE" in os.environ:  # a shell requests completions of COMP_LINE
        from llmjax.cli import completion

        completion.complete(COMMANDS)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0
    if arguments[0] == "--version":
        print(f"llmjax {llmjax.__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{suggest(command, COMMANDS)}: choose one of {', '.join(COMMANDS)}")
    configure_logging("stderr" if command in _RESULT_COMMANDS else "stdout")
    return COMMANDS[command](rest)
