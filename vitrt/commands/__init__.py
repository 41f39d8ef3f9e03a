"""The subcommands of `vitrt`, one file each: `add_arguments(parser)` and `run(args) -> exit code`.

A module here imports nothing heavy before its `run` is called, so that `--help` comes at once.
"""

__all__ = ["COMMANDS", "console"]

COMMANDS = {
    "encode": "images -> features",
    "export": "features as a table for vector databases",
    "extract": "a vision-only checkpoint",
    "info": "size, cost by image size, and what can run here",
    "check": "read an output folder back and verify it",
    "show": "a picture of the features",
    "compile": "kernels for a GPU, ahead, without one",
    "verify": "errors against transformers",
    "bench": "speed against transformers and others",
}
