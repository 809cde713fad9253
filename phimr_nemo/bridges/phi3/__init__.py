"""Phi-3, Phi-3.5 and Phi-4-mini for Megatron-Bridge; importing this registers the bridge.

The folder stands alone: as ``megatron/bridge/models/phi3`` in a checkout of Megatron-Bridge it works unchanged.
"""

from .phi3_bridge import Phi3Bridge
from .phi3_provider import Phi3ModelProvider

__all__ = ["Phi3Bridge", "Phi3ModelProvider"]
