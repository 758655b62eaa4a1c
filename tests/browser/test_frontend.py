"""The pack in the real front end: workflows open whole, run, and every node has its help."""

import json

import pytest
from PIL import Image

from .conftest import ROOT, workflow

OURS = ("PixArtLoadModel", "PixArtLoadT5", "PixArtTextEncode", "PixArtResolution", "PixArtSampling")


def api_copy(name):
    graph = json.loads((ROOT / "tests" / "workflows_api" / f"{name}.json").read_text(encoding="utf-8"))
    return {key: node["inputs"] for key, node in graph.items()}


def test_the_tiny_workflow_opens_runs_and_shows_its_pictures(front_end, screenshot, request):
    front_end.open(workflow("text_to_image_tiny"))
    assert front_end.nodes("!LiteGraph.registered_node_types[node.type]") == []
    assert front_end.nodes("node.has_errors") == []
    assert {key: node["inputs"] for key, node in front_end.prompt().items()} == api_copy("text_to_image_tiny")
    front_end.run()
    front_end.page.wait_for_timeout(1000)  # the canvas draws what has arrived
    name = "screenshot.png" if "classic" in request.node.callspec.id else "screenshot_nodes_2.png"
    assert Image.open(screenshot(name)).size == (1920, 1000)
    assert front_end.errors() == []
    assert front_end.console_errors == []


def test_nodes_2_draws_every_node_of_a_workflow(front_end, request):
    front_end.open(workflow("image_to_image"))
    if "2.0" in request.node.callspec.id:
        front_end.page.wait_for_selector("[data-node-id]")
    drawn = front_end.page.locator("[data-node-id]").count()
    assert drawn == (len(workflow("image_to_image")["nodes"]) if "2.0" in request.node.callspec.id else 0)


@pytest.mark.parametrize("name", ["text_to_image_alpha_1024", "text_to_image_sigma_1024"])
def test_a_workflow_of_a_released_model_opens_and_names_the_missing_files(front_end, name):
    front_end.open(workflow(name))
    assert front_end.nodes("!LiteGraph.registered_node_types[node.type]") == []
    assert {key: node["inputs"] for key, node in front_end.prompt().items()} == api_copy(name)
    front_end.page.wait_for_function("app.graph.nodes.some(node => node.has_errors)")
    assert set(front_end.nodes("node.has_errors")) <= {"PixArtLoadModel", "PixArtLoadT5", "VAELoader"}
    assert front_end.console_errors == []


def test_the_help_of_a_node_opens_beside_the_graph(front_end):
    front_end.open(workflow("text_to_image_tiny"))
    front_end.select("PixArtLoadModel")
    with front_end.page.expect_response(lambda reply: reply.url.endswith("/docs/PixArtLoadModel.md")) as reply:
        front_end.page.get_by_test_id("info-button").click()
    assert reply.value.ok and f"/extensions/{front_end.pack}/docs/" in reply.value.url
    front_end.page.get_by_text("What the loader found out").first.wait_for()


def test_every_help_page_is_served_to_the_page(front_end):
    front_end.open(workflow("text_to_image_tiny"))
    fetch = "async path => { const reply = await fetch(path); return reply.ok ? await reply.text() : null }"
    for node in OURS:
        page = front_end.page.evaluate(fetch, f"/extensions/{front_end.pack}/docs/{node}.md")
        assert page.startswith("# ") and "xample" in page


@pytest.mark.parametrize("name", ["train_lora", "train_lcm", "train_controlnet"])
def test_a_training_workflow_opens_with_every_value_in_its_place(front_end, name):
    front_end.open(workflow(name))
    assert front_end.nodes("!LiteGraph.registered_node_types[node.type]") == []
    assert {key: node["inputs"] for key, node in front_end.prompt().items()} == api_copy(name)
