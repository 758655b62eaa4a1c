"""The live monitor of training runs, in the real front end, with real runs of the tiny model."""

import os
import re
import time

import pytest

from pixart_nodes.training.config import RunConfig
from pixart_nodes.training.run_dir import RunFolder
from tests.training.conftest import QUICK, write_base, write_cache

from .conftest import READY
from .monitor import (
    SLOW,
    LongRun,
    Panel,
    falls_silent,
    open_graph,
    open_node,
    open_page,
    open_sidebar,
    requests_during,
    show_panel,
    training_graph,
)

ONE_RENDERING = pytest.mark.parametrize("front_end", [False], ids=["classic nodes"], indirect=True)
HTML = "<img src=x onerror=\"document.title='hacked'\"><b>bold</b>"


@pytest.fixture(scope="module")
def runs(comfy_server):
    """The folder of runs of the tests' server."""
    folder = comfy_server.output / "pixart_runs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def write_run(runs, tmp_path_factory):
    """write_run(name, recipe, **fields of run.json) -> the RunFolder of a run that is not started."""
    tiny = tmp_path_factory.mktemp("tiny")
    base, cache = write_base(tiny / "base.safetensors"), tiny / "cache"
    write_cache(cache)

    def write(name, recipe="lora", **fields):
        folder = RunFolder(runs / f"{name}_1123_1200")
        output = {"name": name, "folder": str(tiny / "models")}
        given = {"recipe": recipe, "base": {"path": str(base)}, "cache": str(cache), "output": output}
        folder.write_config(RunConfig.from_dict({**given, **QUICK, "rank": 8, "alpha": 8.0, **fields}))
        return folder

    return write


@pytest.fixture(scope="module")
def only_long_run(write_run):
    run = LongRun(write_run("long", steps=1_000_000, save_every=200))
    yield run
    run.kill()


@pytest.fixture
def long_run(only_long_run):
    return only_long_run.start()


def test_a_run_that_is_queued_in_the_page_is_followed_and_steered_from_its_node(front_end, comfy_server, runs, request):
    name = "classic" if "classic" in request.node.callspec.id else "vue"
    graph = training_graph(comfy_server.object_info(), name)
    open_graph(front_end, graph)
    page, panel = front_end.page, Panel(front_end.page, "node")
    sent = front_end.prompt()["6"]["inputs"]
    assert sent == graph["6"]["inputs"]  # the panel is no input
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("app.graph.nodes.some(node => node.properties.pixart_run)", timeout=SLOW)
    show_panel(page)
    panel.wait("running")
    panel.wait_beyond(2)
    folder = RunFolder(runs / panel.article.get_attribute("data-run"))
    assert folder.config().output.name == name

    first, last = panel.reading("Home"), panel.reading("End")
    assert first.startswith("step 1\n") and int(last.split("\n")[0].split()[1]) > 1 and "smoothed 0" in last
    assert re.fullmatch(r"[\d.]+ GiB", panel.root.locator("[data-metric=memory_bytes] .pixart-value").inner_text())
    assert panel.disabled() == set()

    panel.button("pause").click()
    panel.wait("paused")
    assert panel.button("pause").is_hidden() and panel.button("resume").is_enabled()
    step = panel.step()
    panel.button("sample").click()  # is obeyed while the run waits
    panel.root.locator(f'.pixart-column[data-step="{step}"]').wait_for(timeout=SLOW)
    assert panel.sample_steps() == [0, step]
    assert panel.root.locator(".pixart-column").first.locator("img").count() == 2  # prompts
    panel.button("save").click()
    panel.root.locator(".pixart-key-done").wait_for(timeout=SLOW)
    assert next(folder.complete_checkpoints()).name == f"step-{step:06}"
    panel.root.locator(".pixart-picture").last.click()
    assert page.locator("dialog[open] figure:visible").count() == 2  # step 0 beside the one that was clicked
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0

    page.wait_for_timeout(1500)  # the front end saves the graph in the browser
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(READY)
    show_panel(page)
    panel.wait("paused", folder.path.name)
    assert panel.step() == step and panel.sample_steps() == [0, step]
    panel.button("resume").click()
    panel.wait_beyond(step)

    panel.button("stop").click()
    panel.root.locator("[data-answer=no]").click()
    assert panel.article.get_attribute("data-state") == "running"
    panel.button("stop").click()
    panel.root.locator("[data-answer=yes]").click()
    panel.wait("stopped")
    assert panel.disabled() == {"pause", "sample", "save", "stop"}
    assert folder.status()["state"] == "stopped"
    assert front_end.console_errors == []


def test_nothing_is_asked_while_nobody_looks_and_after_the_node_is_gone(front_end, long_run):
    panel, page = open_node(front_end, long_run.folder.path.name)
    panel.wait_beyond(1)
    assert any(long_run.folder.path.name in url for url in requests_during(page, 2500))
    page.evaluate("app.canvas.ds.offset[1] += 20000; app.canvas.setDirty(true, true)")
    assert falls_silent(page)
    show_panel(page)
    panel.wait_beyond(panel.step())
    page.evaluate("app.graph.remove(app.graph.nodes[0])")
    assert falls_silent(page)
    assert front_end.console_errors == []


@ONE_RENDERING
def test_an_answer_that_comes_after_the_node_is_gone_wakes_nothing(front_end, long_run):
    held = []
    panel, page = open_node(front_end, long_run.folder.path.name)
    panel.wait_beyond(1)
    page.evaluate("app.canvas.ds.offset[1] += 20000; app.canvas.setDirty(true, true)")
    assert falls_silent(page)
    page.route("**/pixart/runs", lambda route: held.append(route))
    with page.expect_request("**/pixart/runs"):
        show_panel(page)
    page.evaluate("app.graph.remove(app.graph.nodes[0])")
    for route in held:
        route.continue_()
    page.unroute("**/pixart/runs")
    page.wait_for_timeout(1000)
    assert falls_silent(page)


@ONE_RENDERING
def test_a_run_that_cannot_be_read_shows_and_commands_nothing_of_the_one_before(front_end, write_run, long_run):
    other = write_run("unreadable")
    panel, page = open_node(front_end, long_run.folder.path.name)
    panel.wait_beyond(1)
    page.route(f"**/pixart/runs/{other.path.name}", lambda route: route.fulfill(status=500, body="{}"))
    panel.root.get_by_role("combobox").select_option(other.path.name)
    panel.wait("unknown", other.path.name)
    assert panel.article.inner_text().split("\n") == [other.path.name, "ComfyUI does not answer; trying again …"]
    assert panel.root.locator(".pixart-commands [data-command]:visible").count() == 0
    page.unroute(f"**/pixart/runs/{other.path.name}")
    other.write_status(state="stopped", step=1, steps=50)
    panel.wait("stopped", other.path.name)
    assert panel.root.locator(".pixart-commands").is_visible()


@ONE_RENDERING
def test_a_run_of_another_graphs_node_with_the_same_number_is_left_alone(front_end, write_run):
    mine, hers = write_run("mine"), write_run("hers")
    panel, page = open_node(front_end, mine.path.name)
    panel.wait("interrupted", mine.path.name)
    page.evaluate("app.graph.nodes[0].widgets.find(widget => widget.name === 'output_name').value = 'mine '")
    tell = (
        "detail => app.api.dispatchEvent(new CustomEvent('pixart.run',"
        " { detail: { ...detail, node: String(app.graph.nodes[0].id), state: 'starting' } }))"
    )
    remembered = "app.graph.nodes[0].properties.pixart_run"
    page.evaluate(tell, {"id": hers.path.name, "name": "hers"})
    page.wait_for_timeout(500)
    assert page.evaluate(remembered) == mine.path.name
    page.evaluate(tell, {"id": hers.path.name, "name": "mine"})
    panel.wait("interrupted", hers.path.name)
    assert page.evaluate(remembered) == hers.path.name


@ONE_RENDERING
def test_an_open_log_moves_while_a_trainer_starts_and_events_that_are_written_anew_are_shown_anew(front_end, write_run):
    run = write_run("moving", steps=9)
    run.write_status(state="starting", pid=os.getpid(), started=time.time(), steps=9)
    (run.path / "log.txt").write_text("reading the model\n")
    panel, page = open_node(front_end, run.path.name)
    panel.root.locator(".pixart-log summary").click()
    panel.root.locator("pre").filter(has_text="reading the model").wait_for()
    with (run.path / "log.txt").open("a") as log:
        log.write("reading the cache\n")
    panel.root.locator("pre").filter(has_text="reading the cache").wait_for()
    step = {"lr": 1e-4, "grad_norm": 1.0, "seconds_per_step": 1.0, "memory_bytes": 2**30, "loss": 0.5}
    for number in range(1, 9):
        run.add_event("step", step=number, **step)
    page.wait_for_function("document.querySelector('[role=progressbar]').ariaValueNow === '8'")
    (run.path / "events.jsonl").unlink()
    run.add_event("step", step=1, **step)
    page.wait_for_function("document.querySelector('[role=progressbar]').ariaValueNow === '1'")
    assert panel.reading("End").startswith("step 1\n") and panel.reading("Home").startswith("step 1\n")
    run.write_status(state="stopped", step=1, pid=None)


@ONE_RENDERING
def test_a_command_that_is_refused_says_so_in_the_panel(front_end, long_run):
    panel, page = open_node(front_end, long_run.folder.path.name)
    panel.wait_beyond(1)
    # what another site's page could send at most
    plain = {"content-type": "text/plain"}
    page.route("**/commands", lambda route: route.continue_(headers={**route.request.headers, **plain}))
    panel.button("pause").click()
    panel.root.get_by_text("Pause: Commands are taken from ComfyUI's own page").wait_for()
    assert panel.button("pause").is_enabled()
    page.unroute("**/commands")
    panel.button("pause").click()
    panel.wait("paused")
    assert panel.root.locator(".pixart-error").count() == 0
    panel.button("resume").click()
    panel.wait("running")


@ONE_RENDERING
def test_the_panel_is_there_again_after_comfyui_has_been_restarted(front_end, comfy_server, long_run):
    panel, page = open_node(front_end, long_run.folder.path.name)
    panel.root.locator(".pixart-key-done").wait_for(timeout=SLOW)  # there is a checkpoint
    comfy_server.server.stop()
    panel.root.get_by_text("ComfyUI does not answer").wait_for()
    assert panel.disabled() == {"pause", "sample", "save", "stop"}
    step = panel.step()
    comfy_server.server.start()
    panel.wait_beyond(step)
    assert panel.article.get_attribute("data-state") == "running" and panel.disabled() == set()

    long_run.kill()
    panel.wait("interrupted")
    checkpoint = int(next(long_run.folder.complete_checkpoints()).name.removeprefix("step-"))
    assert f"goes on from step {checkpoint}" in panel.article.inner_text()
    assert falls_silent(page)
    assert front_end.console_errors == []


@ONE_RENDERING
def test_the_sidebar_lists_all_runs_and_shows_what_they_say_as_text(front_end, write_run):
    step = {"step": 3, "loss": 0.25, "losses": {"noise": 0.2, "variance": 0.05}, "lr": 1e-4, "grad_norm": float("inf"),
            "seconds_per_step": 2.0, "memory_bytes": 3 * 2**30, "eta_s": 4.0}  # fmt: skip
    failed, done = write_run("failed", steps=5), write_run("done", recipe="full", steps=3)
    failed.add_event("step", **step)
    failed.add_event("warning", text=f"warning {HTML}")
    failed.write_status(state="failed", step=3, steps=5, error=f"Out of memory {HTML}")
    (failed.path / "log.txt").write_text(f"log {HTML}\n" + "line\n" * 50)
    for number in (1, 2, 3, 2, 3):  # killed behind step 3, and gone on from a checkpoint at step 1
        done.add_event("step", **step | {"step": number, "loss": 1 / number})
    done.add_event("validation", step=0, loss=0.9)
    done.write_status(state="done", step=3, steps=3, output="models/loras/done.safetensors")
    os.utime(failed.path / "run.json", (1, 1))  # the oldest
    lost = write_run("lost")
    lost.write_status(state="running", step=2, steps=5, pid=2**22 + 1, started=time.time())
    open_page(front_end)
    page, panel = front_end.page, open_sidebar(front_end)
    rows = panel.root.locator(".pixart-row")
    rows.nth(2).wait_for()
    listed = {row.get_attribute("data-run"): row.get_attribute("data-state") for row in rows.all()}
    expected = {lost.path.name: "interrupted", done.path.name: "done", failed.path.name: "failed"}
    assert [item for item in listed.items() if item[0] in expected] == list(expected.items())
    assert "0.25" in rows.last.inner_text()

    rows.last.press("Enter")
    panel.wait("failed", failed.path.name)
    shown = panel.article.inner_text()
    assert f"Out of memory {HTML}" in shown and "0.5 it/s" not in shown and "2 s/it" in shown
    assert panel.root.locator("[data-metric=grad_norm] .pixart-value").inner_text() == "–"
    for closed in panel.root.locator("summary").all():
        closed.click()
    panel.root.get_by_text(f"warning {HTML}").wait_for()
    panel.root.locator("pre").filter(has_text=f"log {HTML}").wait_for()
    assert panel.root.locator("[src=x], b").count() == 0 and page.title() != "hacked"
    assert panel.disabled() == {"pause", "sample", "save", "stop"}
    assert falls_silent(page)

    panel.root.get_by_role("button", name="All runs").click()
    panel.root.locator(f'[data-run="{done.path.name}"]').click()
    panel.wait("done", done.path.name)
    read = [panel.reading(key).split("\n")[0] for key in ("Home", "ArrowRight", "End")]
    assert read == ["step 1", "step 2", "step 3"]
    panel.root.get_by_role("checkbox").check()  # logarithmic
    panel.root.locator(".pixart-key-check").wait_for()
    panel.root.locator("[data-metric=speed]").click()
    assert "2 s/it" in panel.reading("End")
    page.locator(".pixart-runs-tab-button").click()
    assert panel.root.count() == 0
    assert front_end.console_errors == []


@ONE_RENDERING
def test_the_panel_fits_into_a_narrow_node_and_speaks_chinese(front_end, comfy_server, write_run):
    folder = write_run("narrow")
    folder.write_status(state="stopped", step=1, steps=50)
    comfy_server.post("/settings/Comfy.Locale", "zh")
    try:
        panel, _ = open_node(front_end, folder.path.name)
        panel.wait("stopped")
        panel.root.evaluate("root => { root.style.width = '240px' }")
        overflow = panel.article.evaluate("article => article.scrollWidth - article.clientWidth")
        assert overflow <= 0
        assert panel.button("pause").inner_text() == "暂停"
        assert "已停止" in panel.article.inner_text()
    finally:
        comfy_server.post("/settings/Comfy.Locale", "en")


@ONE_RENDERING
@pytest.mark.skipif("PIXART_SCREENSHOTS" not in os.environ, reason="makes docs/monitor.png")
def test_a_picture_of_a_run_for_the_documents(front_end, comfy_server, screenshot):
    graph = training_graph(comfy_server.object_info(), "zorb", steps=400, sample_every=50, save_every=100, batch_size=2,
                           rank=16, sample_vae="pixart-tiny-vae.safetensors")  # fmt: skip
    open_graph(front_end, graph)
    page, panel = front_end.page, Panel(front_end.page, "node")
    page.set_viewport_size({"width": 1500, "height": 1000})
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("app.graph.nodes.some(node => node.properties.pixart_run)", timeout=SLOW)
    open_sidebar(front_end)
    show_panel(page)
    panel.root.locator('.pixart-column[data-step="300"]').wait_for(timeout=10 * SLOW)
    page.wait_for_timeout(3000)
    screenshot("monitor.png")
    panel.button("stop").click()
    panel.root.locator("[data-answer=yes]").click()
    panel.wait("stopped")


@ONE_RENDERING
def test_smoothing_is_bias_corrected_and_does_not_depend_on_thinning(front_end):
    open_page(front_end)
    smooth = front_end.page.evaluate(
        "async path => { const { smooth } = await import(path);"
        " const all = [...Array(400).keys()], few = all.filter(step => step % 4 === 3), curve = step => 1 + step / 400;"
        " return [smooth([0, 1, 2], [7, 7, 7], 50), smooth([0, 1], [1, 3], 1), smooth([0, 1], [1, 3], 0),"
        " smooth(all, all.map(curve), 40).at(-1), smooth(few, few.map(curve), 40).at(-1)] }",
        f"/extensions/{front_end.pack}/js/series.js",
    )
    constant, pair, off, whole, thinned = smooth
    assert constant == pytest.approx([7, 7, 7])
    keep = 2.718281828**-1  # weights 1 - 1/e, and the one before times 1/e
    assert pair == pytest.approx([1, (keep + 3) / (keep + 1)])
    assert off == [1, 3]
    assert whole == pytest.approx(thinned, abs=0.01) and whole == pytest.approx(1.9, abs=0.01)
