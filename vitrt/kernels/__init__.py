"""One Triton kernel a file, with its host function and a PyTorch reference: CPU path and oracle."""
