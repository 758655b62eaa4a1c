"""A Chromium page on the front end of the tests' server, with nothing of a first visit in the way."""

import json
import os
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
READY = "window.app?.vueAppReady && window.app.graph"
PATIENCE = 60_000  # ms; a busy machine is slow to start a browser


class FrontEnd:
    """ComfyUI's front end in a page: what a user does and sees, in words of the tests."""

    def __init__(self, page, url, pack_folder):
        self.page, self.url, self.pack = page, url, pack_folder
        self.console_errors = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: self._note(message.type, message.text + message.location.get("url", "")))
        page.on("pageerror", lambda error: self._note("error", error.stack or str(error)))

    def _note(self, kind, text):
        """The front end has errors of its own, such as the addresses that the server does not know; ours count."""
        if kind == "error" and f"/extensions/{self.pack}" in text:
            self.console_errors.append(text)

    def open(self, workflow):
        """Load the page, then a saved workflow, and wait until it is drawn."""
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY)
        self.page.evaluate("async workflow => { await app.loadGraphData(workflow) }", workflow)
        self.page.wait_for_function("count => app.graph.nodes.length === count", arg=len(workflow["nodes"]))

    def nodes(self, condition):
        """Types of the nodes for which a JavaScript condition on `node` holds."""
        return self.page.evaluate(f"() => app.graph.nodes.filter(node => {condition}).map(node => node.type)")

    def select(self, kind):
        """Select the first node of a type, as a click on it does."""
        self.page.evaluate(
            "kind => { app.canvas.selectNode(app.graph.nodes.find(node => node.type === kind));"
            " app.canvas.setDirty(true, true) }",
            kind,
        )

    def prompt(self):
        """The graph as the Run button would send it."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def errors(self):
        """Texts of the error messages that are shown."""
        shown = self.page.locator("[data-testid=error-overlay], .p-toast-message-error, .comfy-error-report")
        return [text for text in shown.all_inner_texts() if text.strip()]

    def run(self):
        """Press Run, and wait until a node shows every picture that it made."""
        self.page.get_by_test_id("queue-button").click()
        self.page.wait_for_function(
            "app.graph.nodes.some(node => node.imgs?.length && node.imgs.every(image => image.naturalWidth))"
            " || [...document.querySelectorAll('[data-node-id] img')].some(image => image.naturalWidth)"  # Nodes 2.0
        )


def workflow(name):
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")  # not session: Playwright keeps an event loop running, which ComfyUI's own needs
def browser(chromium):
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture(params=[False, True], ids=["classic nodes", "nodes 2.0"])
def front_end(request, browser, comfy_server):
    """Both ways in which the front end draws nodes."""
    # Without the first, a new user is shown the template browser, which lies over everything else.
    for setting, value in {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": request.param}.items():
        comfy_server.post(f"/settings/{setting}", value)
    page = browser.new_page(viewport={"width": 1920, "height": 1000})
    yield FrontEnd(page, comfy_server.url, comfy_server.pack_folder)
    page.close()


@pytest.fixture
def screenshot(front_end, tmp_path):
    """Takes a picture of the page; PIXART_SCREENSHOTS names a folder that keeps it (docs/ for the README's)."""
    folder = Path(os.environ.get("PIXART_SCREENSHOTS") or tmp_path)

    def take(name):
        path = folder / name
        front_end.page.screenshot(path=path, type="png" if path.suffix == ".png" else "jpeg")
        return path

    return take
