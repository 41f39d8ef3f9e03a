"""What the subcommands do, and what they share at a terminal."""
