"""What several folders of tests share: a real ComfyUI server with this pack in it, and a browser."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tools import comfy_source
from tools.comfy_client import ComfyClient
from tools.comfy_server import ComfyServer, copy_pack, has_accelerator
from tools.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
PACK_FOLDER = "PixArt-Nodes-main"
SERVER_TROUBLE = ("IMPORT FAILED", "Error while calling comfy_entrypoint", "Unable to parse pyproject",
                  "Failed to load")


def pytest_collection_modifyitems(items):
    """A test that asks for the server or for the browser is slow, and can be chosen by that."""
    for item in items:
        for fixture, mark in (("comfy_server", "server"), ("chromium", "browser")):
            if fixture in item.fixturenames:
                item.add_marker(mark)
                item.add_marker("slow")


class RunningComfy(ComfyClient):
    """The client of a server that the tests own, and the folders of that server."""

    def __init__(self, server):
        super().__init__(server.url)
        self.server = server
        self.base, self.models, self.output = server.base, server.base / "models", server.base / "output"
        self.log = server.log
        self.pack_folder = PACK_FOLDER

    def queue(self, graph, **options):
        """Run an API-form graph; its history entry. See ComfyClient.run."""
        return self.run(graph, **options)

    def trouble(self):
        """The lines of the log that say that a part of the pack did not load."""
        return [line for line in self.log().splitlines() if any(mark in line for mark in SERVER_TROUBLE)]


@pytest.fixture(scope="session")
def comfyui_path():
    """A ComfyUI source tree: see tools/comfy_source.py for where it comes from."""
    source = comfy_source.locate(ROOT)
    if source is None:
        (ROOT / ".standalone").mkdir(exist_ok=True)
        source = comfy_source.downloaded(ROOT / ".standalone", sys.executable, Progress())
    return source.path


@pytest.fixture(scope="session")
def comfy_server(comfyui_path, tmp_path_factory):
    """A server on an empty base directory with a space in its path, and in it the pack as the registry ships it.

    The pack's own folder has a name that somebody may have given it, but no space: ComfyUI serves no web files then.
    """
    base = tmp_path_factory.mktemp("comfy base")
    copy_pack(ROOT, base / "custom_nodes" / PACK_FOLDER)
    options = ["--disable-api-nodes", *([] if has_accelerator(sys.executable) else ["--cpu"])]
    with ComfyServer(sys.executable, comfyui_path, base, base / "server.log", options=options) as server:
        running = RunningComfy(server)
        assert not running.trouble(), running.log()
        yield running


@pytest.fixture(scope="session")
def chromium():
    """The path of a Chromium. Without one the test is skipped, and fails in continuous integration (CI=true)."""
    path = os.environ.get("PIXART_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path:
        return path
    reason = "no browser: " + (os.environ.get("PIXART_NO_CHROMIUM") or "no Chromium on PATH")
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
