"""What the checks of all engines have in common: which jobs they run, what they show and write."""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from checkpoints import FAMILIES, families_of
from sides import WITH, WITHOUT, Job, make_checkpoints, result_of, run_jobs, show_answers

Results = dict[str, Any]


class Check:
    """One engine's; a part is a method that takes a family and returns what goes into the JSON."""

    engine: ClassVar[str]

    def __init__(self, device: str, work: Path, output: Path, timeout: float) -> None:
        self.device, self.work, self.output, self.timeout = device, work, output, timeout

    def settings(self) -> dict[str, str]:
        """More of the environment of an engine."""
        return {}

    def run(self, jobs: list[Job], script: str | None = None) -> None:
        at_once = self.device == "cuda" and all(job.name != "times" for job in jobs)
        script, settings = script or f"{self.engine}_side.py", self.settings()
        run_jobs(script, self.engine, jobs, self.output, settings, at_once, self.timeout)

    def folder(self, family: str, size: str) -> Path:
        make_checkpoints([family], size, self.work, self.device)
        return self.work / f"{family}-{size}"

    def expected(self, folder: Path) -> Results:
        found: Results = json.loads((folder / "reference.json").read_text())
        return found

    def answers(self, job: Job, name: str) -> Results:
        """Those of a job, shown; and those from features, where the job asked with them."""
        expected = self.expected(job.folder)
        found = result_of(job, self.output)
        shown = {name: show_answers(job.folder, name, found.get("pixels", found), expected)}
        kept = ("tower", "ranks", "refused", "failed")
        shown[name] |= {key: found[key] for key in kept if key in found}
        if "features" in found or "features_error" in found:
            features = found.get("features", {"failed": found.get("features_error")})
            shown["features"] = show_answers(job.folder, "features", features, expected)
        return shown

    def tiny(self, family: str) -> Results:
        folder = self.folder(family, "tiny")
        jobs = [Job("answers", folder, side) for side in (WITHOUT, WITH)]
        self.run(jobs)
        return self.answers(jobs[0], WITHOUT) | self.answers(jobs[1], WITH)

    def ranks(self, family: str) -> Results:
        folder = self.folder(family, "tiny")
        jobs = [Job(mode, folder) for mode in ("data", "weights")]
        self.run(jobs)
        results: Results = {}
        for job in jobs:
            results |= self.answers(job, job.name)
        return results

    def full(self, family: str) -> Results:
        folder = self.folder(family, "full")
        jobs = [Job("times", folder, side) for side in (WITHOUT, WITH)]
        self.run(jobs)
        results: Results = {}
        for job in jobs:
            results |= self.answers(job, job.side)
        own, ours = (result_of(job, self.output) for job in jobs)
        if "failed" in own or "failed" in ours:
            return results
        names = ("tower_ms", "first_token_ms", "seconds_to_start", "peak_gib")
        for side, found in ((WITHOUT, own), (WITH, ours)):
            results[side] |= {name: found[name] for name in names if name in found}
        loads = own["tower_ms"].items()
        rows = {f"tower, {load}": (ms, ours["tower_ms"][load]) for load, ms in loads}
        rows["first token"] = (own["first_token_ms"], ours["first_token_ms"])
        for row, (before, after) in rows.items():
            times = f"{before:8.2f} ms own {after:8.2f} ms vitrt {before / after:5.2f}x"
            print(f"{folder.name:18s} {row:22s} {times}")
        starts = [f"{found['seconds_to_start']:.0f} s" for found in (own, ours)]
        print(f"{folder.name:18s} start: own {starts[0]}, vitrt {starts[1]}", flush=True)
        return results


def main(kind: type[Check], description: str) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="for checkpoints; default: inside --output")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--only", help="parts; default: tiny,faults and ranks or full")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--timeout", type=float, default=3600, help="of one engine, in seconds")
    parser.add_argument("--json", type=Path, help="add what was found to it, after every part")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    work = arguments.work or arguments.output / "checkpoints"
    check = kind(arguments.device, work, arguments.output, arguments.timeout)
    cuda = arguments.device == "cuda"
    parts = arguments.only or ("tiny,faults,full" if cuda else "tiny,ranks,faults")
    report: Results = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "dtype": "bfloat16" if cuda else "float32",
        "script": f"scripts/engines/{kind.engine}_check.py",
        **{name: version(name) for name in (kind.engine, "torch", "transformers")},
        "families": {},
    }
    if arguments.json is not None and arguments.json.exists():
        earlier = json.loads(arguments.json.read_text())
        if all(earlier[key] == value for key, value in report.items() if key != "families"):
            report["families"] = earlier["families"]
    for family in arguments.families.split(","):
        for part in parts.split(","):
            if family not in families_of("full" if part == "full" else "tiny"):
                continue
            begin = time.perf_counter()
            found = getattr(check, part)(family)
            report["families"].setdefault(family, {})[part] = found
            print(f"{family} {part} took {time.perf_counter() - begin:.0f} s", flush=True)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")
