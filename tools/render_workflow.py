"""Render a saved workflow on a running server: `python -m tools.render_workflow URL WORKFLOW OUTPUT_FOLDER`.

Runs in the private environment, as a child of standalone.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .comfy_client import ComfyClient, ComfyError, images
from .progress import Progress


def render(url, workflow_path, output, progress):
    """Queue the workflow, show its progress, and return the paths of the images under `output`."""
    try:
        workflow = json.loads(workflow_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ComfyError(f"it is no JSON file ({error})") from error
    if not isinstance(workflow, dict) or "nodes" not in workflow:
        raise ComfyError("it is not in the format in which ComfyUI's front end saves workflows")
    client = ComfyClient(url)
    graph = client.to_api(workflow)

    def show(node, value, total):
        progress.bar(graph[node]["class_type"], value, total)

    with progress.step(f"Rendering {workflow_path.name}"):
        history = client.run(graph, workflow, show)
    found = [output / image["subfolder"] / image["filename"] for image in images(history) if image["type"] == "output"]
    if not found:
        raise ComfyError("the workflow saved no image")
    return found


def main(words):
    url, workflow, output = words
    progress = Progress()
    try:
        paths = render(url, Path(workflow), Path(output), progress)
    except (ComfyError, OSError) as error:            # OSError: the server is gone
        print(f"Rendering {Path(workflow).name} failed: {error}.", file=sys.stderr)
        return 1
    progress.say("")
    for path in paths:
        progress.say(f"Picture: {path.resolve()}")
    progress.say("(drag one into ComfyUI to get its workflow back)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
