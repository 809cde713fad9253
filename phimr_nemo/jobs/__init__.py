"""What starts, watches and restarts stages: preflight, Slurm, NeMo-Run, a node's processes, the quickstart."""
