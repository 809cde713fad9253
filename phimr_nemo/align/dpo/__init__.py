"""Stage 3: rollout DPO on NeMo-Aligner's DPOTrainer."""
