"""The built-in engine: a PyTorch decoder with a KV cache."""
