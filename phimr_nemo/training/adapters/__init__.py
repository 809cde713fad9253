"""LoRA with NeMo's adapters, and what is written of them."""
