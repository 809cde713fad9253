"""Weights on the disk: Hugging Face directories, Megatron dist-checkpoints, GGUF, and the way between them."""
