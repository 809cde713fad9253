"""New weights from GPU to GPU: a process group of the trainer and the servers' workers, and both its ends."""
