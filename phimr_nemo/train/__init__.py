"""Stages 1 and 2 on NeMo 2.0, what runs beside them, and the conversion of checkpoints."""
