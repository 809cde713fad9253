"""On-policy distillation: the loop of rounds with a teacher in the place of rewards."""
