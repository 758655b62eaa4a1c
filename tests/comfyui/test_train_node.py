"""PixArtTrain in a real ComfyUI, with real runs of the bundled tiny model."""

import json
import os
import signal
import threading
import time
import urllib.request
from urllib.error import HTTPError

import pytest
import torch

from pixart_nodes.jobs import launcher
from pixart_nodes.jobs.watch import process_lives
from pixart_nodes.training.run_dir import RunFolder
from tools.comfy_client import ComfyClient, ComfyError

pytestmark = pytest.mark.slow


def defaults(comfy, node):
    inputs = comfy.classes[node].define_schema().inputs
    return {item.id: item.default for item in inputs if getattr(item, "default", None) is not None}


@pytest.fixture
def graph(comfy):
    """graph(name, **widgets of PixArtTrain) -> the whole way from pictures to a picture, few small steps."""

    def graph(name, examples="zorb", use=True, **widgets):
        settings = defaults(comfy, "PixArtTrain") | {
            "output_name": name, "steps": 3, "learning_rate": 1e-3, "batch_size": 1, "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False, "sample_every": 0, "rank": 4,
        }  # fmt: skip
        nodes = {
            "dataset": ("PixArtDataset", defaults(comfy, "PixArtDataset") | {
                "folder": f"pixart-examples/{examples}", "size": "192"}),
            "vae": ("VAELoader", {"vae_name": "pixart-tiny-vae.safetensors"}),
            "t5": ("PixArtLoadT5", {"t5_name": "pixart-tiny-t5", "dtype": "auto", "device": "default"}),
            "cache": ("PixArtCacheFeatures", defaults(comfy, "PixArtCacheFeatures") | {
                "validation_prompts": "a red zorb", "dataset": ["dataset", 0], "vae": ["vae", 0], "clip": ["t5", 0]}),
            "base": ("PixArtLoadModel", {"model_name": "pixart-tiny-alpha.safetensors", "family": "auto",
                                         "base_size": "auto", "weight_dtype": "auto", "weights": "ema if present"}),
            "train": ("PixArtTrain", settings | {"cache": ["cache", 0], "model": ["base", 0]} | widgets),
        }  # fmt: skip
        if use:
            nodes |= {
                "prompt": ("PixArtTextEncode", defaults(comfy, "PixArtTextEncode") | {
                    "clip": ["t5", 0], "text": "a red zorb", "family": "alpha"}),
                "latent": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
                "draw": ("KSampler", {"model": ["train", 0], "positive": ["prompt", 0], "negative": ["prompt", 0],
                                      "latent_image": ["latent", 0], "seed": 1, "steps": 1, "cfg": 1.0,
                                      "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}),
                "save": ("SaveLatent", {"samples": ["draw", 0], "filename_prefix": f"{name}_drawn"}),
            }  # fmt: skip
        return {key: {"class_type": kind, "inputs": values} for key, (kind, values) in nodes.items()}

    return graph


def said(executor):
    return executor.history_result["outputs"]["train"]["text"][0]


def run_of(base, name):
    (run,) = (base / "output" / "pixart_runs").glob(f"{name}_*")
    return run


def events(run):
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines() if (run / "events.jsonl").exists() else []
    return [json.loads(line) for line in lines]


def steps(run):
    return [event["step"] for event in events(run) if event["type"] == "step"]


def wait_for(something, seconds=240):
    deadline = time.monotonic() + seconds
    while not (found := something()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found
    return found


def in_background(comfy, graph):
    """Runs a graph in a thread -> (thread, list that gets the executor)."""
    done = []
    thread = threading.Thread(target=lambda: done.append(comfy.run(graph)))
    thread.start()
    return thread, done


def errors(executor):
    messages = [data for _, data in (*executor.status_messages, *executor.server.messages) if isinstance(data, dict)]
    return [data["exception_message"] for data in messages if "exception_message" in data]


def test_a_lora_is_trained_and_drawn_with_in_one_queue_run_and_not_trained_again_in_the_next(comfy, graph, caplog):
    whole = graph("first", sample_every=3)
    whole["core"] = {"class_type": "LoraLoaderModelOnly", "inputs": {
        "model": ["base", 0], "lora_name": ["train", 2], "strength_model": 1.0}}  # fmt: skip
    whole["draw"]["inputs"]["model"] = ["core", 0]
    for slot, name in ((4, "sample"), (5, "curve")):
        inputs = {"images": ["train", slot], "filename_prefix": f"first_{name}"}
        whole[name] = {"class_type": "SaveImage", "inputs": inputs}
    first = comfy.run(whole)
    assert first.success, first.status_messages
    run = run_of(comfy.base, "first")
    assert steps(run) == [1, 2, 3] and "3 steps done" in said(first) and "pixart" in said(first)
    assert (comfy.folder("loras") / "pixart" / "first.safetensors").is_file()
    assert not [record for record in caplog.records if "lora key not loaded" in record.getMessage()]
    for name in ("first_drawn*.latent", "first_sample*.png", "first_curve*.png"):
        assert list((comfy.base / "output").glob(name)), name
    origin = json.loads((run / "origin.json").read_text())
    assert (origin["node"], origin["mode"]) == ("train", "wait")
    again = comfy.run(whole)
    assert again.success and steps(run) == [1, 2, 3] and said(again) == said(first)
    whole["train"]["inputs"]["steps"] = 5
    assert comfy.run(whole).success and steps(run) == [1, 2, 3, 4, 5] == steps(run_of(comfy.base, "first"))


def test_a_run_that_is_going_on_is_waited_for_and_then_trained_further(comfy, graph, monkeypatch):
    assert comfy.run(graph("longer", use=False, steps=6, mode="background")).success
    folder = RunFolder(run_of(comfy.base, "longer"))
    folder.send("pause")
    wait_for(lambda: folder.status().get("state") == "paused")
    thread, done = in_background(comfy, graph("longer", use=False, steps=9))
    time.sleep(1)
    assert not done and folder.config().steps == 6
    monkeypatch.setattr(comfy.pack("comfy_bridge.training"), "runs_on_cpu", lambda: False)
    second = comfy.run(graph("second", use=False))
    assert not second.success and f"{folder.path.name} is training on this GPU" in errors(second)[0]
    assert not list((comfy.base / "output" / "pixart_runs").glob("second_*"))
    monkeypatch.undo()
    folder.send("resume")
    thread.join()
    assert done[0].success and steps(folder.path) == list(range(1, 10)) and "9 steps done" in said(done[0])


def test_the_lora_on_the_model_is_the_one_in_the_file(comfy, graph):
    """The same picture from the node's MODEL and from the file in the pack's own loader."""
    whole = graph("same")
    whole["loader"] = {"class_type": "PixArtLoadLora", "inputs": {
        "model": ["base", 0], "lora_name": ["train", 2], "strength": 1.0, "alpha": 0.0}}  # fmt: skip
    for name, model in (("draw2", "loader"), ("draw3", "base")):
        whole[name] = {"class_type": "KSampler", "inputs": {**whole["draw"]["inputs"], "model": [model, 0]}}
        whole[f"save{name[-1]}"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": [name, 0], "filename_prefix": f"same_{name}"},
        }
    assert comfy.run(whole).success
    drawn, loaded, plain = (
        load_latent(comfy.base / "output", name) for name in ("same_drawn", "same_draw2", "same_draw3")
    )
    assert torch.equal(drawn, loaded) and not torch.equal(drawn, plain)


def test_a_result_that_another_run_has_overwritten_is_written_again_and_not_trained_again(comfy, graph):
    from safetensors.torch import load_file

    def trained(seed):
        assert comfy.run(graph("shared", use=False, steps=1, seed=seed)).success
        return load_file(comfy.folder("loras") / "pixart" / "shared.safetensors")

    first, second, again = trained(1), trained(2), trained(1)
    assert not same(first, second) and same(first, again)
    runs = sorted((comfy.base / "output" / "pixart_runs").glob("shared_*"))
    assert [steps(run) for run in runs] == [[1], [1]]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def load_latent(folder, prefix):
    from safetensors.torch import load_file

    (path,) = folder.glob(f"{prefix}*.latent")
    return load_file(path)["latent_tensor"]


def test_a_check_lists_every_problem_and_starts_nothing(comfy, graph):
    bad = comfy.run(graph("bad/name", recipe="full", base_quantization="int8", export="kohya", check_only=True))
    assert bad.success
    for problem in ("output.name 'bad/name' is no file name", "base_quantization int8 needs frozen weights",
                    "output.export kohya is for LoRA"):  # fmt: skip
        assert problem in said(bad)
    good = comfy.run(graph("checked", check_only=True))
    assert good.success and "GB of memory" in said(good) and "3 updates of 1 pictures" in said(good)
    assert not list((comfy.base / "output").glob("pixart_runs/checked*"))
    assert not list((comfy.base / "output").glob("checked_drawn*"))
    told = comfy.run(graph("bad/name", use=False))
    assert not told.success and any("PixArt Train: output.name" in text for text in errors(told))


def test_cancel_stops_the_trainer_behind_its_step_and_the_next_queue_run_goes_on(comfy, graph):
    """With the defaults of every widget but the name and the place of what is learnt."""
    import comfy.model_management as mm

    whole = graph("cancelled", use=False)
    whole["train"]["inputs"] |= defaults(comfy, "PixArtTrain") | {"output_name": "cancelled", "sample_every": 0}
    thread, done = in_background(comfy, whole)
    run = wait_for(lambda: list((comfy.base / "output" / "pixart_runs").glob("cancelled_*")))[0]
    wait_for(lambda: steps(run))
    mm.interrupt_current_processing()
    thread.join(240)  # the rest of the steps would take far longer
    assert not done[0].success
    assert any(event == "execution_interrupted" for event, _ in done[0].status_messages)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped" and not process_lives(status)
    reached = steps(run)[-1]
    assert list((run / "checkpoints").glob(f"step-{reached:06}/complete"))
    whole["train"]["inputs"]["steps"] = reached + 1
    assert comfy.run(whole).success and steps(run) == list(range(1, reached + 2))


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_trainer_is_explained_and_the_next_queue_run_goes_on_from_its_checkpoint(comfy, graph):
    whole = graph("killed", use=False, steps=400, save_every=2)
    thread, done = in_background(comfy, whole)
    run = wait_for(lambda: list((comfy.base / "output" / "pixart_runs").glob("killed_*")))[0]
    wait_for(lambda: list((run / "checkpoints").glob("step-*/complete")))
    os.kill(json.loads((run / "status.json").read_text())["pid"], signal.SIGKILL)
    thread.join(60)
    (message, *_) = [text for text in errors(done[0]) if "signal 9" in text]
    assert "killed by signal 9 (SIGKILL) after step" in message and "Its end:" in message and "log.txt" in message
    saved = max(int(path.parent.name[5:]) for path in (run / "checkpoints").glob("step-*/complete"))
    reached = steps(run)
    whole["train"]["inputs"]["steps"] = reached[-1] + 2
    assert comfy.run(whole).success
    assert steps(run) == [*reached, *range(saved + 1, reached[-1] + 3)]


KINDS = {"controlnet": "controlnet", "lcm": "diffusion_models", "lcm-lora": "loras", "dreambooth": "loras",
         "full": "diffusion_models", "weak-to-strong": "diffusion_models"}  # fmt: skip


@pytest.mark.parametrize("recipe", KINDS)
def test_other_recipes_hand_on_what_they_make(comfy, graph, recipe):
    whole = graph(recipe, examples="edges", recipe=recipe)
    if recipe == "dreambooth":  # pictures of the class beside those of the subject
        whole["subject"] = {"class_type": "PixArtDataset", "inputs": defaults(comfy, "PixArtDataset") | {
            "folder": "pixart-examples/zorb", "size": "192", "trigger_word": "zorb"}}  # fmt: skip
        whole["dataset"]["inputs"] |= {"role": "prior", "dataset": ["subject", 0]}
    if recipe == "weak-to-strong":  # ends at Sigma
        whole["vae"]["inputs"]["vae_name"] = "pixart-tiny-sigma-vae.safetensors"
        for node in ("cache", "prompt"):
            whole[node]["inputs"]["family"] = "sigma"
    if recipe == "controlnet":
        whole["hint"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
        whole["apply"] = {"class_type": "PixArtApplyControlNet", "inputs": defaults(comfy, "PixArtApplyControlNet") | {
            "positive": ["prompt", 0], "negative": ["prompt", 0], "control_net": ["train", 1], "image": ["hint", 0],
            "vae": ["vae", 0], "block_weights": ""}}  # fmt: skip
        whole["draw"]["inputs"] |= {"positive": ["apply", 0], "negative": ["apply", 1]}
    executor = comfy.run(whole)
    assert executor.success, executor.status_messages
    assert (comfy.base / "models" / KINDS[recipe] / "pixart" / f"{recipe}.safetensors").is_file()
    assert list((comfy.base / "output").glob(f"{recipe}_drawn*.latent"))


def test_a_model_that_is_not_a_plain_file_is_refused_in_one_sentence(comfy, sigma, load_lora, loras):
    bridge = comfy.pack("comfy_bridge.training")
    patched = sigma.clone()
    patched.add_patches({"diffusion_model.blocks.0.attn.proj.weight": ("diff", (torch.zeros(48, 48),))})
    with pytest.raises(ValueError, match="PixArt Train: this MODEL has a LoRA on it.*Connect PixArt Load Model itself"):
        bridge.base_of(patched)
    foreign = type("Foreign", (), {"model": object(), "patches": {}})
    with pytest.raises(ValueError, match="PixArt Train works on models from PixArt Load Model"):
        bridge.base_of(foreign)
    base = bridge.base_of(sigma)
    assert base["path"].endswith("sigma.safetensors") and (base["family"], base["weights"]) == ("sigma", "auto")


# Behind a real server


@pytest.fixture
def served(comfy_server, graph):
    """`graph`, for the server; whatever still trains at the end is stopped."""
    yield graph
    for run in comfy_server.json("/pixart/runs")["runs"]:
        if run["alive"]:
            launcher.stop(RunFolder(comfy_server.output / "pixart_runs" / run["id"]), patience=2)


def state_of(server, name):
    found = [run for run in server.json("/pixart/runs")["runs"] if run["name"] == name]
    return found[0] if found else {"status": {}}


def test_a_background_run_blocks_what_needs_it_until_it_is_done_and_is_then_cached(comfy_server, served):
    whole = served("behind", mode="background", steps=40)
    with pytest.raises(ComfyError, match="behind_.* is training in the background, step 0.*Queue again for the result"):
        comfy_server.queue(whole)
    run = wait_for(lambda: state_of(comfy_server, "behind").get("alive") and state_of(comfy_server, "behind"))
    assert comfy_server.json(f"/pixart/runs/{run['id']}")["config"]["steps"] == 40
    origin = json.loads((comfy_server.output / "pixart_runs" / run["id"] / "origin.json").read_text())
    assert origin["mode"] == "background" and origin["prompt_id"]
    with pytest.raises(ComfyError, match="Queue again"):
        comfy_server.queue(whole)  # it is the same run that goes on
    wait_for(lambda: state_of(comfy_server, "behind")["status"].get("state") == "done")
    names = comfy_server.object_info()["LoraLoaderModelOnly"]["input"]["required"]["lora_name"]
    assert os.path.join("pixart", "behind.safetensors") in json.dumps(names).replace("\\\\", "\\")
    comfy_server.queue(whole)
    assert list(comfy_server.output.glob("behind_drawn*.latent"))
    cached = comfy_server.queue(whole)
    told = {event: data for event, data in cached["status"]["messages"]}
    assert {"train", "draw", "save"} <= set(told["execution_cached"]["nodes"])
    assert len([run for run in comfy_server.json("/pixart/runs")["runs"] if run["name"] == "behind"]) == 1


def test_a_background_run_that_nobody_asked_for_meanwhile_gives_its_result_when_it_is_done(comfy_server, served):
    whole = served("later", mode="background", steps=2)
    with pytest.raises(ComfyError, match="training in the background"):
        comfy_server.queue(whole)
    wait_for(lambda: state_of(comfy_server, "later")["status"].get("state") == "done")
    comfy_server.queue(whole)
    assert len(list(comfy_server.output.glob("later_drawn*.latent"))) == 1
    told = {event: data for event, data in comfy_server.queue(whole)["status"]["messages"]}
    assert {"train", "draw", "save"} <= set(told["execution_cached"]["nodes"])


def test_the_page_that_asked_for_a_run_is_told_its_node_and_no_other_is(comfy_server, served):
    asking, other = (ComfyClient(comfy_server.url) for _ in range(2))
    sockets = [asking.events(), other.events()]
    asking.submit(served("asked", mode="background", steps=1))
    wait_for(lambda: state_of(comfy_server, "asked")["status"].get("state") == "done")
    run = state_of(comfy_server, "asked")["id"]
    told = [told_of_runs(socket, run) for socket in sockets]
    (shown,) = [data for data in told[0] if "node" in data]
    assert (shown["id"], shown["node"], shown["name"]) == (run, "train", "asked")
    assert not [data for data in told[1] if "node" in data]


def told_of_runs(socket, run):
    """What the websocket says of a run, until it is done."""
    told, socket.timeout = [], 10
    while not told or told[-1]["state"] != "done":
        message = socket.recv()
        event = json.loads(message) if isinstance(message, str) else {}
        told += [event["data"]] if event.get("type") == "pixart.run" and event["data"]["id"] == run else []
    return told


def test_commands_and_files_of_a_run_go_through_the_server_and_nothing_else_does(comfy_server, served):
    socket = ComfyClient(comfy_server.url).events()  # another tab
    with pytest.raises(ComfyError):
        comfy_server.queue(served("commanded", mode="detached", steps=100_000))
    run = wait_for(lambda: state_of(comfy_server, "commanded").get("last") and state_of(comfy_server, "commanded"))
    path = f"/pixart/runs/{run['id']}"
    for prefix in ("", "/api"):
        assert comfy_server.json(f"{prefix}{path}/events?offset=0&points=10")["events"]
    for name in ("..%2f..%2f..%2fserver.log", "%2e%2e", "..%2fpixart_cache", "..%5c..%5cserver.log"):
        with pytest.raises(HTTPError) as refused:
            comfy_server.get(f"/pixart/runs/{name}")
        assert refused.value.code in (403, 404)
    for headers, code in (({"Origin": "https://evil.example"}, 403), ({"Sec-Fetch-Site": "cross-site"}, 403),
                          ({"Content-Type": "text/plain"}, 403), ({}, 202)):  # fmt: skip
        assert post(comfy_server, f"{path}/commands", {"command": "stop"}, headers) == code
    wait_for(lambda: state_of(comfy_server, "commanded")["status"]["state"] == "stopped")
    assert post(comfy_server, f"{path}/commands", {"command": "stop"}, {}) == 409
    told, socket.timeout = [], 5
    while "stopped" not in [data["state"] for data in told]:
        message = socket.recv()
        event = json.loads(message) if isinstance(message, str) else {}
        told += [event["data"]] if event.get("type") == "pixart.run" else []
    # another tab is not told whose run it is: it may have a node of the same number in another graph
    assert all(data["id"] == run["id"] and "node" not in data for data in told)
    assert told[0]["state"] == "starting"  # on a busy machine it may stop before "running" is looked at
    with pytest.raises(ComfyError, match="training in the background"):  # it goes on where it was stopped
        comfy_server.queue(served("commanded", mode="detached", steps=100_000))
    assert post(comfy_server, f"{path}/commands", {"command": "stop"}, {}) == 202
    wait_for(lambda: not state_of(comfy_server, "commanded")["alive"])


def post(server, path, body, headers):
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as reply:
            return reply.status
    except HTTPError as error:
        return error.code
