"""PixArtTrain: fine-tuning from a node, in a process of its own."""

import time
from pathlib import Path
from typing import NamedTuple

import folder_paths
import torch
from comfy.model_management import processing_interrupted
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import get_executing_context

from ..comfy_bridge import features, training
from ..comfy_bridge.compat import AnyType, build, executing_node, prompt_server, show_text
from ..comfy_bridge.kv_compress import parse_layers
from ..data.pictures import decode, fit, to_pixels
from ..jobs import launcher, report, routes, runs, watch
from ..jobs.request import run_config
from ..training.run_dir import RunFolder
from .dataset import Progress
from .train_inputs import NO_VAE, train_inputs

POLL = 0.25  # seconds
LAST_SECONDS = 30.0  # that a trainer gets to give its memory back
NO_CONTROL = "This recipe makes no ControlNet: take `model`, or set `recipe` to controlnet."
NO_SAMPLES = "This run has drawn no pictures: write validation_prompts in PixArt Cache Features."


class PixArtTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtTrain",
            display_name="PixArt Train",
            category="PixArt/training",
            description="Trains a LoRA, LCM, ControlNet or all weights, and hands on the model with the result. It "
            "runs in a process of its own: ComfyUI's models leave the GPU's memory first, which is for one of the two "
            "at a time.",
            search_aliases=["fine-tune", "lora training", "dreambooth", "distill", "train controlnet", "finetune"],
            is_output_node=True,
            inputs=train_inputs(),
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with what was trained, for a sampler."),
                io.ControlNet.Output(display_name="control_net", tooltip="Recipe controlnet: what was trained."),
                io.Custom(AnyType()).Output(
                    display_name="result_name", tooltip="The file as the loaders list it. Connects to their names."
                ),
                io.String.Output(display_name="run_folder", tooltip="Where log, checkpoints and samples are."),
                io.Image.Output(display_name="samples", tooltip="The newest pictures of the validation prompts."),
                io.Image.Output(display_name="loss_curve", tooltip="The loss of each step, and its average."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, output_name=None, mode=None, check_only=False, **inputs):
        """Runs again as long as the newest run of this name has no result; then its outputs stay.

        A node that waits has the result when it ends. Any other is asked for it later, so that "no run yet" and
        "done" must differ.
        """
        if not isinstance(output_name, str) or check_only:  # a name that comes over a link is not known yet
            return float("nan")
        run = runs.newest(runs_root(), output_name.strip())
        if run is None:
            return ""
        step = watch.status_of(run).get("step")
        if not runs.is_done(run, step):
            return float("nan")
        return "" if mode == "wait" else f"{run.name} {step}"

    @classmethod
    def execute(cls, cache, model, mode, resume, check_only, processes, **form) -> io.NodeOutput:
        config = requested(cache, model, form)
        if check_only:
            return nothing(checked(config), ExecutionBlocker(None))
        if problems := config.check():
            raise ValueError("PixArt Train: " + " ".join(problems))
        request = Request(mode, resume, processes, origin_of(cls, mode))
        folder, job = obtained(config, request)
        if mode == "wait":
            wait_for(folder, job)
            status = watch.status_of(folder.path)
            if status.get("state") == "done" and status.get("step", 0) < config.steps:  # it began with fewer steps
                wait_for(*obtained(config, request))
        elif not runs.is_done(folder.path, config.steps):
            said = f"{report.running_text(folder.path)} Queue again for the result when it is done."
            return nothing(said, ExecutionBlocker(said), folder.path)
        return delivered(folder, model, config.recipe)


class Request(NamedTuple):
    mode: str
    resume: str
    processes: int
    origin: dict


def runs_root() -> Path:
    return Path(folder_paths.get_output_directory(), runs.FOLDER)


def requested(cache, model, form: dict):
    """The RunConfig of the widgets. Raises ValueError for a MODEL that cannot be trained."""
    recipe, vae = form["recipe"], form.pop("sample_vae")
    output = {"name": form.pop("output_name").strip(), "folder": training.result_folder(recipe),
              "export": form.pop("export")}  # fmt: skip
    depth = training.depth_of(model)
    form |= {"base": training.base_of(model), "cache": str(cache.path), "output": output,
             "vae": "" if vae == NO_VAE else folder_paths.get_full_path_or_raise("vae", vae),
             "kv_layers": parse_layers(form["kv_layers"], depth)}  # fmt: skip
    return run_config(form, depth)


def origin_of(node, mode: str) -> dict:
    """Who asks for a run: what the monitor and somebody who opens the folder later want to know."""
    context, hidden = get_executing_context(), node.hidden
    workflow = (hidden.extra_pnginfo or {}).get("workflow") if hidden else None
    return {"node": executing_node(), "workflow": workflow, "prompt_id": context.prompt_id if context else None,
            "mode": mode}  # fmt: skip


def checked(config) -> str:
    if problems := config.check():
        return "\n".join(problems)
    folder = RunFolder(Path(folder_paths.get_temp_directory(), "pixart_check"))
    folder.write_config(config)
    return launcher.check(folder.path / "run.json", training.runs_on_cpu())


def obtained(config, request: Request):
    """(the run's folder, the job if it was started now) of a run that is going on or done."""
    root, folder = runs_root(), None
    found = runs.find(root, config)
    if found is not None:
        alive = watch.is_alive(watch.status_of(found.path))
        fresh = not watch.read_json(found.path / runs.ORIGIN).get("delivered")
        if request.resume == "auto" or alive or fresh and runs.is_done(found.path, config.steps):
            folder = found
        if alive or folder is not None and runs.is_done(found.path, config.steps):
            show_in_node(folder, request.origin["node"], config.output.name)
            return folder, None
    refuse_to_start(root)
    if folder is None:
        folder = runs.create(root, config, **request.origin)
    else:
        folder.write_config(config)
        runs.note(folder.path, **request.origin)
    features.free_memory()
    show_in_node(folder, request.origin["node"], config.output.name)
    job = launcher.start(
        folder, processes=request.processes, detached=request.mode == "detached", cpu=training.runs_on_cpu(),
        on_state=lambda state: announce(folder, state),
    )  # fmt: skip
    return folder, job


def refuse_to_start(root: Path):
    """Raises RuntimeError when packages are missing, or when a GPU trains another run already: one process at a time
    has its memory."""
    if sentence := launcher.missing_packages():
        raise RuntimeError(sentence)
    other = next((path.name for path in runs.run_folders(root) if watch.is_alive(watch.status_of(path))), None)
    if other and not training.runs_on_cpu():
        raise RuntimeError(f"The run {other} is training on this GPU. Wait for its end, or stop it in the sidebar "
                           "under PixArt runs; then queue again.")  # fmt: skip


def announce(folder: RunFolder, state: str):
    """Tells all pages that a run has another state."""
    if (server := prompt_server()) is not None:
        server.send_sync(routes.EVENT, {"id": folder.path.name, "state": state})


def show_in_node(folder: RunFolder, node, name: str):
    """Lets the node's panel show this run, in the page that asked for it alone: other graphs have a node of the same
    number."""
    server = prompt_server()
    if server is not None and server.client_id is not None:
        state = watch.status_of(folder.path).get("state", "starting")
        told = {"id": folder.path.name, "node": node, "name": name, "state": state}
        server.send_sync(routes.EVENT, told, server.client_id)


def wait_for(folder: RunFolder, job):
    """Until the run ends; Cancel ends the run behind its step, and a second one at once. Raises RuntimeError when it
    has failed."""
    bar, pace, shown = Progress(), report.Pace(), ""
    try:
        while going_on(status := watch.status_of(folder.path), job):
            step = watch.last_step(folder.path) if status.get("state") != "starting" else None
            said = report.progress_text(folder.path, status, step, pace)
            if said != shown:
                show_text(executing_node(), said)
            shown = said
            bar(step["step"] if step else 0, status.get("steps") or 1)
            time.sleep(POLL)
    except BaseException:  # ComfyUI's interrupt, above all
        show_text(executing_node(), f"{folder.path.name}: stopping behind its step. Cancel again to end it at once.")
        launcher.stop(folder, hurry=processing_interrupted)
        raise
    if job:
        job.thread.join(LAST_SECONDS)
    if watch.status_of(folder.path).get("state") not in ("done", "stopped"):
        raise RuntimeError(report.failure(folder.path))


def going_on(status: dict, job) -> bool:
    """Whether a run has not said its last word; the job's thread says it for a trainer that is gone."""
    return status.get("state") not in watch.FINAL and (watch.process_lives(status) or job and job.thread.is_alive())


def delivered(folder: RunFolder, model, recipe: str) -> io.NodeOutput:
    """The outputs of a run that is done; blocked ones of a run that was stopped."""
    status = watch.status_of(folder.path)
    if status.get("state") != "done":
        said = f"{folder.path.name} was stopped at step {status.get('step', 0)}. Queue again to go on."
        return nothing(said, ExecutionBlocker(said), folder.path)
    runs.note(folder.path, delivered=True)
    name = training.loader_name(status["output"], recipe)
    trained, control_net = training.apply_result(model, status["output"], recipe)
    said = report.done_text(folder.path, name)
    show_text(executing_node(), said)
    return io.NodeOutput(
        trained, control_net or ExecutionBlocker(NO_CONTROL), name, str(folder.path),
        newest_samples(folder), to_pixels(report.loss_curve(folder.path))[None], ui=ui.PreviewText(said),
    )  # fmt: skip


def newest_samples(folder: RunFolder):
    """(B, H, W, 3) of one size, or a blocker."""
    found = runs.samples(folder.path)
    if not found:
        return ExecutionBlocker(NO_SAMPLES)
    pictures = [decode((folder.samples / name).read_bytes()) for name in found[-1]["files"]]
    height, width = pictures[0].height, pictures[0].width
    return torch.stack([to_pixels(fit(picture, height, width)) for picture in pictures])


def nothing(text: str, blocker, folder: Path | None = None) -> io.NodeOutput:
    """No result, but a text in the node, and where the run is."""
    show_text(executing_node(), text)
    place = str(folder) if folder else blocker
    return io.NodeOutput(blocker, blocker, blocker, place, blocker, blocker, ui=ui.PreviewText(text))


def register_monitor():
    """Serves the runs to the browser; nothing where ComfyUI runs without its server, or where it is done already."""
    server = prompt_server()
    if server is not None and not any(route.path == "/pixart/runs" for route in server.routes):
        routes.register(server.routes, runs_root)


NODES = [PixArtTrain]
