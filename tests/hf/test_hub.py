"""To the hub and back, against a stand-in that is served on loopback."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import checkpoints
from scripts import ROOT
from tokmat_jax.hf.convert import import_weights, load_flat

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """The requests of an upload in one commit, and of a download."""

    files: dict[str, bytes]
    token = "secret"

    def log_message(self, *_):
        pass

    def answer(self, found, status=200, **headers):
        body = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/me/model", "name": "me/model"})
        elif "/preupload/" in self.path:
            self.answer({"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                                   for one in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    self.files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            address = f"http://{self.headers['Host']}/me/model/commit/{COMMIT}"
            self.answer({"commitUrl": address, "commitOid": COMMIT, "pullRequestUrl": None})
        else:
            self.answer({})

    def do_GET(self):
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        if name in self.files:
            tag = hashlib.sha1(self.files[name]).hexdigest()
            self.answer(self.files[name], ETag=f'"{tag}"')
        elif "/tree/" in self.path:
            self.answer([{"type": "file", "path": path, "size": len(content), "oid": COMMIT}
                         for path, content in self.files.items()])
        elif self.path.startswith("/api/models/"):
            self.answer({"id": "me/model", "sha": COMMIT, "siblings": [{"rfilename": path} for path in self.files]})
        else:
            self.answer({"error": "not found"}, 404, **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(tmp_path):
    """(files, how to run a command against it)."""
    handler = type("Own", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def command(*words, token="secret"):
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": token,
                                    "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0",
                                    "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-m", "tokmat_jax", "hf", *map(str, words)], env=environment,
                              capture_output=True, text=True, check=False, timeout=240)

    yield handler.files, command
    server.shutdown()
    server.server_close()


def test_a_model_goes_to_the_hub_with_its_card_and_comes_back(hub, tmp_path):
    files, command = hub
    (tmp_path / "hf").mkdir()
    import_weights(str(checkpoints.write(tmp_path / "hf")), tmp_path / "run")
    (tmp_path / "report.md").write_text("| method | perplexity |\n|---|---|\n| greedy | 12 |\n")
    refused = command("push", tmp_path / "run", "me/model", token="wrong")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "HF_TOKEN" in refused.stderr
    assert not files
    pushed = command("push", tmp_path / "run", "me/model", "--report", tmp_path / "report.md")
    assert pushed.returncode == 0, pushed.stderr
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: tokmat-jax\n")
    assert "| greedy | 12 |" in card
    assert {"config.json", "model.safetensors", "tokenizer.json", "maturation/run.json"} <= files.keys()
    back = command("import", "me/model", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    one, two = load_flat(tmp_path / "run")[2], load_flat(tmp_path / "back")[2]
    assert one.keys() == two.keys()
    for path, array in one.items():
        np.testing.assert_array_equal(array, two[path], err_msg=path)
