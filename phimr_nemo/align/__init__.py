"""Stages 3 and 4: NeMo-Aligner's trainers over the Megatron-Core model.

Megatron and NeMo bind CUDA functions when they are imported, so the redirections for machines without CUDA come
before any module of this package.
"""

from phimr_nemo.training import platform

platform.prepare()
