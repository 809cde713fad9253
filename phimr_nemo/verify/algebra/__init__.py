"""Exact equality of expressions: reading them into terms, exact, modular and adaptive numeric values, test points."""
