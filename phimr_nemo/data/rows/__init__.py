"""The stage `pack` and what a trainer reads: conversations as tokens, rows and batches."""
