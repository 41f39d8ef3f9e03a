"""The command `vitrt`: its subcommands, and their exit codes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from vitrt.commands import COMMANDS
from vitrt.commands.console import (
    FAILED,
    INTERRUPTED,
    OK,
    Parser,
    held_interrupts,
    let_go,
    prepare_streams,
    set_up_logging,
)
from vitrt.version import __version__

logger = logging.getLogger("vitrt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    prepare_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parser(arguments).parse_args(arguments)
    set_up_logging(verbose=args.verbose, as_json=getattr(args, "log_json", False))
    try:
        with held_interrupts():  # a third of a second
            import_module("numpy")
        return int(args.run(args))
    except KeyboardInterrupt:
        logger.error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        let_go(sys.stdout)  # the reader of the output (head, say) has read enough
        return OK
    except (ValueError, OSError) as error:
        logger.debug("", exc_info=True)
        logger.error("%s", error)
        return FAILED
    except Exception:
        logger.exception("this should not have happened")
        return FAILED
    finally:
        let_go(sys.stderr)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """A parser of all commands; only the one asked for is imported and knows its options."""
    parser = Parser(prog="vitrt", description="Vision features of Qwen's models.")
    parser.add_argument("--version", action="version", version=f"vitrt {__version__}")
    asked_for = next((word for word in arguments if not word.startswith("-")), None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name == asked_for:
            module = import_module(f"vitrt.commands.{name}")
            module.add_arguments(command)
            command.add_argument(
                "-v", "--verbose", action="store_true", help="log how things ran, too"
            )
            command.set_defaults(run=module.run)
    return parser
