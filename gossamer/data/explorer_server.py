"""Serves a gallery to a browser on the same machine.

What can be asked for is numbered (views, trees, nodes, rows); no part of an address is ever a path,
so nothing outside of the images can be read. Answers are JSON, plain numbers or freshly encoded
PNG; pages may load nothing from elsewhere and run no script but ours; and a request under another
host name than the server's own is refused, so that a page of another site cannot reach it by a
name that it points here (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.core.errors import InputError, MissingExtra
from gossamer.data.gallery import Gallery
from gossamer.data.selection import Selection, write_selection

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

ASSETS = {
    "index.html": "text/html; charset=utf-8",
    "explorer.js": "text/javascript; charset=utf-8",
    "treemap.js": "text/javascript; charset=utf-8",
    "explorer.css": "text/css; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
BODY_LIMIT = 1 << 24
"""Bytes of a selection that is sent to be exported, at most."""


def asset(name: str) -> bytes:
    """A file of the viewer, by its name in :data:`ASSETS`."""
    return (resources.files("gossamer.data") / "explorer" / name).read_bytes()


def selection_of(gallery: Gallery, ranges: Any) -> Selection:
    """The selection of some ranges of rows.

    Args:
        gallery: whose rows they are.
        ranges: ``[[start, stop], ...]``, ascending, without overlap.

    Raises:
        InputError: if they are no such ranges or hold nothing.
    """
    count = len(gallery.collection)
    try:
        pairs = [(int(start), int(stop)) for start, stop in ranges]
    except (TypeError, ValueError) as error:
        raise InputError("a selection is a list of [start, stop]") from error
    edges = [edge for pair in pairs for edge in pair]
    if not edges or edges != sorted(edges) or edges[0] < 0 or edges[-1] > count:
        raise InputError(f"the selection is empty or not within the {count} images")
    kept = np.concatenate([np.arange(start, stop) for start, stop in pairs])
    labels = gallery.collection.labels
    classes = gallery.collection.classes
    return Selection(
        names=[name.encode("utf-8", "replace").decode() for name in gallery.collection.names],
        scores=np.full(count, np.nan),
        kept=kept,
        labels=None if labels is None else [classes[label] for label in labels],
        about={"method": "explorer", "data": gallery.collection.name},
    )


def application(gallery: Gallery, hosts: tuple[str, ...] = ()) -> Starlette:
    """The web application of a gallery.

    Args:
        gallery: what is shown.
        hosts: host names under which it may be asked, beside those of the loopback.

    Raises:
        MissingExtra: if starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtra("starlette", "serve") from error

    allowed = {"localhost", "127.0.0.1", "[::1]", *hosts}
    binary = "application/octet-stream"

    def secured(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    def guarded(
        answer: Callable[[Request], Response | Awaitable[Response]], *, blocking: bool = True
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            host = re.sub(r":\d+$", "", request.headers.get("host", ""))
            if host not in allowed:
                return secured(Response("this host name is not served", 421))
            try:
                found = await run_in_threadpool(answer, request) if blocking else answer(request)
                response = found if isinstance(found, Response) else await found
            except InputError as error:
                response = JSONResponse({"error": str(error)}, 404)
            return secured(response)

        return endpoint

    def page(request: Request) -> Response:
        name = request.path_params.get("name") or "index.html"
        if name not in ASSETS:
            raise InputError("there is no such page")
        return Response(asset(name), headers={"Content-Type": ASSETS[name]})

    def number(request: Request, name: str) -> int:
        text = str(request.path_params[name])
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
            raise InputError(f"{name} is a number")
        return int(text)

    def rows(request: Request) -> list[int]:
        text = request.query_params.get("rows", "")
        if not re.fullmatch(r"\d{1,9}(,\d{1,9}){0,255}", text, re.ASCII):
            raise InputError("rows are up to 256 numbers with commas between them")
        return [int(row) for row in text.split(",")]

    def sheet(request: Request) -> Response:
        return Response(gallery.sheet(rows(request)), media_type="image/png")

    async def export(request: Request) -> Response:
        if int(request.headers.get("content-length", "0") or 0) > BODY_LIMIT:
            raise InputError("the selection is too long")
        try:
            body = json.loads(await request.body())
            ranges = body["rows"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError("a selection is sent as JSON with rows") from error

        def write() -> bytes:
            with TemporaryDirectory() as folder:
                write_selection(Path(folder) / "selection.parquet", selection_of(gallery, ranges))
                return (Path(folder) / "selection.parquet").read_bytes()

        content = await run_in_threadpool(write)
        offered = {"Content-Disposition": 'attachment; filename="selection.parquet"'}
        return Response(content, headers=offered, media_type="application/vnd.apache.parquet")

    def parts(request: Request) -> tuple[str, str]:
        return request.path_params["view"], request.path_params["which"]

    def node(request: Request) -> Response:
        return JSONResponse(gallery.chunk(*parts(request), number(request, "node")))

    answers: Mapping[str, Callable[[Request], Response]] = {
        "/": page,
        "/data/meta.json": lambda request: JSONResponse(gallery.meta()),
        "/data/labels.bin": lambda request: Response(gallery.labels(), media_type=binary),
        "/data/sheet.png": sheet,
        "/data/names.json": lambda request: JSONResponse(gallery.names(rows(request))),
        "/data/search.json": lambda request: JSONResponse(
            gallery.search(request.query_params.get("text", "")[:200])
        ),
        "/data/image-{row}.png": lambda request: Response(
            gallery.enlarged(number(request, "row")), media_type="image/png"
        ),
        "/data/{view}/predictions.bin": lambda request: Response(
            gallery.predictions(request.path_params["view"]), media_type=binary
        ),
        "/data/{view}/info-{row}.json": lambda request: JSONResponse(
            gallery.info(request.path_params["view"], number(request, "row"))
        ),
        "/data/{view}/{which}/top.json": lambda request: JSONResponse(gallery.top(*parts(request))),
        "/data/{view}/{which}/order.bin": lambda request: Response(
            gallery.order(*parts(request)), media_type=binary
        ),
        "/data/{view}/{which}/node-{node}.json": node,
        "/{name}": page,
    }
    routes = [Route(path, guarded(answer)) for path, answer in answers.items()]
    routes.insert(0, Route("/data/export", guarded(export, blocking=False), methods=["POST"]))
    return Starlette(routes=routes)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    gallery: Gallery,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serves a gallery until it is interrupted.

    Args:
        gallery: what is shown.
        host: address to listen on; anything but the loopback shows the images to the network.
        port: 0 takes any that is free.
        ready: called with the address once it can be opened.

    Raises:
        InputError: if the port is taken or the address is not this machine's.
        MissingExtra: if starlette or uvicorn is not installed.
    """
    import socket

    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtra("uvicorn", "serve") from error
    if not 0 <= port <= 65535:
        raise InputError(f"a port is 0 to 65535, not {port}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host} port {port}: {(error.strerror or str(error)).lower()}; "
            "choose another --port or --host"
        ) from error
    port = listener.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    hosts: tuple[str, ...] = (name,)
    if host in ("0.0.0.0", "::"):
        hosts = (name, socket.gethostname(), *socket.gethostbyname_ex(socket.gethostname())[2])
        name = socket.gethostname()
    with listener:
        config = uvicorn.Config(application(gallery, hosts), log_level="warning")
        ready(f"http://{name}:{port}/")
        uvicorn.Server(config).run(sockets=[listener])
