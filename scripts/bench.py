"""vitrt and transformers side by side: see `--help`, or `vitrt bench --help`, which is the same."""

import sys
from pathlib import Path

# A checkout is benchmarked as it stands, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vitrt.commands.bench import main

if __name__ == "__main__":
    raise SystemExit(main())
