"""vLLM's offline engine with vitrt's tower against vLLM's own, on random checkpoints.

    python scripts/engines/vllm_check.py --output DIR [--only tiny,full] [--families qwen3_vl]

"tiny": 16 greedy tokens of prompts with one image, three images and a clip: with the plugin,
without it (VLLM_PLUGINS=), and from vitrt's features (`image_embeds`), each against transformers in
float32; and features through vLLM's file connector, where "known" must be the answer and "unknown"
must not. "full": the towers of released sizes in front of two layers of language model: the same
answers, the tower's time inside the engine, and the time to a first token. Needs vllm and
transformers; a CPU build of vLLM runs "tiny" too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WITH, WITHOUT = "plugin", "own"


def environment(side: str, output: Path) -> dict[str, str]:
    """As a shell would set it: vitrt installed, and allowed or not."""
    installed = output / "installed"
    info = installed / "vitrt-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vitrt\nVersion: 0\n")
    entry = "[vllm.general_plugins]\nvitrt = vitrt.integrations.vllm:register\n"
    (info / "entry_points.txt").write_text(entry)
    path = [str(installed), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "VLLM_PLUGINS": "vitrt" if side == WITH else "",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(output / "vllm-cache"),
    }


def run_side(job: str, folder: Path, side: str, output: Path) -> subprocess.Popen[bytes]:
    log = (output / f"{folder.name}-{job}-{side}.log").open("wb")
    command = [sys.executable, str(HERE / "vllm_side.py"), job, str(folder)]
    command.append(str(output / f"{folder.name}-{job}-{side}.json"))
    return subprocess.Popen(
        command, env=environment(side, output), stdout=log, stderr=subprocess.STDOUT
    )


def result_of(job: str, folder: Path, side: str, output: Path) -> dict[str, Any]:
    stem = output / f"{folder.name}-{job}-{side}"
    if stem.with_suffix(".json").exists():
        return json.loads(stem.with_suffix(".json").read_text())
    lines = stem.with_suffix(".log").read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line] or lines[-5:]
    return {"failed": errors[-1] if errors else "no output"}


def distance(answer: dict[str, Any], expected: dict[str, Any]) -> str:
    """Equal tokens from the first on, and the mean distance of log-probabilities."""
    pairs = list(zip(answer["tokens"], expected["tokens"], strict=True))
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    logprobs = zip(answer["logprobs"], expected["logprobs"], strict=True)
    errors = [abs(a - b) for a, b in logprobs]
    prompt = "" if answer["prompt_tokens"] == expected["prompt_tokens"] else " OTHER PROMPT"
    return f"{equal:2d}/{len(pairs)} {sum(errors) / len(errors):.2e}{prompt}"


def show_answers(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    expected = json.loads(Path(folder, "reference.json").read_text())
    for name, answers in results.items():
        if "failed" in answers:
            print(f"{folder.name:18s} {name:9s} FAILED: {answers['failed']}")
            continue
        cells = [f"{case} {distance(answers[case], expected[case])}" for case in expected]
        again = answers["again"]["tokens"] == answers["one"]["tokens"]
        print(f"{folder.name:18s} {name:9s} {'; '.join(cells)}; from prefix cache: {again}")


def make_checkpoints(families: list[str], sizes: list[str], work: Path) -> None:
    """With transformers' answers; each in a process, which gives the device's memory back."""
    script = str(HERE / "cases.py")
    environ = os.environ | {"HF_HUB_OFFLINE": "1"}
    processes = [
        subprocess.Popen([sys.executable, script, str(work), family, size], env=environ)
        for size in sizes
        for family in families
        if not (work / f"{family}-{size}" / "reference.json").exists()
    ]
    if any(process.wait() for process in processes):
        raise SystemExit("a checkpoint could not be made")


def tiny(families: list[str], work: Path, output: Path) -> None:
    folders = [work / f"{family}-tiny" for family in families]
    jobs = [("answers", f, s) for f in folders for s in (WITH, WITHOUT)]
    jobs += [("ec", f, WITH) for f in folders]
    for process in [run_side(*job, output) for job in jobs]:
        process.wait()
    for folder in folders:
        results = {}
        for side in (WITHOUT, WITH):
            found = result_of("answers", folder, side, output)
            results[side] = found.get("pixels", found)
            print(f"{folder.name:18s} {side:9s} tower of {found.get('tower')}")
            if side == WITH and "failed" not in found:
                results["features"] = found.get("features", {"failed": found.get("features_error")})
        show_answers(folder, results)
        found = result_of("ec", folder, WITH, output)
        expected = json.loads((folder / "reference.json").read_text())["one"]["tokens"]
        same = {name: tokens == expected for name, tokens in found.items()}
        print(f"{folder.name:18s} EC folder {found.get('failed', same)}")


def full(families: list[str], work: Path, output: Path) -> None:
    for family in families:
        folder = work / f"{family}-full"
        found = {}
        for side in (WITHOUT, WITH):
            run_side("times", folder, side, output).wait()
            found[side] = result_of("times", folder, side, output)
        show_answers(folder, {side: value.get("pixels", value) for side, value in found.items()})
        if any("failed" in value for value in found.values()):
            continue
        own, ours = found[WITHOUT], found[WITH]
        rows = {
            f"tower, {load}": (own["tower_ms"][load], ours["tower_ms"][load])
            for load in own["tower_ms"]
        }
        rows["first token"] = (own["first_token_ms"], ours["first_token_ms"])
        for row, (before, after) in rows.items():
            times = f"{before:8.2f} ms own {after:8.2f} ms vitrt {before / after:5.2f}x"
            print(f"{folder.name:18s} {row:22s} {times}")
        starts = [f"{v['seconds_to_start']:.0f} s, {v['peak_gib']:.1f} GiB" for v in (own, ours)]
        print(f"{folder.name:18s} start and peak memory: own {starts[0]}; vitrt {starts[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="for checkpoints; default: inside --output")
    parser.add_argument("--only", default="tiny,full")
    parser.add_argument("--families", default="qwen3_vl,qwen2_5_vl")
    arguments = parser.parse_args()
    families = arguments.families.split(",")
    work = arguments.work or arguments.output / "checkpoints"
    arguments.output.mkdir(parents=True, exist_ok=True)
    parts = arguments.only.split(",")
    make_checkpoints(families, parts, work)
    for part in parts:
        begin = time.perf_counter()
        {"tiny": tiny, "full": full}[part](families, work, arguments.output)
        print(f"{part} took {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
