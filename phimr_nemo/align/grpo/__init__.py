"""Stage 4: GRPO on NeMo-Aligner's ReinforceTrainer."""
