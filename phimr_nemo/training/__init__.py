"""The floor of all four training stages: platform, precision, optimizer, checkpoints, metrics, guard."""
