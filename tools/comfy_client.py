"""A small client of ComfyUI's server: queue a graph over HTTP, hear its progress over the websocket."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
import uuid

import websocket
from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api

from .progress import Failure

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ComfyError(Failure):
    """ComfyUI refused a graph, or a node of it failed. Says which node and why."""


class ComfyClient:
    """Talks to the server at `url`."""

    def __init__(self, url):
        self.url = url.rstrip("/")
        self.id = uuid.uuid4().hex

    def get(self, path):
        """The body of a GET, as bytes. Raises urllib.error.HTTPError for 4xx and 5xx."""
        with _opener.open(self.url + urllib.parse.quote(path, safe="/?&=%+"), timeout=60) as reply:
            return reply.read()

    def json(self, path):
        """The body of a GET, parsed."""
        return json.loads(self.get(path))

    def post(self, path, payload):
        """POST a JSON body; the parsed answer, or None when it is empty."""
        request = urllib.request.Request(self.url + path, json.dumps(payload).encode(),
                                         {"Content-Type": "application/json"})
        with _opener.open(request, timeout=60) as reply:
            body = reply.read()
        return json.loads(body) if body else None

    def object_info(self):
        """Every node class that the server knows, as the front end sees it."""
        return self.json("/object_info")

    def to_api(self, workflow):
        """The API form of a workflow that was saved in the UI format. Raises ComfyError."""
        info = self.object_info()
        missing = sorted({node["type"] for node in workflow["nodes"]} - set(info) - {"Note", "MarkdownNote", "Reroute"})
        if missing:
            raise ComfyError(f"this ComfyUI has no node {', '.join(missing)}")
        try:
            return convert_ui_to_api(workflow, info)
        except WorkflowConversionError as error:
            raise ComfyError(f"the workflow cannot be converted: {error}") from error

    def submit(self, graph, workflow=None):
        """Queue an API-form graph and return its prompt id; `workflow` is what the saved images will carry."""
        payload = {"prompt": graph, "client_id": self.id, "prompt_id": str(uuid.uuid4())}
        if workflow is not None:
            payload["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        try:
            return self.post("/prompt", payload)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise ComfyError(_refusal(error.read())) from error

    def events(self, stop_after=600):
        """Open the websocket (before submitting) and return it; it yields nothing for `stop_after` seconds at most."""
        address = f"ws{self.url[4:]}/ws?clientId={self.id}"
        return websocket.create_connection(address, timeout=stop_after, http_no_proxy=["127.0.0.1", "localhost"])

    def run(self, graph, workflow=None, on_progress=None, timeout=600):
        """Queue `graph` and return its history entry (outputs, status) when it is done.

        on_progress(node_id, value, total) is called for each step; `timeout` is the longest silence in seconds.
        Raises ComfyError when the graph is refused, fails or is interrupted.
        """
        socket = self.events(timeout)
        try:
            prompt_id = self.submit(graph, workflow)
            self._listen(socket, prompt_id, graph, on_progress or (lambda node, value, total: None))
        except websocket.WebSocketTimeoutException as error:
            raise ComfyError(f"no sign of life from ComfyUI for {timeout} s") from error
        except websocket.WebSocketConnectionClosedException as error:
            raise ComfyError("ComfyUI ended while it worked") from error
        finally:
            socket.close()
        return self.json(f"/history/{prompt_id}")[prompt_id]

    def interrupt(self, prompt_id):
        """Stop a running prompt at its next step."""
        self.post("/interrupt", {"prompt_id": prompt_id})

    def image(self, entry):
        """The bytes of an image that a history entry lists ({filename, subfolder, type})."""
        return self.get("/view?" + urllib.parse.urlencode(entry))

    def _listen(self, socket, prompt_id, graph, on_progress):
        while True:
            message = socket.recv()
            if isinstance(message, bytes):            # a preview picture
                continue
            event = json.loads(message)
            data = event.get("data", {})
            if data.get("prompt_id") != prompt_id:
                continue
            if event["type"] == "progress":
                on_progress(data["node"], data["value"], data["max"])
            elif event["type"] == "execution_error":
                raise ComfyError(f"node {data['node_id']} ({data['node_type']}): {data['exception_message'].strip()}")
            elif event["type"] == "execution_interrupted":
                raise ComfyError("the run was interrupted")
            elif event["type"] == "executing" and data["node"] is None:   # comes after the history entry
                return


def images(history_entry):
    """Every image that a history entry lists, in node order."""
    return [image for output in history_entry["outputs"].values() for image in output.get("images", [])]


def _refusal(body):
    """One sentence out of the answer to a refused graph."""
    answer = json.loads(body)
    reasons = [f"node {node} ({errors['class_type']}): {error['message']} {error['details']}".strip()
               for node, errors in answer.get("node_errors", {}).items() for error in errors["errors"]]
    return "; ".join(reasons) or answer.get("error", {}).get("message", "ComfyUI refused the graph")
