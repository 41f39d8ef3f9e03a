"""The parts of scripts/engines that need no engine: faulty checkpoints, comparisons, plugins."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitrt.integrations import sglang, vllm

ENGINES = Path(__file__).resolve().parents[1] / "scripts" / "engines"


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ENGINES))
    return importlib.import_module("sides")


def tensors_of(folder: Path) -> list[str]:
    """The names in all files, as an engine without an index reads them."""
    files = sorted(folder.glob("*.safetensors"))
    return sorted(name for file in files for name in load_file(file))


def test_a_faulty_checkpoint_has_its_fault(tmp_path: Path, sides: ModuleType) -> None:
    checkpoints = importlib.import_module("checkpoints")
    folder = tmp_path / "whole"
    folder.mkdir()
    name = "model.visual.blocks.1.attn.qkv.bias"
    other = "model.visual.blocks.1.norm1.bias"
    save_file({name: torch.ones(2), other: torch.ones(3)}, folder / "model.safetensors")
    held = {}
    for fault in ("missing", "renamed", "doubled"):
        broken, named = checkpoints.faulty_checkpoint(folder, tmp_path / fault, fault)
        held[fault] = (named.removeprefix(name), tensors_of(broken))
    assert held == {
        "missing": ("", [other]),
        "renamed": ("es", [f"{name}es", other]),
        "doubled": ("", [name, name, other]),
    }
    assert tensors_of(folder) == [name, other]


def test_experts_are_saved_as_they_are_released(tmp_path: Path, sides: ModuleType) -> None:
    """Engines take them by that layout alone and want to be told how they are weighed.

    transformers takes both layouts, and knows one way.
    """
    from transformers import AutoModelForImageTextToText

    checkpoints = importlib.import_module("checkpoints")
    folder = checkpoints.make_checkpoint(tmp_path, "qwen3_vl_moe", "tiny")
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["norm_topk_prob"] is True
    prefix = "model.language_model.layers.1.mlp.experts."
    saved = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(prefix)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert shapes == {"gate_up_proj": (8, 256, 2 * 192), "down_proj": (8, 192, 256)}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    for name, tensor in saved.items():
        assert torch.equal(model.get_parameter(prefix + name), tensor.transpose(1, 2)), name


# Stands for sglang.launch_server: told to end, it says why; else it answers as an encoder does.
LAUNCHED = """
import http.server, json, os, pathlib, sys
if "--tp-size" in sys.argv:
    sys.exit("ValueError: two ranks do not fit")
port = int(sys.argv[sys.argv.index("--port") + 1])
report = pathlib.Path(os.environ["TOWER_REPORT"], f"{os.getpid()}.json")
report.write_text(json.dumps({"tower": "of an encoder" * ("--encoder-only" in sys.argv)}))
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


@pytest.fixture
def encoder_side(tmp_path: Path, sides: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    (tmp_path / "sglang" / "launch_server.py").write_text(LAUNCHED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return importlib.import_module("sglang_encoder_side")


def test_an_encoder_is_there_for_as_long_as_it_is_needed(
    tmp_path: Path, encoder_side: ModuleType
) -> None:
    log = tmp_path / "log"
    with encoder_side.encoder(tmp_path, [], log) as (url, towers):
        assert towers == ["of an encoder"]
        with urllib.request.urlopen(f"{url}/health", timeout=10) as response:
            assert response.status == 200
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/health", timeout=10)


def test_an_encoder_that_does_not_start_says_why(tmp_path: Path, encoder_side: ModuleType) -> None:
    options = encoder_side.OPTIONS["ranks"]
    with (
        pytest.raises(RuntimeError, match="two ranks do not fit"),
        encoder_side.encoder(tmp_path, options, tmp_path / "log"),
    ):
        pass


def test_answers_are_compared_until_they_differ(sides: ModuleType) -> None:
    expected = {"tokens": [5, 6, 7], "logprobs": [-1.0, -2.0, -3.0, -4.0], "prompt_tokens": 9}
    same = sides.compare(expected, expected)
    assert same == {"equal_tokens": 3, "logprob_error": 0.0}
    other = expected | {"tokens": [5, 8, 7], "logprobs": [-1.5, -2.0], "prompt_tokens": 8}
    found = sides.compare(other, expected)
    assert found == {"equal_tokens": 1, "logprob_error": 0.25, "prompt_tokens": [8, 9]}


@pytest.mark.parametrize(("engine", "module"), [("vllm", vllm), ("sglang", sglang)])
def test_an_engine_is_offered_the_plugin(
    engine: str, module: ModuleType, tmp_path: Path, sides: ModuleType
) -> None:
    group, allow_list, own = sides.ENGINES[engine]
    allowed = sides.environment(engine, sides.WITH, tmp_path)[allow_list]
    refused = sides.environment(engine, sides.WITHOUT, tmp_path)[allow_list]
    assert set(allowed.split(",")) - {"vitrt"} == set(own) == set(refused.split(",")) - {""}
    (found,) = importlib.metadata.distributions(path=[str(tmp_path / "installed")])
    plugins = {point.name: point for point in found.entry_points if point.group == group}
    assert plugins["vitrt"].load() is module.register
    assert (ENGINES / f"{engine}_side.py").exists()


def is_running(process: int) -> bool:
    """A zombie, which only waits for its parent's notice, is not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_job_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, sides: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "hang.py"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "if sys.argv[1] == 'hangs':\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        '    pathlib.Path(sys.argv[3]).write_text(\'{"failed": "", "child": %d}\' % child.pid)\n'
        "    print('LastError', flush=True)\n"
        "    time.sleep(600)\n"
        "pathlib.Path(sys.argv[3]).write_text('{\"done\": true}')\n"
    )
    monkeypatch.setattr(sides, "HERE", tmp_path)
    wait = sides.subprocess.Popen.wait

    def until_it_hangs(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        """The time is over once there is nothing more to wait for."""
        if timeout is not None and "hangs" in process.args:
            while not any("LastError" in log.read_text() for log in tmp_path.glob("*.log")):
                assert process.poll() is None
                time.sleep(0.02)
            raise subprocess.TimeoutExpired(process.args, timeout)
        return wait(process, timeout)

    monkeypatch.setattr(sides.subprocess.Popen, "wait", until_it_hangs)
    jobs = [sides.Job(name, tmp_path / "checkpoint") for name in ("hangs", "ends")]
    sides.run_jobs(script.name, "sglang", jobs, tmp_path, {}, at_once=False, timeout=60)
    hung, ended = (sides.result_of(job, tmp_path) for job in jobs)
    assert ended == {"done": True}
    assert hung["failed"] == "LastError"
    deadline = time.monotonic() + 10
    while is_running(hung["child"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(hung["child"])
