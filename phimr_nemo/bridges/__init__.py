"""Ways to NVIDIA's and Hugging Face's other trainers: Megatron-Bridge, NeMo-RL, Nemotron, TRL. Importing does nothing."""
