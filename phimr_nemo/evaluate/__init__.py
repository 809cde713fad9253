"""Scoring models: benchmarks, statistics, the evaluation itself, tables and pictures."""
