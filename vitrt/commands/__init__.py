"""What the smaller subcommands do."""
