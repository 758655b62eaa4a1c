"""What the browser's monitor asks ComfyUI's server: runs, their events, logs and samples, and commands to them.

Only folders that are listed in the folder of runs are served, and of them only the files named here.
"""

import asyncio
import codecs
import json
import re
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from ..training.run_dir import COMMANDS, RunFolder
from . import runs
from .watch import is_alive, read_events, status_of

EVENT = "pixart.run"  # over the websocket: {"id", "state"}; to the page that asked for the run {"node", "name"} too
SAMPLE = re.compile(r"step-\d{6,9}_\d{1,4}\.png")
LOG_BYTES = 1 << 20  # of one answer
RUN = "/pixart/runs/{id}"


def register(routes: web.RouteTableDef, root):
    """Adds the routes to ComfyUI's table; root() is the folder of runs at the time of asking."""
    routes.get("/pixart/runs")(answer(root, list_runs))
    for path, handler in (("", details), ("/events", events), ("/log", log), ("/samples/{file}", sample)):
        routes.get(RUN + path)(answer(root, handler))
    routes.post(f"{RUN}/commands")(answer(root, command))


def answer(root, handler):
    """A route's function: finds the run, and turns Refused into its answer."""

    async def respond(request: web.Request) -> web.StreamResponse:
        try:
            run = root()
            if "id" in request.match_info:
                run = await asyncio.to_thread(runs.known_run, run, request.match_info["id"])
                if run is None:
                    raise Refused(404, "There is no such run.")
            return await handler(request, run)
        except Refused as refused:
            return web.json_response({"error": str(refused)}, status=refused.status)

    return respond


class Refused(Exception):
    """A sentence for the user, and the HTTP status that goes with it."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def within(run: Path, name: str) -> Path:
    """A file of the run. Raises Refused for one that a link leads out of it."""
    path = run / name
    if path.resolve().parent != run.resolve() / Path(name).parent:
        raise Refused(404, "There is no such file.")
    return path


def number(request: web.Request, name: str) -> int:
    text = request.query.get(name, "0")
    if not re.fullmatch(r"-?\d{1,15}", text, re.ASCII):
        raise Refused(400, f"{name} must be a whole number.")
    return int(text)


async def list_runs(request, root: Path):
    found = await asyncio.to_thread(lambda: [runs.summary(run) for run in runs.run_folders(root)])
    return web.json_response({"runs": found})


async def details(request, run: Path):
    return web.json_response(await asyncio.to_thread(runs.details, run))


async def events(request, run: Path):
    offset, points = number(request, "offset"), number(request, "points")
    within(run, "events.jsonl")

    def text() -> str:  # of a long run, that takes longer than the server may stand still
        found, start, end = read_events(run, offset, points)
        return json.dumps({"events": found, "start": start, "offset": end})

    return web.json_response(text=await asyncio.to_thread(text))


async def log(request, run: Path):
    text, offset = await asyncio.to_thread(read_log, within(run, "log.txt"), number(request, "offset"))
    return web.json_response({"text": text, "offset": offset})


def read_log(path: Path, offset: int) -> tuple[str, int]:
    """(text, offset behind it) from a byte offset, or the last -offset bytes."""
    if not path.is_file():
        return "", 0
    size = path.stat().st_size
    start = min(size, offset) if offset >= 0 else max(0, size + offset)
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(LOG_BYTES)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    return text, start + len(data) - len(decoder.getstate()[0])  # a character that is cut waits


async def sample(request, run: Path):
    name = request.match_info["file"]
    path = within(run, f"samples/{name}") if SAMPLE.fullmatch(name) else None
    if path is None or not path.is_file():
        raise Refused(404, "There is no such sample.")
    return web.FileResponse(path, headers={"Content-Type": "image/png", "Cache-Control": "no-cache"})


async def command(request, run: Path):
    if not same_origin(request) or request.content_type != "application/json":
        raise Refused(403, "Commands are taken from ComfyUI's own page, as JSON.")
    try:
        content = await request.json()
    except (ValueError, LookupError, RecursionError):  # no JSON, an unknown charset, too deep
        content = None
    word = content.get("command") if isinstance(content, dict) else None
    if word not in COMMANDS:
        raise Refused(400, f"There is no command {word!r}; there are {', '.join(COMMANDS)}.")
    return await asyncio.to_thread(send, RunFolder(run), word)


def send(folder: RunFolder, word: str):
    if not is_alive(status_of(folder.path)):
        raise Refused(409, "This run is not running.")
    try:
        return web.json_response({"queued": folder.send(word).stem}, status=202)
    except OSError as error:
        raise Refused(507, f"The command cannot be written to {folder.commands}: {error.strerror or error}.") from error


def same_origin(request: web.Request) -> bool:
    """Whether no other site's page sent this. Browsers say Sec-Fetch-Site, over plain HTTP in a network Origin."""
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("Origin")
    return origin is None or urlsplit(origin).netloc == request.host
