"""One Triton kernel a file: the kernel, its host function and a PyTorch reference that is the CPU path and the oracle."""
