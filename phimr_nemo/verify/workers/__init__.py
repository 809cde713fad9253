"""Sandboxed worker processes in which answers are read and compared under limits of time and memory."""
