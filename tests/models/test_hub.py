"""timm's hub: what is asked of it, and what is said where it cannot give it. A server stands in."""

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from safetensors.torch import save

from vitgal.models.describers import fingerprint_tensors

SCRIPT = """
import sys
from vitgal.models.inference import open_model
from vitgal.models.sources import weights_fingerprint
try:
    for name in sys.argv[1:]:
        print(weights_fingerprint(name))
        print(open_model(name).embed_dim)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


MODEL = """
import vitgal
model = vitgal.build_model("xcit_nano_12_p16_224", seed=0)
for call in (vitgal.ViTGaL.from_pretrained, model.push_to_hub):
    try:
        call("me/vitgal", token=False)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does; `server.mode` is "gated" or "whole"."""

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def do_POST(self):
        self.send_error(401, "Unauthorized")

    def answer(self, with_body):
        mode, body = self.server.mode, self.server.body
        if mode == "gated":
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("X-Error-Message", "Access to this model is restricted.")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if not self.path.endswith("model.safetensors"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"' + "a" * 40 + '"')
        self.send_header("X-Repo-Commit", "b" * 40)
        self.end_headers()
        if with_body:
            self.wfile.write(body)
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    torch.manual_seed(5)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.network = timm.create_model("test_resnet")
    server.body, server.mode = save(server.network.state_dict()), "whole"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def run(folder, endpoint, *names, script=SCRIPT, **environment):
    import os

    variables = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder)} | environment
    done = subprocess.run(
        [sys.executable, "-c", script, *names], capture_output=True, text=True, env=variables
    )
    return done.stdout.splitlines()


@pytest.mark.slow
def test_weights_of_the_hub_are_read_from_its_cache_and_named_by_their_tensors(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    stamp, width = run(tmp_path, endpoint, "timm:test_resnet")
    tensors = {key: v for key, v in hub.network.state_dict().items() if not key.startswith("fc.")}
    network = timm.create_model("test_resnet", num_classes=0)
    network.load_state_dict(tensors)
    assert stamp == f"timm:test_resnet, tensors {fingerprint_tensors(network)}" and width == "96"
    hub.mode = "gated"  # the cache is enough
    assert run(tmp_path, endpoint, "timm:test_resnet", HF_HUB_OFFLINE="1") == [stamp, width]


@pytest.mark.slow
def test_a_hub_that_cannot_give_the_weights_is_answered_with_the_remedy(hub, tmp_path):
    # Offline: without a network huggingface_hub would try for a minute.
    (line,) = run(tmp_path / "a", "http://127.0.0.1:9", "timm:test_resnet", HF_HUB_OFFLINE="1")
    assert line.startswith("NetworkError: the weights of test_resnet cannot be fetched (")
    assert "download model.safetensors from https://huggingface.co/timm/test_resnet" in line
    assert "name it, timm:test_resnet@FILE; nothing unfinished in timm's cache is used" in line
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    hub.mode = "gated"
    (line,) = run(tmp_path / "b", endpoint, "timm:test_resnet")
    assert "given out under a licence: accept it at https://huggingface.co/timm/test_resnet" in line


@pytest.mark.slow
def test_a_model_that_the_hub_keeps_back_is_answered_with_the_remedy(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    hub.mode = "gated"
    gated, refused = run(tmp_path, endpoint, script=MODEL)
    assert gated == (
        "HubError: me/vitgal is given out on conditions: accept them at "
        "https://huggingface.co/me/vitgal, then log in with `hf auth login`"
    )
    assert refused.startswith("HubError: the hub does not take me/vitgal (")
    assert refused.endswith("log in by `hf auth login` with a token that may write there")
