"""An SGLang encoder on its own, and an engine that gets its images' features from it, as JSON.

    python sglang_encoder_side.py one|tokenizer|ranks|replicas FOLDER RESULT.json

"one": an encoder of one process, under the transfer that SGLang prefers; "tokenizer": under
zmq_to_tokenizer; "ranks": with two tensor-parallel ranks; "replicas": with two data-parallel
workers. The features that it sends are set against vitrt's own in float32. Whether its tower is
vitrt's is decided as for any user, by SGLANG_PLUGINS. `sglang_check.py` starts this.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cases
import torch
from sglang_side import answer, start
from tower_times import CUDA

TO_TOKENIZER = "zmq_to_tokenizer"
OPTIONS: dict[str, list[str]] = {
    "one": [],
    "tokenizer": ["--encoder-transfer-backend", TO_TOKENIZER],
    "ranks": ["--tp-size", "2"],
    "replicas": ["--dp-size", "2"],
}
IMAGE_CASES = ("one", "three")
SECONDS_TO_START = 600


@contextmanager
def encoder(folder: Path, options: list[str], log: Path) -> Iterator[tuple[str, list[str]]]:
    """Its URL, and the module of the tower in each of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sglang.launch_server", "--encoder-only"]
    command += ["--model-path", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "bfloat16" if CUDA else "float32", "--enable-multimodal", *options]
    if not CUDA:
        command += ["--device", "cpu", "--attention-backend", "torch_native"]
        command += ["--mm-attention-backend", "sdpa"]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as reports, log.open("wb") as output:
        environ = os.environ | {"TOWER_REPORT": reports}
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(url, process, log)
            found = [json.loads(file.read_text())["tower"] for file in Path(reports).iterdir()]
            yield url, sorted(found)
        finally:
            process.terminate()
            process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(errors="replace").splitlines()[-1:]
            raise RuntimeError(f"the encoder ended with {process.returncode}: {last}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=60):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise RuntimeError(f"the encoder was not there after {SECONDS_TO_START} s")


def image_urls(case: str) -> list[str]:
    """Images as a request over HTTP holds them."""
    urls = []
    for image in cases.images_of(case):
        file = io.BytesIO()
        image.save(file, "png")
        urls.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    return urls


def sent_features(url: str, job: str, case: str) -> torch.Tensor:
    """[M, O * (1 + L)]: what the encoder sends for a request's images."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.PULL) as receiver:
        port = receiver.bind_to_random_port("tcp://127.0.0.1")
        request = {
            "req_id": f"features-{case}",
            "modality": "IMAGE",
            "mm_items": image_urls(case),
            "num_parts": 1,
            "part_idx": 0,
            "prefill_host": "127.0.0.1",
            "embedding_port": port if job == "tokenizer" else [port],
        }
        data, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
        posted = urllib.request.Request(f"{url}/encode", data, headers)
        with urllib.request.urlopen(posted, timeout=300) as response:
            response.read()
        if not receiver.poll(60_000):
            raise RuntimeError(f"no features of {case!r} came within 60 s")
        about, values = receiver.recv_multipart()
    described = pickle.loads(about)
    return torch.frombuffer(bytearray(values), dtype=described.dtype).reshape(described.shape)


def feature_errors(folder: Path, url: str, job: str) -> dict[str, float]:
    """Case -> the greatest distance from vitrt's features, over their greatest value."""
    from vitrt import VisionEncoder
    from vitrt.integrations.serving import for_sglang

    # SGLang's processor resizes as torchvision does.
    ours = VisionEncoder.from_pretrained(folder, resize="torch", device="cpu", dtype="float32")
    errors = {}
    for case in IMAGE_CASES:
        wanted = for_sglang(ours.encode(cases.images_of(case)))["precomputed_embeddings"]
        found = sent_features(url, job, case).float()
        error = (found - wanted).abs().max() / wanted.abs().max()
        errors[case] = float(f"{error:.2e}")
    return errors


def run(job: str, folder: Path, result: dict[str, Any], target: Path) -> None:
    expected = json.loads((folder / "reference.json").read_text())
    with encoder(folder, OPTIONS[job], target.with_suffix(".encoder.log")) as (url, towers):
        result["encoder_towers"] = towers
        result["feature_errors"] = feature_errors(folder, url, job)
        target.write_text(json.dumps(result | {"failed": ""}))
        transfer = {"encoder_transfer_backend": TO_TOKENIZER} if job == "tokenizer" else {}
        engine = start(folder, result, language_only=True, encoder_urls=[url], **transfer)
        result["pixels"] = {}
        for case in IMAGE_CASES:
            given = {"prompt": cases.prompt_text(case), "image_data": image_urls(case)}
            result["pixels"][case] = answer(engine, given, expected[case])
    # The engine has a tower of its own, which must not have been asked.
    lines = target.with_suffix(".encoder.log").read_text(errors="replace").splitlines()
    result["encoded_requests"] = sum("/encode completed" in line for line in lines)


if __name__ == "__main__":
    job, checkpoint, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    report: dict[str, Any] = {}
    if not CUDA:  # where there is an NCCL, encoders use it with any device
        os.environ.setdefault("SGLANG_NCCL_SO_PATH", "none")
    run(job, checkpoint, report, target)
    target.write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)
