"""The HTTP interface: completions, chat completions and embeddings of the OpenAI API, and a page to chat."""

from collections.abc import Sequence
import dataclasses
import importlib.resources
import time
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from llmjax.data.chat_template import ChatTemplate, Message
from llmjax.data.objectives.objective import Objective
from llmjax.data.objectives.prompts import encode_prompt
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.inference.generate import Tokens
from llmjax.serve.embedder import Embedder
from llmjax.serve.engine import Engine, QueueFullError
from llmjax.serve.gate import Gate
from llmjax.serve.generation import Texts
from llmjax.serve.protocol import ChatCompletion, Completion, EmbeddingRequest, Generation
from llmjax.serve.responses import Envelope, EventStream, VectorList, compute_vectors, error_response, whole_response

_PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


class UnknownModelError(ValueError):
    """A client names a model that is not served."""


@dataclasses.dataclass(frozen=True)
class Service:
    """A model to serve.

    name      what clients call it
    engine    None: the model does not continue texts, and only embeds them
    template  None: the model has no chat template
    """

    name: str
    engine: Engine | None
    embedder: Embedder
    tokenizer: Tokenizer
    objective: Objective
    template: ChatTemplate | None


def make_app(service: Service, *, key: str | None = None, hosts: frozenset[str] | None = None) -> fastapi.FastAPI:
    """The application; `key` and `hosts` as in Gate."""
    app = fastapi.FastAPI(openapi_url=None)  # its pages would load scripts from elsewhere
    app.add_middleware(Gate, key=key, hosts=hosts)
    page = importlib.resources.files("llmjax.serve").joinpath("page.html").read_text()
    created = int(time.time())

    @app.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        model = {"id": service.name, "object": "model", "created": created, "owned_by": "llmjax"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions")
    async def complete(body: Completion, request: fastapi.Request) -> Response:
        engine = _require_engine(service, body.model)
        _check_count(engine, len(body.prompts), body.n)  # before a body of many prompts is encoded
        prompts = [_encode(prompt, service) for prompt in body.prompts]
        return await _generate(service, engine, request, body, prompts, body.max_tokens, is_chat=False)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatCompletion, request: fastapi.Request) -> Response:
        engine = _require_engine(service, body.model)
        if service.template is None:
            raise UserError(f"the model {service.name!r} has no chat template; use /v1/completions")
        _check_count(engine, 1, body.n)
        messages: list[Message] = [{"role": message.role, "content": message.text} for message in body.messages]
        prompt = service.template.encode(messages, service.tokenizer)
        max_tokens = body.max_completion_tokens or body.max_tokens or max(1, engine.context - len(prompt) + 1)
        return await _generate(service, engine, request, body, [prompt], max_tokens, is_chat=True)

    @app.post("/v1/embeddings")
    async def embed(body: EmbeddingRequest, request: fastapi.Request) -> Response:
        _check_name(service, body.model)
        rows = service.embedder.encode(body.inputs)
        vectors = await compute_vectors(request, service.embedder, rows)
        return VectorList(service.name, vectors, sum(map(len, rows)), is_base64=body.encoding_format == "base64")

    _add_error_handlers(app)
    return app


def _check_name(service: Service, name: str | None) -> None:
    """Raise UnknownModelError for the name of another model; without one, a client means the only one."""
    if name not in (None, service.name):
        raise UnknownModelError(f"model={name!r}: there is no such model; this server has {service.name!r}")


def _require_engine(service: Service, name: str | None) -> Engine:
    """What continues texts. Raises UserError for a model that does not, and UnknownModelError."""
    _check_name(service, name)
    if service.engine is None:
        raise UserError(f"the model {service.name!r} embeds texts and does not continue them; use /v1/embeddings")
    return service.engine


def _check_count(engine: Engine, num_prompts: int, n: int) -> None:
    """Raise UserError for more texts than can run and wait."""
    count, places = num_prompts * n, engine.capacity
    if count > places:
        raise UserError(f"n={n}: these are {count} texts, and the server has places for {places}; ask for fewer")


def _encode(prompt: str | list[int], service: Service) -> Tokens:
    if isinstance(prompt, str):
        return service.objective.prompt(encode_prompt(service.tokenizer, prompt))
    # Python's integers may be too large for an array; the engine names the range.
    return prompt


async def _generate(
    service: Service,
    engine: Engine,
    request: fastapi.Request,
    body: Generation,
    prompts: Sequence[Tokens],
    max_tokens: int,
    *,
    is_chat: bool,
) -> Response:
    texts = Texts(engine, service.tokenizer, prompts, body.sampling(max_tokens), n=body.n)
    envelope = Envelope(service.name, is_chat=is_chat, is_stream=body.stream)
    if not body.stream:
        return await whole_response(request, texts, envelope)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(texts, envelope, include_usage=include_usage)


def _add_error_handlers(app: fastapi.FastAPI) -> None:
    """Every error has the form of the OpenAI API."""

    @app.exception_handler(UserError)
    async def bad_request(request: fastapi.Request, error: UserError) -> JSONResponse:
        return error_response(400, str(error))

    @app.exception_handler(UnknownModelError)
    async def unknown_model(request: fastapi.Request, error: UnknownModelError) -> JSONResponse:
        return error_response(404, str(error), param="model", code="model_not_found")

    @app.exception_handler(QueueFullError)
    async def busy(request: fastapi.Request, error: QueueFullError) -> JSONResponse:
        return error_response(503, str(error), code="queue_full")

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(400, f"the body is not JSON: {first['ctx']['error']}")
        field = ".".join(map(str, first["loc"][1:]))
        param = str(first["loc"][1]) if len(first["loc"]) > 1 else None
        return error_response(400, f"{field or 'the body'}: {first['msg']}", param=param)

    @app.exception_handler(HTTPException)
    async def other(request: fastapi.Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
