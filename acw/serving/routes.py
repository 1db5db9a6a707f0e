"""The service over HTTP, as a FastAPI application: predictions, what the model is, and the page."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from acw.model.model import Model
from acw.model.prediction import Prediction
from acw.serving import answers, limits
from acw.storage.errors import UserError

# Without a token, only who asks this machine by these names is answered: a page that a browser shows could otherwise
# have a name of its own lead here.
OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "category": {"type": "string"},
                    },
                }
            },
        },
    }
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The image is empty, damaged or unusable, or the category is unknown"},
    401: {"description": "The token is missing or wrong"},
    406: {"description": "No answer can be made of the type that is accepted"},
    408: {"description": "Too slow to arrive or to be answered"},
    413: {"description": "Too many bytes or pixels"},
    415: {"description": "Not of an image format that is read"},
    503: {"description": "As many requests wait as may"},
}
PREDICTED: dict[int | str, dict[str, Any]] = {
    200: {
        "model": answers.Answer,
        "description": "Where people look in the image; by Accept as JSON, overlay, contours or log-density (float32)",
        "content": {name: {"schema": {"type": "string", "format": "binary"}} for name in answers.FILES},
    }
}

Batched = Callable[[np.ndarray, str | None], Awaitable[Prediction]]
T = TypeVar("T")


def application(model: Model, batched: Batched, token_sha256: str | None, threads: int) -> FastAPI:
    """batched: predicts one image (H, W, 3) of a category. token_sha256: in hexadecimal, of what callers must know.
    threads: for reading images and making answers of predictions."""
    # FastAPI's /docs loads its script from elsewhere: /openapi.json has all of it.
    app = FastAPI(title="acw", summary="Where people look in an image", docs_url=None, redoc_url=None)
    queue, pool = limits.Queue(), ThreadPoolExecutor(threads)

    def authorised(request: Request) -> None:
        if token_sha256 is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(digest(given), token_sha256):
            line = "the token is missing or wrong; send the header 'Authorization: Bearer TOKEN'"
            raise HTTPException(401, line, {"WWW-Authenticate": "Bearer"})

    def in_thread(function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(pool, partial(function, *arguments))

    async def answer(content: bytes, category: str | None, media_type: str) -> bytes:
        name, pixels = await in_thread(limits.checked, content)
        async with queue.room(pixels):
            image = await in_thread(limits.decoded, content, name)
            return await in_thread(answers.encoded, await batched(image, category), category, media_type)

    @app.post("/predict", dependencies=[Depends(authorised)], responses=PREDICTED | REFUSALS, openapi_extra=UPLOAD)
    async def predict(request: Request, category: str | None = None) -> Response:
        """Where people look in an image, which is the body or a file of a form; `category`, of the query or the form,
        is inferred where it is not given."""
        with queue.admitted():
            content = await limits.body(request)
            if (media_type := answers.wanted(request.headers.get("accept", "*/*"))) is None:
                raise HTTPException(406, f"answers are {', '.join(answers.MEDIA_TYPES)}; accept one of them")
            if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
                content, field = await _file_of_form(request, content)
                category = field if category is None else category
            if category is not None:
                _known(model, category)
            try:
                async with asyncio.timeout(limits.SECONDS_TO_ANSWER):
                    made = await answer(content, category or None, media_type)
            except TimeoutError:
                line = f"the answer took more than {limits.SECONDS_TO_ANSWER:.0f} seconds; send a smaller image"
                raise HTTPException(408, line) from None
        return Response(made, media_type=media_type)

    @app.get("/models", dependencies=[Depends(authorised)], responses={401: REFUSALS[401]})
    def models() -> dict[str, Any]:
        """The model that predicts, and what may be sent to it."""
        most = {"bytes": limits.MOST_BYTES, "pixels": limits.MOST_PIXELS, "formats": limits.FORMATS}
        return {"models": [about(model)], "limits": most}

    @app.get("/healthz")
    def healthz() -> dict[str, Any]:
        """Answers once the model is loaded. requests: how many this replica is working on."""
        return {"status": "ok", "requests": queue.requests}

    _add_page(app)
    _add_errors(app)

    @app.middleware("http")
    async def guarded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        host = request.headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if token_sha256 is None and name not in OWN_NAMES:
            line = "a service without a token answers only who asks it by 127.0.0.1 or localhost; start it with --token"
            return JSONResponse({"detail": line}, 403)
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    return app


def digest(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def about(model: Model) -> dict[str, Any]:
    """What a model says of itself, without where it lies."""
    recipe, data = (model.provenance.get(key) or {} for key in ("recipe", "dataset"))
    return {
        "recipe": recipe.get("name", ""),
        "dataset": data.get("name", ""),
        "categories": model.categories,
        "views": model.names,
    }


def _known(model: Model, category: str) -> None:
    if category not in ("", *model.categories):
        known = ", ".join(model.categories)
        raise HTTPException(400, f"unknown category '{category[:80]}'; the model knows {known}, or none")


async def _file_of_form(request: Request, content: bytes) -> tuple[bytes, str | None]:
    """The file in a form, and its field `category`; `content` is all of the form, which `body` has read."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    try:
        async with Request(request.scope, receive).form(max_files=1, max_fields=8) as form:
            category = form.get("category")
            for value in form.values():
                if not isinstance(value, str):
                    return await value.read(), category if isinstance(category, str) else None
    except AnyHTTPException as error:
        raise HTTPException(400, f"the form cannot be read ({error.detail.rstrip('.')}); send it anew") from None
    raise HTTPException(400, "the form has no file; send the image as its field 'image'")


def _add_page(app: FastAPI) -> None:
    own = files("acw.serving") / "page"
    page = (own / "page.html").read_text(encoding="utf-8")
    for word, value in answers.look().items():
        page = page.replace(word, value)
    # The report's look, and what only this page has.
    style = [(place).read_text(encoding="utf-8") for place in (files("acw.report") / "page.css", own / "page.css")]
    contents = {
        "/": ("text/html", page),
        "/page.css": ("text/css", "".join(style)),
        "/page.js": ("text/javascript", (own / "page.js").read_text(encoding="utf-8")),
    }
    for path, (media_type, content) in contents.items():
        app.get(path, include_in_schema=False)(_constant(content, media_type))


def _constant(content: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def contents() -> Response:
        return Response(content, media_type=media_type)

    return contents


def _add_errors(app: FastAPI) -> None:
    """One sentence, whatever was wrong."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)
