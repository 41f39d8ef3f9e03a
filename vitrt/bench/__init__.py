"""`vitrt bench`: vitrt and transformers on the same weights and pixels, in one process and one run.

Nothing here is imported by the rest of the package but the command line, and nothing here imports
transformers before a peer of its is asked for.
"""

from vitrt.bench.cli import add_arguments, run

__all__ = ["add_arguments", "run"]
