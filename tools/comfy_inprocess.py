"""ComfyUI inside this process, without its server: its nodes, its executor, and this pack loaded the way it does.

Its settings are module state: one ComfyUI for one process.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from pathlib import Path

from .progress import Failure


class _Server:
    """The few things of ComfyUI's server that its executor talks to."""

    client_id = last_node_id = last_prompt_id = None
    sockets_metadata: dict = {}

    def send_sync(self, event, data, sid=None):
        """Nobody listens."""


class InProcessComfy:
    """Runs API-form graphs. Has the `run` and `image` of tools.comfy_client.ComfyClient."""

    def __init__(self, comfyui: Path, pack: Path, base: Path):
        """Import the ComfyUI in `comfyui` with `base` as its base directory, and load `pack`. Raises Failure."""
        import torch

        if not (Path(comfyui) / "comfy" / "samplers.py").is_file():
            raise Failure(f"{comfyui} holds no ComfyUI (there is no comfy/ folder in it).")
        sys.path.insert(0, str(comfyui))
        options = ["--base-directory", str(base), *([] if _accelerator(torch) else ["--cpu"])]
        words, sys.argv = sys.argv, ["main.py", *options]
        try:
            import comfy.options

            comfy.options.enable_args_parsing()
            import comfy.cli_args  # noqa: F401  reads sys.argv when it is imported
            import utils.install_util  # noqa: F401  nodes.py puts comfy/, with another utils, first on the path
        finally:
            sys.argv = words
        self.inference_mode = torch.inference_mode
        with self.inference_mode():
            asyncio.run(self._load(pack))
        self.executor = self._executor()

    async def _load(self, pack):
        import nodes

        await nodes.init_public_apis()
        if not await nodes.load_custom_node(str(pack)):
            raise Failure(f"ComfyUI could not load the pack in {pack}; the log above says why.")

    def _executor(self):
        import execution

        cache = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        return execution.PromptExecutor(_Server(), cache_type=execution.CacheType.CLASSIC, cache_args=cache)

    def add_models(self, kind: str, folder: Path):
        """Let the loaders of `kind` (such as "diffusion_models") find what lies in `folder`, before all others."""
        import folder_paths

        folder_paths.add_model_folder_path(kind, str(folder), is_default=True)

    def run(self, graph: dict) -> dict:
        """Validate and execute a graph; its history entry. Raises Failure when a node refuses or fails."""
        import execution

        prompt_id = str(uuid.uuid4())
        with self.inference_mode():
            valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt(prompt_id, graph, None))
            if not valid:
                raise Failure(f"ComfyUI refused the graph: {_reasons(error, node_errors)}")
            self.executor.execute(graph, prompt_id, {}, outputs)
        if not self.executor.success:
            event, data = self.executor.status_messages[-1]
            raise Failure(f"node {data.get('node_id')} ({data.get('node_type')}) failed: "
                          f"{data.get('exception_message', event).strip()}")
        return self.executor.history_result

    def image(self, entry: dict) -> bytes:
        """The bytes of an image that a history entry lists ({filename, subfolder, type})."""
        import folder_paths

        folder = folder_paths.get_directory_by_type(entry["type"])
        return Path(folder, entry["subfolder"], entry["filename"]).read_bytes()


def _accelerator(torch) -> bool:
    return any(kind.is_available() for kind in (torch.cuda, torch.backends.mps, getattr(torch, "xpu", torch.cuda)))


def _reasons(error: dict, node_errors: dict) -> str:
    reasons = [f"node {node} ({entry['class_type']}): {reason['message']} {reason['details']}".strip()
               for node, entry in node_errors.items() for reason in entry["errors"]]
    return "; ".join(reasons) or error["message"]
