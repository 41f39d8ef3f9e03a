"""`vitrt bench` in the test's process, on the CPU and in no time."""

from __future__ import annotations

import argparse

from vitrt.commands.bench import add_arguments, run


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([*arguments, "--device", "cpu", "--seconds", "0.01", "--quiet"]))
