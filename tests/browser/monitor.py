"""The monitor's panel as its tests see it, a run that goes on for hours, and the graphs and pages to watch them in."""

import os
import subprocess
import sys

from .conftest import READY, ROOT

SLOW = 180_000  # ms; a trainer starts, on a busy machine


class Panel:
    """A monitor's panel in the page: in the node or in the sidebar."""

    def __init__(self, page, where):
        self.page, self.root = page, page.locator(f".pixart-{where}")
        self.article = self.root.locator("article")

    def wait(self, state, run="", timeout=SLOW):
        chosen = f'[data-run="{run}"]' if run else ""
        self.root.locator(f'article[data-state="{state}"]{chosen}').wait_for(timeout=timeout)

    def step(self):
        return int(self.root.locator("[role=progressbar]").get_attribute("aria-valuenow"))

    def wait_beyond(self, step):
        self.page.wait_for_function(
            "([root, step]) => Number(root.querySelector('[role=progressbar]').ariaValueNow) > step",
            arg=[self.root.element_handle(), step], timeout=SLOW,
        )  # fmt: skip

    def button(self, command):
        return self.root.locator(f"[data-command={command}]")

    def disabled(self):
        found = self.root.locator(".pixart-commands [data-command]:visible")
        return {button.get_attribute("data-command") for button in found.all() if button.is_disabled()}

    def sample_steps(self):
        return [int(column.get_attribute("data-step")) for column in self.root.locator(".pixart-column").all()]

    def reading(self, key):
        """What the curve says at a point chosen with the keyboard."""
        self.root.locator("canvas").focus()
        self.page.keyboard.press(key)
        return self.root.locator(".pixart-reading").inner_text()


class LongRun:
    """A real run that goes on for hours, started as from a shell."""

    def __init__(self, folder):
        self.folder, self.process = folder, None

    def start(self):
        """Starts the trainer, if it is not there; it goes on from its last checkpoint."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "pixart_nodes.training", str(self.folder.path / "run.json")]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            with (self.folder.path / "log.txt").open("ab") as log:
                self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        return self

    def kill(self):
        self.process.kill()
        self.process.wait()


def node(info, kind, **given):
    """A node of an API-form graph, with the defaults of its widgets."""
    chosen = {}
    for part in ("required", "optional"):
        for name, (type_, *rest) in info[kind]["input"].get(part, {}).items():
            options = type_ if isinstance(type_, list) else (rest[0] if rest else {}).get("options")
            default = rest[0].get("default") if rest else None
            if default is not None or options:
                chosen[name] = options[0] if default is None else default
    return {"class_type": kind, "inputs": chosen | given}


def training_graph(info, name, **widgets):
    small = {"steps": 5000, "learning_rate": 1e-3, "batch_size": 1, "gradient_accumulation_steps": 1, "rank": 4,
             "gradient_checkpointing": False, "sample_every": 5000, "save_every": 5000,
             "mode": "background"}  # fmt: skip
    return {
        "1": node(info, "PixArtDataset", folder="pixart-examples/zorb", size="192"),
        "2": node(info, "VAELoader", vae_name="pixart-tiny-vae.safetensors"),
        "3": node(info, "PixArtLoadT5", t5_name="pixart-tiny-t5"),
        "4": node(info, "PixArtCacheFeatures", validation_prompts="a red zorb\na blue circle on a green background",
                  dataset=["1", 0], vae=["2", 0], clip=["3", 0]),
        "5": node(info, "PixArtLoadModel", model_name="pixart-tiny-alpha.safetensors"),
        "6": node(info, "PixArtTrain", cache=["4", 0], model=["5", 0], output_name=name, **small | widgets),
    }  # fmt: skip


def open_page(front_end):
    front_end.page.goto(front_end.url, wait_until="domcontentloaded")
    front_end.page.wait_for_function(READY)
    front_end.page.wait_for_function("Boolean(LiteGraph.registered_node_types.PixArtTrain)")


def open_graph(front_end, graph):
    open_page(front_end)
    front_end.page.evaluate("async graph => { await app.loadApiJson(graph, 'train') }", graph)


def open_node(front_end, run=""):
    """A graph of one PixArtTrain that remembers a run."""
    open_page(front_end)
    front_end.page.evaluate(
        "run => { app.graph.clear(); const node = LiteGraph.createNode('PixArtTrain');"
        " node.properties.pixart_run = run; app.graph.add(node) }",
        run,
    )
    show_panel(front_end.page)
    panel = Panel(front_end.page, "node")
    panel.article.wait_for()
    show_panel(front_end.page)  # it has grown
    return panel, front_end.page


def show_panel(page):
    """Scrolls the graph until the lower end of the training node is in the middle of the page."""
    page.wait_for_function("app.graph?.nodes.some(node => node.type === 'PixArtTrain')")
    page.wait_for_timeout(500)  # until the node has its size
    page.evaluate(
        "() => { const node = app.graph.nodes.find(node => node.type === 'PixArtTrain'); app.canvas.ds.scale = 1;"
        " app.canvas.ds.offset = [750 - node.pos[0], 950 - node.pos[1] - node.size[1]];"
        " app.canvas.setDirty(true, true) }"
    )


def open_sidebar(front_end):
    front_end.page.locator(".pixart-runs-tab-button").click()
    return Panel(front_end.page, "sidebar")


def requests_during(page, milliseconds):
    """Addresses of runs that the page asks for."""
    heard = []

    def hear(request):
        if "/pixart/runs" in request.url:
            heard.append(request.url)

    page.on("request", hear)
    page.wait_for_timeout(milliseconds)
    page.remove_listener("request", hear)
    return heard


def falls_silent(page):
    """Whether the page soon asks for nothing more; what is under way may end."""
    return any(not requests_during(page, 2500) for _ in range(8))
