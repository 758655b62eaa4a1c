"""The pack as a whole, as ComfyUI sees it."""

import pytest

from .drive import prompt
from .inprocess import PACK


def test_a_graph_runs_through_the_executor(comfy):
    class Prompt:
        INPUT_TYPES, RETURN_TYPES, FUNCTION = classmethod(lambda s: {"required": {}}), ("CONDITIONING",), "make"

        def make(self):
            return (prompt(6, 1),)

    comfy.classes["TestPrompt"] = Prompt
    graph = {
        "1": {"class_type": "PixArtLoadModel", "inputs": {"model_name": "sigma.safetensors", "family": "auto",
              "base_size": "auto", "weight_dtype": "auto", "weights": "ema if present"}},
        "2": {"class_type": "PixArtResolution", "inputs": {"table": "256", "aspect_ratio": "4:3", "batch_size": 2}},
        "3": {"class_type": "TestPrompt", "inputs": {}},
        "4": {"class_type": "PixArtSampling", "inputs": {"model": ["1", 0], "preset": "DPM-Solver++ 2M", "steps": 2,
              "denoise": 1.0, "final_sigma": "zero"}},
        "5": {"class_type": "SamplerCustom", "inputs": {"model": ["1", 0], "add_noise": True, "noise_seed": 1,
              "cfg": 4.5, "positive": ["3", 0], "negative": ["3", 0], "sampler": ["4", 0], "sigmas": ["4", 1],
              "latent_image": ["2", 2]}},
        "6": {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": "graph"}},
    }  # fmt: skip
    executor = comfy.run(graph)
    assert executor.success, executor.status_messages
    assert list((comfy.base / "output").glob("graph*.latent"))


@pytest.mark.parametrize(
    "name",
    ["PixArtLoadModel", "PixArtSampling", "PixArtResolution", "PixArtLCMSampler", "PixArtLCMSample", "PixArtDMDSampler",
     "PixArtLoadControlNet", "PixArtApplyControlNet", "PixArtHEDEdges", "PixArtTrain"],
)
def test_every_widget_is_explained_and_every_node_has_a_help_page(comfy, name):
    schema = comfy.classes[name].define_schema()
    assert schema.description
    assert all(item.tooltip for item in (*schema.inputs, *schema.outputs))
    assert all(output.display_name for output in schema.outputs)
    page = (PACK / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert all(f"`{item.id}`" in page for item in schema.inputs)


def test_replacements_fit_the_nodes_that_they_name(comfy):
    for replacement in comfy.pack("nodes.replacements").REPLACEMENTS:
        new = comfy.classes[replacement["new_node_id"]]
        inputs = new.INPUT_TYPES()
        required = set(inputs["required"])
        mapped = {entry["new_id"] for entry in replacement["input_mapping"]}
        assert required <= mapped <= required | set(inputs.get("optional", {}))
        for entry in replacement["input_mapping"]:
            options = inputs["required"][entry["new_id"]]
            if "set_value" in entry and options[0] == "COMBO":
                assert entry["set_value"] in options[1]["options"]
