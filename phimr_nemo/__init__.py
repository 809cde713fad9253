"""The Phi-4-Mini-Reasoning recipe on NeMo, Megatron-Core and NeMo-Aligner. Importing this does nothing."""

__version__ = "0.1.0"
