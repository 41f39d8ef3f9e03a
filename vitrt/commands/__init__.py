"""The subcommands of `vitrt`, one file each."""

__all__ = ["console", "encode", "info", "options", "show"]
