"""vLLM has one build for CPUs and another for GPUs: the one that is here fits the machine."""

from __future__ import annotations

from phimr_nemo.errors import UserError
from phimr_nemo.process.gpus import promised_gpus


def require_promised_gpus(program: str) -> None:
    """Refuse to sample on the CPU where there are GPUs to sample on; it would be slower by orders of magnitude.

    Args:
        program: what would, for the message.

    Raises:
        UserError: the machine or the job has GPUs, and torch here sees none.
    """
    reason = promised_gpus()
    if not reason:
        return
    import torch

    if torch.cuda.is_available():
        return
    build = (
        "its CPU build" if torch.version.cuda is None else f"its build for CUDA {torch.version.cuda}, without a GPU"
    )
    raise UserError(
        f"{program}: torch {torch.__version__} is {build}, and {reason} is here",
        rule="where there are GPUs vLLM samples on them",
        remedy="make setup-vllm VLLM_BUILD=cuda (a container needs its GPUs passed in: --nv, --gpus all); "
        "CUDA_VISIBLE_DEVICES= in front of the command samples on the CPU on purpose",
    )
