"""`llmjax serve`: try a model through the OpenAI API, or on a web page."""

import importlib.util
import logging
import os
from typing import TYPE_CHECKING

from llmjax.cli.flags import Parser, int_range, make_parser, parse, parse_workdir
from llmjax.errors import UserError
from llmjax.parallel import interrupts

if TYPE_CHECKING:
    import socket

    from llmjax.serve.app import Service

logger = logging.getLogger(__name__)

_KEY = "LLMJAX_API_KEY"
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def serve(arguments: list[str]) -> int:
    """Serve a checkpoint until a signal."""
    flags, overrides = parse(_make_parser(), arguments)
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise UserError(f"llmjax serve needs {' and '.join(missing)}: run `pip install 'llmjax[serve]'`")
    if (key := os.environ.get(_KEY)) == "":
        raise UserError(f"{_KEY}='': the key is empty; set it to the key that clients must send, or unset it")
    from llmjax.run import loading

    workdir = parse_workdir(flags.workdir)
    loading.initialize(workdir, overrides)
    from llmjax.inference import embed
    from llmjax.serve import engine as engines, http_server
    from llmjax.serve.app import Service
    from llmjax.serve.embedder import Embedder

    engines.check_processes()
    listener = http_server.listen(flags.host, flags.port, has_key=key is not None)
    with loading.load(workdir, step=flags.step, overrides=overrides) as loaded:
        template, model, engine = loading.find_chat_template(workdir, loaded), loaded.config.model, None
        if engines.continues_text(model):
            engine = engines.make_engine(
                loaded, slots=flags.slots, context=flags.context, waiting=flags.waiting, template=template
            )
        embedder = Embedder(
            loaded.graph,
            loaded.params,
            model,
            loaded.tokenizer,
            embed.choose(workdir, loaded.config.objective),
            context=flags.context or engines.default_context(model),
            waiting=flags.waiting,
        )
        service = Service(
            name=workdir.resolve().name or "llmjax",
            engine=engine,
            embedder=embedder,
            tokenizer=loaded.tokenizer,
            objective=loaded.objective,
            template=template,
        )
        logger.info("step %d (%s)", loaded.step, loaded.params_name)
        try:
            _run(service, flags.host, listener, key)
        except interrupts.Stopped as stopped:
            logger.info("stopped by signal %d", stopped.number)
    return 0


def _run(service: "Service", host: str, listener: "socket.socket", key: str | None) -> None:
    from llmjax.serve import http_server
    from llmjax.serve.app import make_app
    from llmjax.serve.loop import Loop

    hosts = _LOOPBACK_NAMES | {host.lower()} if key is None else None
    app = make_app(service, key=key, hosts=hosts)
    if service.engine is not None:
        service.engine.warm_up()
    name = f"[{host}]" if ":" in host else host
    logger.info(
        "serving %s at http://%s:%d: %s, %s",
        service.name,
        name,
        listener.getsockname()[1],
        _describe(service),
        f"key {_KEY}" if key else "no key",
    )
    http_server.run(app, Loop([part for part in (service.engine, service.embedder) if part is not None]), listener)


def _describe(service: "Service") -> str:
    if service.engine is None:
        return f"embeddings alone, {service.embedder.limit} tokens at most"
    return (
        f"{service.engine.num_slots} texts at a time, {service.engine.context} tokens each, "
        f"{'with' if service.template else 'without'} a chat template"
    )


def _make_parser() -> Parser:
    parser = make_parser(
        "serve",
        f"""\
        Try a model through the OpenAI API: /v1/completions, /v1/chat/completions (where the model has a chat template),
        /v1/embeddings (as llmjax embed computes them) and /v1/models, and a page to chat at /. Several requests share
        one decode step. An encoder is served for its embeddings alone. Other machines can use it only with --host and
        {_KEY}, the key that clients must send. To serve many users, export the model and use a serving
        engine.""",
        "llmjax serve --workdir=runs/imported --port=8000",
    )
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="a run")
    add("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine alone)")
    add("--port", type=int_range(0, 65535), default=8000, help="port; 0: a free one (default 8000)")
    add("--slots", type=int_range(1, 1024), default=8, help="texts that are generated at a time (default 8)")
    add(
        "--context",
        type=int_range(1, 2**30),
        help="tokens of a prompt and its continuation, or of a text to embed (default 2048, or learned positions)",
    )
    add(
        "--waiting",
        type=int_range(0, 2**20),
        default=64,
        help="texts that may wait, and requests to embed (default 64)",
    )
    return parser
