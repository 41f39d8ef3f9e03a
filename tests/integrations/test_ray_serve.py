"""Features over HTTP by two replicas on a local Ray, one of which dies under load."""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("ray.serve", reason="ray is not installed: pip install 'vitrt[ray]'")

from ray import serve

from vitrt import VisionEncoder
from vitrt.features import ImageFeatures
from vitrt.integrations.ray_serve import EncoderService
from vitrt.store.content import from_bytes

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MOST_BYTES = 100_000
TRIES = 100


@dataclass
class Service:
    url: str
    handle: Any
    encoder: VisionEncoder


@pytest.fixture(scope="module")
def service(tiny_qwen3_vl: Path, cluster: None) -> Iterator[Service]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment = EncoderService.options(num_replicas=2, ray_actor_options={"num_cpus": 0.5})
    handle = serve.run(deployment.bind(tiny_qwen3_vl, max_image_bytes=MOST_BYTES))
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    try:
        yield Service(f"http://127.0.0.1:{port}/", handle, encoder)
    finally:
        serve.shutdown()


def png(seed: int) -> bytes:
    height, width = 40 + 30 * (seed % 7), 50 + 40 * (seed % 5)
    cells = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(cells).resize((width, height)).save(content, "png")
    return content.getvalue()


def ask(url: str, content: bytes | None, query: str = "") -> tuple[int, bytes]:
    """Status and content; sent again while no replica answers for it, as any client must."""
    for _ in range(TRIES):
        try:
            request = urllib.request.Request(f"{url}?{query}", content)
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return error.code, error.read()
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no answer to {query} in {TRIES} tries")


def assert_near(found: ImageFeatures, wanted: ImageFeatures) -> None:
    """Equal but for the order of sums, which the size of a product decides."""
    assert found.grid_thw == wanted.grid_thw
    assert found.deepstack is not None and wanted.deepstack is not None
    for got, want in (
        (found.embeddings, wanted.embeddings),
        (found.deepstack, wanted.deepstack),
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def replicas(service: Service) -> dict[int, dict[str, int]]:
    """By process; asked often enough that all are met."""
    answers = [service.handle.stats.remote().result(timeout_s=120) for _ in range(20)]
    return {answer["pid"]: answer for answer in answers}


def test_one_image(service: Service) -> None:
    status, content = ask(service.url, png(3), "name=cat.png")
    (wanted,) = service.encoder.encode([png(3)])
    assert status == 200
    assert_near(from_bytes(content), wanted)
    status, content = ask(service.url, png(3), "pool=mean")
    assert status == 200
    torch.testing.assert_close(from_bytes(content).pooled(), wanted.pooled(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "query", "status", "words"),
    [
        (b"no image", "name=a%20b.png", 400, "a b.png: not an image"),
        (b"", "name=none.png", 400, "none.png"),
        (png(0)[:60], "name=cut.png", 400, "cut.png"),
        (bytes(MOST_BYTES + 1), "name=big.png", 413, f"big.png: it has more than {MOST_BYTES}"),
        (png(0), "name=x.png&pool=max", 400, "x.png: pool is 'max'"),
        (None, "", 405, "POST"),
    ],
)
def test_what_is_wrong_is_said(
    service: Service, content: bytes | None, query: str, status: int, words: str
) -> None:
    found, answer = ask(service.url, content, query)
    assert found == status
    assert words in json.loads(answer)["error"]


def test_two_hundred_at_once_though_a_replica_dies(service: Service) -> None:
    before = replicas(service)
    victim = next(iter(before))
    bad = set(range(7, 200, 20))
    answered = threading.Semaphore(0)

    def send(index: int) -> tuple[int, bytes]:
        content = b"broken" + bytes(index) if index in bad else png(index)
        answer = ask(service.url, content, f"name={quote(f'photo {index:03}.png')}")
        answered.release()
        return answer

    with ThreadPoolExecutor(200) as clients:
        sent = [clients.submit(send, index) for index in range(200)]
        for _ in range(30):
            answered.acquire()
        os.kill(victim, signal.SIGKILL)
        answers = [each.result() for each in sent]

    wanted = service.encoder.encode([png(index) for index in range(200)])
    for index, (status, content) in enumerate(answers):
        if index in bad:
            assert status == 400
            assert f"photo {index:03}.png" in json.loads(content)["error"]
        else:
            assert status == 200, content
            assert_near(from_bytes(content), wanted[index])
    after = replicas(service)
    assert victim not in after
    assert max(each["largest"] for each in after.values()) > 1


def test_the_example_asks(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(b"broken")
    example = runpy.run_path(str(EXAMPLES / "ray_serve.py"))
    example["main"](["ask", service.url, str(tmp_path / "a.png"), str(tmp_path / "b.png")])
    good, bad = capsys.readouterr().out.splitlines()
    (wanted,) = service.encoder.encode([png(1)])
    assert good.endswith(f"{list(wanted.embeddings.shape)}, grid {wanted.grid_thw}")
    assert "b.png: not an image" in bad
