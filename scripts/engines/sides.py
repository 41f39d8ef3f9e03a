"""Engines as a user starts them, each in a process of its own: vitrt's plugin allowed, or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WITH, WITHOUT = "plugin", "own"
# Engine -> its group of entry points, its allow-list, and what these checks always plug in.
ENGINES: dict[str, tuple[str, str, dict[str, str]]] = {
    "vllm": ("vllm.general_plugins", "VLLM_PLUGINS", {}),
    "sglang": ("sglang.srt.plugins", "SGLANG_PLUGINS", {"report": "sglang_report:register"}),
}


class Job(NamedTuple):
    """One engine: `name` says what it does with the checkpoint `folder`."""

    name: str
    folder: Path
    side: str = WITH

    @property
    def stem(self) -> str:
        return f"{self.folder.name}-{self.name}-{self.side}"


def environment(engine: str, side: str, output: Path) -> dict[str, str]:
    """As a shell would set it: vitrt installed next to the engine, and allowed or not."""
    group, allow_list, own = ENGINES[engine]
    installed = output / "installed"
    info = installed / "vitrt-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vitrt\nVersion: 0\n")
    plugins = {"vitrt": f"vitrt.integrations.{engine}:register"} | own
    entries = [f"{name} = {value}" for name, value in plugins.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *entries, ""]))
    path = [str(installed), str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        allow_list: ",".join(plugins if side == WITH else own),
        "HF_HUB_OFFLINE": "1",
    }


def run_jobs(
    script: str,
    engine: str,
    jobs: Sequence[Job],
    output: Path,
    more: Mapping[str, str],
    at_once: bool,
    timeout: float,
) -> None:
    """`script NAME FOLDER RESULT.json` for every job; what it prints goes beside the result.

    A job that takes more than `timeout` seconds is ended, with all processes that it started.
    """
    for group in [jobs] if at_once else [[job] for job in jobs]:
        running = [_start(script, engine, job, output, more) for job in group]
        deadline = time.monotonic() + timeout
        try:
            for job, process in zip(group, running, strict=True):
                try:
                    process.wait(max(deadline - time.monotonic(), 0))
                except subprocess.TimeoutExpired:
                    print(f"{job.stem} was ended after {timeout:.0f} s", flush=True)
        finally:
            for process in running:  # what an engine left behind holds the device's memory
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _start(
    script: str, engine: str, job: Job, output: Path, more: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    result = output / f"{job.stem}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / script), job.name, str(job.folder), str(result)]
    environ = environment(engine, job.side, output) | more
    with (output / f"{job.stem}.log").open("wb") as log:
        return subprocess.Popen(
            command, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def result_of(job: Job, output: Path) -> dict[str, Any]:
    """What the job wrote; with its last error as "failed" where it did not come to its end."""
    result = output / f"{job.stem}.json"
    found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {"failed": ""}
    if "failed" in found:
        lines = (output / f"{job.stem}.log").read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line] or lines[-5:]
        found["failed"] = errors[-1][:2000] if errors else "no output"
    return found


def make_checkpoints(families: Sequence[str], size: str, work: Path, device: str) -> None:
    """With transformers' answers; each in a process, which gives the device's memory back."""
    environ = os.environ | {"HF_HUB_OFFLINE": "1"}
    for family in families:
        if not (work / f"{family}-{size}" / "reference.json").exists():
            command = [sys.executable, str(HERE / "cases.py"), str(work), family, size, device]
            if subprocess.run(command, env=environ, check=False).returncode:
                raise SystemExit(f"the checkpoint {family}-{size} could not be made")


def compare(answer: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Leading tokens as transformers', and the mean distance of log-probabilities.

    Those of an answer may end earlier: under its own tokens, where they are no longer the others.
    """
    pairs = list(zip(answer["tokens"], expected["tokens"], strict=True))
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    logprobs = zip(answer["logprobs"], expected["logprobs"], strict=False)
    errors = [abs(a - b) for a, b in logprobs]
    found = {"equal_tokens": equal, "logprob_error": float(f"{sum(errors) / len(errors):.3g}")}
    if answer["prompt_tokens"] != expected["prompt_tokens"]:
        found["prompt_tokens"] = [answer["prompt_tokens"], expected["prompt_tokens"]]
    return found


def show_answers(
    folder: Path, name: str, answers: dict[str, Any], expected: dict[str, Any]
) -> dict[str, Any]:
    """One line of a contender's answers against transformers', which are returned too."""
    label = f"{folder.name:18s} {name:16s}"
    if "failed" in answers:
        print(f"{label} FAILED: {answers['failed']}", flush=True)
        return answers
    cases = {case: compare(answers[case], expected[case]) for case in expected if case in answers}
    cells = [f"{case} {c['equal_tokens']}/16 {c['logprob_error']:.2e}" for case, c in cases.items()]
    other = [case for case, c in cases.items() if "prompt_tokens" in c]
    note = f"; OTHER PROMPT {', '.join(other)}" if other else ""
    found: dict[str, Any] = {
        "tokens": {case: answers[case]["tokens"] for case in cases},
        "against_transformers_float32": cases,
    }
    if "again" in answers:
        same = answers["again"]["tokens"] == answers["one"]["tokens"]
        note += f"; from prefix cache: {same}"
        found["from_prefix_cache_the_same"] = same
    print(f"{label} {'; '.join(cells)}{note}", flush=True)
    return found
