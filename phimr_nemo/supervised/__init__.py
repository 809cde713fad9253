"""Stages 1 and 2 on NeMo 2.0."""
