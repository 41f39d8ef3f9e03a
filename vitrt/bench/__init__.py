"""`vitrt bench`: vitrt and transformers on the same weights and pixels, in one process and one run.

Only the command line imports from here, and nothing here imports transformers before one of its
peers is asked for.
"""

from vitrt.bench.cli import add_arguments, run

__all__ = ["add_arguments", "run"]
