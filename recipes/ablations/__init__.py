"""Ablations: one question a recipe, each on finished runs of the main recipe."""
