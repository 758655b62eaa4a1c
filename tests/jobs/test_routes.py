"""The monitor's routes over real HTTP: what they give, what they refuse."""

import asyncio
import errno
import json
import os
import time

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

from pixart_nodes.jobs import routes, runs
from pixart_nodes.training.config import RunConfig

OUTPUT = {"name": "fox", "folder": "c"}
CONFIG = RunConfig.from_dict({"base": {"path": "a"}, "cache": "b", "output": OUTPUT, "steps": 9})
TRAVERSALS = ("..", "%2e%2e", "..%2f..", "%2e%2e%2fsecret", "..%5csecret", ".", "", "%00", "secret", "%2fetc",
              "fox%2f..%2f..%2fsecret")  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """The folder of runs, with a run.json beside it that must stay unseen."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "run.json").write_text('{"recipe": "secret"}')
    root = tmp_path / "pixart_runs"
    root.mkdir()
    return root


@pytest.fixture
def run(root):
    """A run that is alive as long as this process is."""
    folder = runs.create(root, CONFIG, node="4")
    folder.write_status(state="running", pid=os.getpid(), started=time.time(), step=2, steps=9)
    for number in (1, 2):
        folder.add_event("step", step=number, loss=1.0 / number)
    (folder.path / "log.txt").write_bytes("first\nsecond: ä\n".encode())
    folder.samples.mkdir()
    (folder.samples / "step-000000_0.png").write_bytes(b"\x89PNG")
    (folder.samples / "step-000000.safetensors").write_bytes(b"latents")
    return folder


@pytest.fixture
def ask(root):
    """ask(path, method="GET", **options of aiohttp) -> (status, JSON or bytes)."""

    async def request(path, method, options):
        table, app = web.RouteTableDef(), web.Application()
        routes.register(table, lambda: root)
        app.add_routes(table)
        async with TestClient(TestServer(app)) as client:
            url = URL(str(client.make_url("/")) + path.lstrip("/"), encoded=True)
            async with client.session.request(method, url, **options) as reply:
                body = await reply.read()
                return reply.status, json.loads(body) if "json" in reply.content_type else body

    return lambda path, method="GET", **options: asyncio.run(request(path, method, options))


def test_runs_are_listed_and_shown(ask, run):
    status, listed = ask("/pixart/runs")
    (entry,) = listed["runs"]
    assert status == 200 and entry["id"] == run.path.name and entry["alive"] and not entry["resumable"]
    assert (entry["name"], entry["recipe"], entry["last"]["step"]) == ("fox", "lora", 2)
    _, shown = ask(f"/pixart/runs/{run.path.name}")
    assert shown["config"]["steps"] == 9 and shown["last_checkpoint"] is None


def test_without_any_run_the_list_is_empty(ask):
    assert ask("/pixart/runs") == (200, {"runs": []})


def test_events_and_log_are_read_on_from_an_offset(ask, run):
    _, first = ask(f"/pixart/runs/{run.path.name}/events?offset=0&points=1")
    assert [event["step"] for event in first["events"]] == [2]
    run.add_event("end", state="done")
    _, more = ask(f"/pixart/runs/{run.path.name}/events?offset={first['offset']}")
    assert [event["type"] for event in more["events"]] == ["end"]
    _, log = ask(f"/pixart/runs/{run.path.name}/log?offset=-4")
    assert log == {"text": " ä\n", "offset": 17}
    _, log = ask(f"/pixart/runs/{run.path.name}/log?offset=6")
    assert log["text"] == "second: ä\n"
    assert ask(f"/pixart/runs/{run.path.name}/log?offset={log['offset']}")[1] == {"text": "", "offset": log["offset"]}


def test_a_character_that_is_half_written_waits(ask, run):
    (run.path / "log.txt").write_bytes("ab ä".encode()[:-1])
    assert ask(f"/pixart/runs/{run.path.name}/log")[1] == {"text": "ab ", "offset": 3}


def test_an_offset_behind_the_end_starts_the_events_anew_and_finds_no_log(ask, run):
    status, found = ask(f"/pixart/runs/{run.path.name}/events?offset={'9' * 15}")
    assert status == 200 and found["start"] == 0 and [event["step"] for event in found["events"]] == [1, 2]
    assert ask(f"/pixart/runs/{run.path.name}/log?offset={'9' * 15}")[1]["text"] == ""


def test_one_damaged_origin_does_not_hide_the_other_runs(ask, root, run):
    other = runs.create(root, CONFIG, created="yesterday")
    (other.path / "status.json").write_text("[]")
    assert len(ask("/pixart/runs")[1]["runs"]) == 2 and other.status() == {}


@pytest.mark.parametrize("body, kind", [
    (b'{"command": "stop"}', "application/json; charset=klingon"), (b"[" * 100_000, "application/json"),
    (b"{", "application/json"),
], ids=["charset", "depth", "cut"])  # fmt: skip
def test_a_command_that_cannot_be_read_is_refused(ask, run, body, kind):
    address = f"/pixart/runs/{run.path.name}/commands"
    assert ask(address, "POST", data=body, headers={"Content-Type": kind})[0] == 400
    assert run.waiting() == []


@pytest.mark.parametrize("offset", ["x", "1.5", "1e9", "9" * 40])
def test_an_offset_that_is_no_number_is_refused(ask, run, offset):
    for what in ("events", "log"):
        assert ask(f"/pixart/runs/{run.path.name}/{what}?offset={offset}")[0] == 400


def test_samples_are_served_and_nothing_else_of_the_folder(ask, run):
    assert ask(f"/pixart/runs/{run.path.name}/samples/step-000000_0.png") == (200, b"\x89PNG")
    for name in ("step-000000.safetensors", "..%2frun.json", "../run.json", "run.json", "step-000000_0.png%00",
                 "..%2f..%2f..%2fsecret%2frun.json", "step-000001_0.png"):  # fmt: skip
        status, body = ask(f"/pixart/runs/{run.path.name}/samples/{name}")
        assert status == 404 and b"recipe" not in (body if isinstance(body, bytes) else json.dumps(body).encode())


@pytest.mark.parametrize("name", TRAVERSALS)
def test_only_listed_folders_are_served(ask, run, name):
    for path in (f"/pixart/runs/{name}", *(f"/pixart/runs/{name}/{what}" for what in ("events", "log"))):
        status, body = ask(path)
        listing = isinstance(body, dict) and "runs" in body  # the path was normalised to the list itself
        assert listing or status in (403, 404), path
        assert "secret" not in json.dumps(body, default=str)


@pytest.mark.skipif(os.name == "nt", reason="Windows makes links for administrators only")
def test_a_link_that_leads_out_of_the_folder_is_no_run(ask, root):
    (root / "link").symlink_to(root.parent / "secret", target_is_directory=True)
    assert ask("/pixart/runs/link")[0] == 404 and ask("/pixart/runs") == (200, {"runs": []})


@pytest.mark.skipif(os.name == "nt", reason="Windows makes links for administrators only")
def test_a_file_that_is_a_link_out_of_its_run_is_not_served(ask, root, run):
    (root.parent / "secret" / "step-000000_1.png").write_bytes(b"secret")
    for name in ("log.txt", "events.jsonl", "samples/step-000000_1.png"):
        link = run.path / name
        link.unlink(missing_ok=True)
        link.symlink_to(root.parent / "secret" / "step-000000_1.png")
        assert ask(f"/pixart/runs/{run.path.name}/{name.removesuffix('.txt').removesuffix('.jsonl')}")[0] == 404
    moved = run.samples.rename(root.parent / "elsewhere")
    run.samples.symlink_to(moved, target_is_directory=True)
    assert ask(f"/pixart/runs/{run.path.name}/samples/step-000000_0.png")[0] == 404
    (run.path / "run.json").rename(root.parent / "run.json")
    (run.path / "run.json").symlink_to(root.parent / "run.json")
    assert ask(f"/pixart/runs/{run.path.name}")[0] == 404


def test_a_command_that_finds_no_room_on_the_disk_says_so(ask, run, monkeypatch):
    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, answer = post(ask, run)
    assert status == 507 and answer["error"].endswith("commands: No space left on device.")
    assert list(run.commands.iterdir()) == []


def post(ask, run, word="pause", headers=None, **options):
    options = options or {"json": {"command": word}}
    return ask(f"/pixart/runs/{run.path.name}/commands", "POST", headers=headers or {}, **options)


@pytest.mark.parametrize("word", ["pause", "resume", "sample", "save", "stop"])
def test_a_command_is_left_for_the_trainer(ask, run, word):
    status, answer = post(ask, run, word)
    assert status == 202
    assert [(path.stem, command) for path, command in run.waiting()] == [(answer["queued"], word)]


@pytest.mark.parametrize(
    "headers",
    [{"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "https://evil.example"},
     {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}],
)  # fmt: skip
def test_another_sites_page_cannot_command(ask, run, headers):
    status, answer = post(ask, run, headers=headers)
    assert status == 403 and "ComfyUI's own page" in answer["error"] and not run.waiting()


def test_a_form_cannot_command_either(ask, run):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        status, _ = post(ask, run, data=b'{"command": "stop"}', headers={"Content-Type": kind})
        assert status == 403 and not run.waiting()
    assert ask(f"/pixart/runs/{run.path.name}/commands")[0] == 405


@pytest.mark.parametrize("body", [b'{"command": "delete"}', b"{", b"[]", b"{}", b'{"command": ["stop"]}', b"\xff"])
def test_an_unknown_command_is_refused(ask, run, body):
    status, answer = post(ask, run, data=body, headers={"Content-Type": "application/json"})
    assert status == 400 and "there are pause, resume" in answer["error"] and not run.waiting()


def test_a_run_that_does_not_run_takes_no_command(ask, run):
    run.write_status(state="done")
    assert post(ask, run)[0] == 409
    run.write_status(state="running", pid=2**30)
    assert post(ask, run) == (409, {"error": "This run is not running."}) and not run.waiting()
    assert ask("/pixart/runs/gone/commands", "POST", json={"command": "stop"})[0] == 404
