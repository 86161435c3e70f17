"""`llmjax chat`: talk to a chat model in the terminal."""

import logging
import sys
from typing import TYPE_CHECKING

from llmjax.cli.flags import Parser, int_range, make_parser, parse, parse_workdir
from llmjax.cli.generate import add_sampling_flags, sampling_from_flags
from llmjax.errors import UserError

if TYPE_CHECKING:
    from llmjax.serve.dialogue import Dialogue

logger = logging.getLogger(__name__)


def chat(arguments: list[str]) -> int:
    """Answer each line of stdin, with the lines and answers before it as context."""
    flags, overrides = parse(_make_parser(), arguments)
    from llmjax.run import loading

    workdir = parse_workdir(flags.workdir)
    loading.initialize(workdir, overrides)
    from llmjax.serve import engine as engines
    from llmjax.serve.dialogue import Dialogue

    sampling = sampling_from_flags(flags)
    with loading.load(workdir, step=flags.step, overrides=overrides) as loaded:
        template = loading.load_chat_template(workdir, loaded)
        engine = engines.make_engine(loaded, slots=1, context=flags.context, waiting=0, template=template)
        dialogue = Dialogue(engine, loaded.tokenizer, template, sampling, system=flags.system)
        dialogue.check()
        logger.info("step %d (%s), %d tokens of context", loaded.step, loaded.params_name, engine.context)
        logger.info("/reset forgets what was said, /exit or Ctrl-D ends the chat")
        while (line := _read_line()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                dialogue.reset()
                logger.info("(a new chat)")
            elif line.strip():
                _answer(dialogue, line)
    return 0


def _make_parser() -> Parser:
    parser = make_parser(
        "chat",
        """\
        Talk to a chat model: each line of stdin is a user's turn, and the answer is printed on stdout while it is
        generated. The model reads all turns through its chat template. /reset forgets them, /exit or Ctrl-D ends the
        chat. Where the turns and --max_tokens new tokens exceed --context, the oldest pairs of a question and its
        answer are dropped, which the chat says; a line that is too long by itself is refused.""",
        "llmjax chat --workdir=runs/imported --system='Answer briefly.'",
    )
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="a run with a chat template, as `llmjax import` writes it")
    add("--system", metavar="TEXT", help="the system message before the first turn")
    add("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    add("--context", type=int_range(1, 2**30), help="tokens of the chat at most (default 2048, or learned positions)")
    add_sampling_flags(parser, max_tokens=512)
    return parser


def _read_line() -> str | None:
    """The next line; None at the end of stdin."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        import readline  # noqa: F401  # lets `input` edit the line
    try:
        return input("> " if is_terminal else "")
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise UserError("stdin contains bytes that are not UTF-8; give UTF-8") from None


def _answer(dialogue: "Dialogue", line: str) -> None:
    try:
        dropped = dialogue.ask(line)
    except UserError as error:
        logger.info("(refused: %s)", error)
        return
    if dropped:
        logger.info("(the context is full: the oldest %d messages are dropped)", dropped)
    reason = dialogue.answer(lambda text: print(text, end="", flush=True))
    print(flush=True)
    if reason == "length":
        logger.info("(ended after --max_tokens new tokens)")
