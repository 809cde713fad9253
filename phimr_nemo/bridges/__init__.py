"""Ways to other trainers: Megatron-Bridge, NeMo-RL, Nemotron, TRL. Importing this does nothing."""
