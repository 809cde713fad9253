"""The model as a Megatron-Core GPTModel."""
