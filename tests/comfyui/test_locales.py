"""The translations fit the nodes, and the server hands them to the front end."""

import json
from pathlib import Path

import pytest

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = sorted(path.name for path in LOCALES.iterdir())


def node_texts(language):
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_names_every_node_and_only_inputs_and_outputs_that_there_are(comfy_server, language):
    info = comfy_server.object_info()
    ours = {name for name in info if info[name]["python_module"] == f"custom_nodes.{comfy_server.pack_folder}"}
    texts = node_texts(language)
    assert set(texts) == ours
    for name, node in texts.items():
        inputs = {key for group in ("required", "optional") for key in info[name]["input"].get(group, {})}
        assert set(node.get("inputs", inputs)) == inputs
        assert set(node.get("outputs", {})) <= {str(index) for index in range(len(info[name]["output"]))}


def test_english_says_what_the_nodes_say_themselves(comfy_server):
    """It goes before the nodes' own texts, so it must not fall behind them."""
    info = comfy_server.object_info()
    for name, node in node_texts("en").items():
        assert (node["display_name"], node["description"]) == (info[name]["display_name"], info[name]["description"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_server_hands_the_translations_out(comfy_server, language):
    assert comfy_server.json("/i18n")[language]["nodeDefs"].items() >= node_texts(language).items()
