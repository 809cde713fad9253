"""Processes: how one is told to stop, and how those that it starts are told, and end when it does."""
