"""`python -m vitrt`."""

from vitrt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
