"""ComfyUI inside the test process, without its server: its node classes, its executor, and our pack loaded as it does.

One per process, because ComfyUI's settings are module state: run the tests once per version of ComfyUI.
"""

import asyncio
import sys
import uuid
from pathlib import Path

import torch

PACK = Path(__file__).parents[2]
EXTRA_NODES = (
    "nodes_custom_sampler", "nodes_model_advanced", "nodes_easycache", "nodes_model_merging", "nodes_perpneg",
)  # fmt: skip


class Server:
    """The few things of ComfyUI's server that its executor talks to; keeps the messages."""

    client_id = last_node_id = last_prompt_id = None

    def __init__(self):
        self.sockets_metadata = {}
        self.messages = []

    def send_sync(self, event, data, sid=None):
        self.messages.append((event, data))


class Comfy:
    """A running ComfyUI on the CPU with folders of its own."""

    def __init__(self, path: Path, base: Path):
        self.path, self.base = Path(path), Path(base)
        torch.set_num_threads(1)  # tiny models: more threads only wait for each other
        sys.path.append(str(path))
        argv, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", str(base)]
        try:
            import comfy.options

            comfy.options.enable_args_parsing()
            import comfy.cli_args  # noqa: F401  reads sys.argv once
        finally:
            sys.argv = argv
        with torch.inference_mode():
            asyncio.run(self._load_nodes())

    async def _load_nodes(self):
        import nodes

        await nodes.init_public_apis()
        for name in EXTRA_NODES:
            file = self.path / "comfy_extras" / f"{name}.py"
            assert await nodes.load_custom_node(str(file), module_parent="comfy_extras")
        assert await nodes.load_custom_node(str(PACK)), "ComfyUI could not load the pack; the log says why"
        self.classes = nodes.NODE_CLASS_MAPPINGS

    def folder(self, name: str) -> Path:
        """The first folder of a model kind that is below our own base."""
        import folder_paths

        path = next(Path(p) for p in folder_paths.get_folder_paths(name) if self.base in Path(p).parents)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def pack(self, module: str):
        """A module of the pack as ComfyUI imported it, such as "comfy_bridge.model"."""
        root = self.classes["PixArtLoadModel"].__module__.rsplit(".", 2)[0]
        return sys.modules[f"{root}.{module}"]

    def call(self, node: str, **inputs):
        """The outputs of one node, as the executor would get them."""
        cls = self.classes[node]
        with torch.inference_mode():
            if hasattr(cls, "GET_SCHEMA"):
                return cls.execute(**inputs).result
            return getattr(cls(), cls.FUNCTION)(**inputs)

    def run(self, prompt: dict):
        """Validates and executes a graph in API format -> the executor (success, history_result, status_messages)."""
        import execution

        async def validate():
            return await execution.validate_prompt(str(uuid.uuid4()), prompt, None)

        valid, error, outputs, node_errors = asyncio.run(validate())
        assert valid, (error, node_errors)
        cache = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        executor = execution.PromptExecutor(Server(), cache_type=execution.CacheType.CLASSIC, cache_args=cache)
        executor.execute(prompt, str(uuid.uuid4()), {}, outputs)
        return executor
