"""vLLM in this process, as an engine that writes text. The one file that imports vLLM.

vLLM lives in an environment of its own (`make setup-vllm`): its torch and transformers are not the trainers'.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.config import LongRopePolicy, VLLMTeacher
from phimr_nemo.data.chat import END, END_OF_TEXT, render_prompts, stop_token_ids
from phimr_nemo.errors import UserError
from phimr_nemo.generate.plan import QUESTION
from phimr_nemo.generate.sampler import Completion, Request, SamplingParams
from phimr_nemo.model.architecture import CONFIG_FILE, MODEL_TYPE, Architecture
from phimr_nemo.store import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES: Final = {"fp32": "float32", "bf16": "bfloat16"}
IN_PROCESS: Final = "VLLM_ENABLE_V1_MULTIPROCESSING"


class VLLMEngine:
    """Samples with vLLM. Seeds travel with the requests; equal seeds give equal responses up to rounding.

    Args:
        teacher: the model's directory and how it is run.
        max_length: prompt and response together (tokens); with it vLLM chooses LongRoPE's factors.
        stop_ids: end a response, beside those that the model's own files name.

    Raises:
        UserError: vLLM is not installed here, or refuses the model.
    """

    def __init__(self, teacher: VLLMTeacher, *, max_length: int, stop_ids: Sequence[int]) -> None:
        # An engine in a process of its own outlives this one when this one is killed.
        os.environ.setdefault(IN_PROCESS, "0")
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(
                f"teacher.kind=vllm, but vLLM cannot be imported here ({error})",
                rule="vLLM has an environment of its own",
                remedy="make setup-vllm, then .venv-vllm/bin/phimr generate ...; or serve the model elsewhere "
                "and use teacher.kind=endpoint",
            ) from error
        self._stop_ids = list(stop_ids)
        try:
            self._llm = LLM(
                model=str(teacher.path),
                tokenizer=str(teacher.path),
                trust_remote_code=False,
                load_format="safetensors",
                dtype=DTYPES[teacher.dtype],
                max_model_len=max_length,
                max_num_seqs=teacher.max_batch,
                tensor_parallel_size=teacher.tensor,
                gpu_memory_utilization=teacher.memory_share,
                enforce_eager=teacher.eager,
            )
        except ValueError as error:
            # vLLM checks its settings against the model and the memory, and says what does not fit.
            raise UserError(
                f"vLLM refuses {teacher.path}: {error}",
                rule="the model is one that vLLM supports, and it fits",
                remedy="change max_new_tokens, max_batch, tensor, memory_share or dtype",
            ) from error

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Sample one completion for each request, in the requests' order, without log-probabilities.

        Raises:
            UserError: a prompt is empty or too long.
            RuntimeError: vLLM ended a response for another reason than a stop token or its length.
        """
        from vllm import SamplingParams as VLLMParams
        from vllm import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in requests]
        settings = [
            VLLMParams(
                temperature=params.temperature,
                top_p=params.top_p,
                max_tokens=params.max_new_tokens,
                seed=request.seed,
                stop_token_ids=self._stop_ids,
                detokenize=False,
            )
            for request in requests
        ]
        try:
            outputs = self._llm.generate(prompts, settings, use_tqdm=True)
        except ValueError as error:
            raise UserError(
                f"vLLM refuses a prompt: {error}",
                rule="a prompt has at least one token and leaves room for a response",
                remedy="remove the problem, or raise max_new_tokens",
            ) from error
        return [_completion(request, output) for request, output in zip(requests, outputs, strict=True)]

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()


def _completion(request: Request, output: Any) -> Completion:
    sample = output.outputs[0]
    if sample.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended the response to request {request.id} with {sample.finish_reason!r}")
    return Completion(request.id, tuple(sample.token_ids), (), sample.finish_reason)


def open_vllm(teacher: VLLMTeacher, questions: Sequence[str]) -> tuple[VLLMEngine, PreTrainedTokenizerBase, str]:
    """An engine for a Hugging Face directory.

    Args:
        teacher: the directory and how it is run.
        questions: all that will be asked; the longest decides the engine's maximum length.

    Returns:
        The engine, the model's tokenizer, and the hash of its weights.

    Raises:
        UserError: vLLM is missing, the model is unreadable or has no chat template, a question spells a special
            token, or vLLM would use other LongRoPE factors than the policy says.
    """
    tokenizer = _load_tokenizer(teacher.path)
    prompts = render_prompts(tokenizer, [teacher.prompt.replace(QUESTION, question) for question in questions])
    max_length = max(map(len, prompts), default=0) + teacher.max_new_tokens
    check_longrope(teacher.path, teacher.longrope, max_length)
    is_phi = {END, END_OF_TEXT} <= set(tokenizer.get_added_vocab())
    engine = VLLMEngine(teacher, max_length=max_length, stop_ids=stop_token_ids(tokenizer) if is_phi else ())
    return engine, tokenizer, weights_hash(teacher.path)


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of any model; unlike the trained model's it need not be of Phi's kind."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} holds no usable tokenizer: {error}",
            rule="a teacher's directory has the files of a fast tokenizer",
            remedy="download them beside the weights",
        ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer in {directory} has no chat template",
            rule="a teacher is asked in its own chat format",
            remedy="use the instruction-tuned model, or add its chat_template",
        )
    return tokenizer


def check_longrope(directory: Path, policy: LongRopePolicy, max_length: int) -> None:
    """Refuse a policy that vLLM does not follow at this length.

    vLLM uses the long factors for every sequence as soon as its maximum length exceeds the original one.

    Raises:
        UserError: the policy asks for the short ones there.
    """
    config = json.loads((directory / CONFIG_FILE).read_text("utf-8"))
    if config.get("model_type") != MODEL_TYPE:
        return
    architecture = Architecture.from_directory(directory)
    original = architecture.original_max_position_embeddings
    if architecture.long_factor is None or max_length <= original:
        return
    if policy != "long_when_max_length_exceeds_original":
        raise UserError(
            f"longrope={policy} with sequences of up to {max_length} tokens",
            rule=f"above {original} tokens vLLM uses LongRoPE's long factors for every sequence, short ones too",
            remedy="use longrope=long_when_max_length_exceeds_original (and train with it), "
            f"or lower max_new_tokens until prompt and response fit {original}",
        )


def weights_hash(directory: Path) -> str:
    """A digest of the weights: for a Phi model the one that all stages use, for others that of the files.

    Raises:
        UserError: there are no safetensors files.
    """
    if json.loads((directory / CONFIG_FILE).read_text("utf-8")).get("model_type") == MODEL_TYPE:
        from phimr_nemo.model.hf import HFDirectory

        return HFDirectory(directory).weights_hash()
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{directory} holds no *.safetensors",
            rule="weights are safetensors files",
            remedy="download the model's safetensors; pickled weights are not read",
        )
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name}|{file_sha256(file)}|".encode())
    return digest.hexdigest()
