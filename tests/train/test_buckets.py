"""Runs in a bucket of an emulator of Google's object store on this machine: whole, killed, resumed, refused."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest
from commands import finish, losses, run, start
from test_runs import free_port

NEEDED = ("gcsfs", "gcp_storage_emulator")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not all(map(importlib.util.find_spec, NEEDED)), reason=f"needs pip install {' '.join(NEEDED).replace('_', '-')}")]
# Its own server answers one connection at a time, and does not tell the generation of what it hands out, by which
# tensorstore knows what it replaces.
SERVER = """
import http.server, sys
http.server.HTTPServer = http.server.ThreadingHTTPServer
from gcp_storage_emulator.handlers import objects
whole = objects.download
def download(request, response, storage, *args, **kwargs):
    whole(request, response, storage, *args, **kwargs)
    if response.status.value < 300:
        place = request.params["bucket_name"], request.params["object_id"]
        response["x-goog-generation"] = storage.get_file_obj(*place)["generation"]
        response["x-goog-metageneration"] = "1"
objects.download = download
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


def client(port: int) -> dict[str, str]:
    """gcsfs and tensorstore each have to be told; neither may look for an account. gcsfs asks for the kind of a bucket
    in a protocol that the emulator does not speak."""
    return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x", "FSSPEC_GS_TOKEN": "anon", "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.fixture(scope="module")
def bucket():
    """(port, environment of a client)."""
    port = free_port()
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], env={**os.environ}, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 30
        while True:
            try:
                ask(port, "/storage/v1/b/bucket")
                break
            except OSError:
                assert time.monotonic() < limit and server.poll() is None, "the emulator did not start"
                time.sleep(0.1)
        yield port, client(port)
    finally:
        server.kill()
        server.wait()


def ask(port: int, path: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read()


def names(port: int, prefix: str) -> list[str]:
    items = json.loads(ask(port, f"/storage/v1/b/bucket/o?prefix={prefix}&maxResults=5000")).get("items", [])
    return sorted(item["name"] for item in items)


def read(port: int, name: str) -> str:
    return ask(port, f"/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}?alt=media").decode()


def losses_in(port: int, name: str, tmp_path) -> np.ndarray:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(read(port, f"{name}/metrics.jsonl"))
    return losses(folder)


def test_a_run_in_a_bucket_equals_a_local_one_also_after_a_kill(bucket, tmp_path):
    port, env = bucket
    code, out = run(tmp_path / "local")
    assert code == 0, out
    process = start("gs://bucket/run", "--config.checkpoint.every=2", **env)
    limit = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit and not any(
            "/checkpoints/" in name and name.endswith("commit_success.txt") for name in names(port, "run/")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    killed, out = finish(process)
    assert killed in (-signal.SIGKILL, 0), out
    code, out = run("gs://bucket/run", "--config.checkpoint.every=2", **env)
    assert code == 0, out
    np.testing.assert_array_equal(losses_in(port, "run", tmp_path), losses(tmp_path / "local"))
    assert json.loads(read(port, "run/final_result.json"))["exit_code"] == 0
    assert not [name for name in names(port, "run/") if ".probe" in name]
    code, out = run("gs://bucket/run", "--config.checkpoint.every=2", **env)
    assert code == 0 and "complete" in out


def test_a_bucket_that_is_not_there_is_refused_early(bucket):
    _, env = bucket
    code, out = run("gs://nowhere/run", **env)
    assert code == 2 and "--workdir gs://nowhere/run" in out and "see to the name of the bucket" in out, out
    assert "Traceback" not in out.partition("lm train:")[2]


def test_a_store_that_nobody_answers_for_is_refused_in_time():
    began = time.monotonic()
    code, out = run("gs://bucket/run", **client(free_port()))
    assert code == 2 and "see to the name of the bucket" in out, out
    assert time.monotonic() - began < 150
