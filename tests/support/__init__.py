"""What several test modules share: checkpoints, folders, servers, ranks."""
