"""The pack inside a real ComfyUI server, seen over HTTP."""

import io
import threading
from urllib.error import HTTPError

import pytest
from PIL import Image

from tools.comfy_client import ComfyError, images

NODES = ("PixArtLoadModel", "PixArtLoadT5", "PixArtTextEncode", "PixArtResolution", "PixArtSampling",
         "PixArtLoadControlNet", "PixArtApplyControlNet", "PixArtHEDEdges")


def picture(width=128, height=96):
    return {"1": {"class_type": "EmptyImage",
                  "inputs": {"width": width, "height": height, "batch_size": 1, "color": 0x32C800}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "sub/green"}}}


def long_run(steps=10_000):
    inputs = {
        "model": ("PixArtLoadModel", {"model_name": "pixart-tiny-alpha.safetensors", "family": "auto",
                                      "base_size": "auto", "weight_dtype": "auto", "weights": "ema if present"}),
        "t5": ("PixArtLoadT5", {"t5_name": "pixart-tiny-t5", "dtype": "auto", "device": "default"}),
        "prompt": ("CLIPTextEncode", {"clip": ["t5", 0], "text": "a red circle"}),
        "latent": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "sampler": ("KSampler", {"model": ["model", 0], "positive": ["prompt", 0], "negative": ["prompt", 0],
                                 "latent_image": ["latent", 0], "seed": 1, "steps": steps, "cfg": 4.5,
                                 "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}),
        "save": ("SaveLatent", {"samples": ["sampler", 0], "filename_prefix": "long"}),
    }
    return {name: {"class_type": kind, "inputs": values} for name, (kind, values) in inputs.items()}


def test_the_log_is_free_of_import_trouble(comfy_server):
    assert comfy_server.trouble() == []
    assert comfy_server.pack_folder in comfy_server.log()


@pytest.mark.parametrize("node", NODES)
def test_the_server_offers_the_node_with_its_texts(comfy_server, node):
    info = comfy_server.object_info()[node]
    assert info["python_module"] == f"custom_nodes.{comfy_server.pack_folder}"
    assert info["category"].startswith("PixArt")
    assert info["description"]
    specs = [(name, spec) for group in ("required", "optional")
             for name, spec in info["input"].get(group, {}).items()]
    without_tooltip = [name for name, spec in specs if len(spec) < 2 or not spec[1].get("tooltip")]
    assert not without_tooltip


def test_every_node_of_the_pack_has_a_served_help_page(comfy_server):
    ours = [name for name, info in comfy_server.object_info().items()
            if info["python_module"] == f"custom_nodes.{comfy_server.pack_folder}"]
    assert set(NODES) <= set(ours)
    for node in ours:
        assert comfy_server.get(f"/extensions/{comfy_server.pack_folder}/docs/{node}.md").strip()


def test_every_workflow_is_a_template_that_opens_and_has_a_thumbnail(comfy_server):
    names = comfy_server.json("/api/workflow_templates").get(comfy_server.pack_folder, [])
    assert "text_to_image_tiny" in names
    for name in names:
        workflow = comfy_server.json(f"/api/workflow_templates/{comfy_server.pack_folder}/{name}.json")
        assert workflow["nodes"] and workflow["links"]
        thumbnail = comfy_server.get(f"/api/workflow_templates/{comfy_server.pack_folder}/{name}.jpg")
        assert min(Image.open(io.BytesIO(thumbnail)).size) >= 128


def test_a_queued_graph_saves_an_image_that_carries_its_workflow(comfy_server):
    history = comfy_server.queue(picture(), workflow={"nodes": [], "links": [], "version": 0.4})
    (entry,) = images(history)
    image = Image.open(io.BytesIO(comfy_server.image(entry)))
    assert (image.size, image.getpixel((5, 5))) == ((128, 96), (0x32, 0xC8, 0x00))
    assert set(image.info) >= {"prompt", "workflow"}
    assert (comfy_server.output / entry["subfolder"] / entry["filename"]).is_file()


def test_a_refused_graph_is_explained_in_one_sentence(comfy_server):
    graph = picture()
    del graph["2"]["inputs"]["images"]
    with pytest.raises(ComfyError, match=r"node 2 \(SaveImage\): Required input is missing images"):
        comfy_server.queue(graph)


def test_a_node_that_fails_while_it_runs_is_named_with_its_error(comfy_server):
    (comfy_server.base / "input" / "broken.png").write_bytes(b"no picture")
    graph = picture()
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": "broken.png"}}
    with pytest.raises(ComfyError, match=r"node 1 \(LoadImage\): cannot identify image file"):
        comfy_server.queue(graph)


def test_an_interrupt_stops_a_sampler_at_its_next_step_and_the_server_goes_on(comfy_server):
    graph = long_run()
    started, outcome = threading.Event(), []

    def work():
        try:
            comfy_server.queue(graph, on_progress=lambda *step: started.set())
        except ComfyError as error:
            outcome.append(str(error))

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive() and not started.wait(0.1):
        pass
    assert started.is_set(), outcome
    comfy_server.interrupt(comfy_server.json("/queue")["queue_running"][0][1])
    worker.join(120)  # all of its steps take far longer
    assert "interrupted" in outcome[0]
    assert images(comfy_server.queue(picture(64, 64)))


def test_an_unknown_help_page_is_a_404(comfy_server):
    with pytest.raises(HTTPError, match="404"):
        comfy_server.get(f"/extensions/{comfy_server.pack_folder}/docs/Nothing.md")
