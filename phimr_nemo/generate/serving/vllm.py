"""vLLM in this process: as an engine that writes text, and as a sampler whose weights can be replaced.

vLLM lives in an environment of its own (`make setup-vllm`): its torch and transformers are not the trainers'.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.config import LongRopePolicy, VLLMEngine
from phimr_nemo.errors import UserError
from phimr_nemo.generate.sampler import Completion, Request, SamplingParams
from phimr_nemo.generate.serving.gpus import require_promised_gpus
from phimr_nemo.generate.serving.weights import ABANDON, BUCKET_NAME, LOGPROBS, MB, Arrivals, buckets, shared_memory
from phimr_nemo.model.architecture import Architecture, is_phi, is_readable
from phimr_nemo.model.dtypes import TORCH_NAMES
from phimr_nemo.model.regime import warn_of_other_regime
from phimr_nemo.model.table import tensor_shapes
from phimr_nemo.store.atomic import scratch_file
from phimr_nemo.store.content import file_sha256

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

AUTOMATIC: Final = "auto"
IN_PROCESS: Final = "VLLM_ENABLE_V1_MULTIPROCESSING"
WEIGHTS_BACKEND: Final = "phimr_files"
"""The name under which our engine for new weights is registered with vLLM."""
WORKER_EXTENSION: Final = "phimr_nemo.generate.serving.vllm_worker.Extension"


class VLLMSampler:
    """vLLM in the trainer's process, as a :class:`phimr_nemo.generate.sampler.Sampler`.

    Args:
        model: the run's base, whose weights it begins with.
        options: how it is run.
        dtype: what to compute in; None = what the weights are in.
        max_length: prompt and response together (tokens); with it vLLM chooses LongRoPE's factors.
        stop_ids: end a response.

    Raises:
        UserError: vLLM is not installed here.
    """

    def __init__(
        self,
        model: Path,
        options: VLLMEngine,
        *,
        dtype: str | None,
        max_length: int,
        stop_ids: Sequence[int],
    ) -> None:
        os.environ.setdefault(IN_PROCESS, "0")
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(
                f"engine.kind=vllm, but vLLM cannot be imported here ({error})",
                rule="vLLM in the process needs an environment that has the trainer and vLLM",
                remedy="serve the model from vLLM's own environment (`phimr serve`) and use engine.kind=vllm_server",
            ) from error
        require_promised_gpus("engine.kind=vllm")
        self._options, self._stop_ids, self._version = options, list(stop_ids), -1
        self._arrivals = Arrivals(tensor_shapes(Architecture.from_directory(model)))
        self._llm = LLM(
            model=str(model),
            trust_remote_code=False,
            load_format="safetensors",
            dtype=AUTOMATIC if dtype is None else TORCH_NAMES[dtype],
            max_model_len=max_length,
            max_num_seqs=options.max_batch,
            gpu_memory_utilization=options.memory_share,
            enforce_eager=options.eager,
            logprobs_mode=LOGPROBS,
            worker_extension_cls=WORKER_EXTENSION,
            weight_transfer_config={"backend": WEIGHTS_BACKEND},
        )

    @property
    def version(self) -> int:
        """The version of the weights in use."""
        return self._version

    @property
    def counts(self) -> Mapping[str, int]:
        """Nothing: an engine in the process loses no request."""
        return {}

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights, bucket by bucket through shared memory.

        Raises:
            WrongWeights: they are not exactly the model's; the engine cannot be used until a whole set has come.
        """
        from safetensors.torch import save_file

        self._version = -1
        self._llm.collective_rpc(ABANDON)
        self._arrivals.restart()
        self._llm.start_weight_update()
        for bucket in buckets(tensors, self._options.bucket_mb * MB):
            self._arrivals.add({name: tuple(tensor.shape) for name, tensor in bucket.items()})
            with scratch_file(shared_memory(), BUCKET_NAME) as file:
                save_file(bucket, file.name)
                self._llm.update_weights({"update_info": {"path": file.name}})
        self._arrivals.check_complete()
        self._llm.finish_weight_update()
        self._llm.reset_prefix_cache()
        self._version = version

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Sample one completion for each request, in the requests' order.

        Raises:
            UserError: top_p below 1, where vLLM's log-probabilities are those of the nucleus alone.
            RuntimeError: an update of the weights was not finished.
        """
        from vllm import SamplingParams as VLLMParams
        from vllm import TokensPrompt

        if self._version < 0:
            raise RuntimeError("the engine has no complete weights of the trainer's")
        if params.top_p < 1.0:
            raise UserError(
                f"top_p={params.top_p} with vLLM",
                rule="log-probabilities are those of the distribution that is sampled from: the whole one",
                remedy="use top_p=1",
            )
        settings = [
            VLLMParams(
                temperature=params.temperature,
                max_tokens=params.max_new_tokens,
                seed=request.seed,
                stop_token_ids=self._stop_ids,
                # Only these end a response; vLLM would add the tokenizer's own.
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in requests]
        outputs = self._llm.generate(prompts, settings, use_tqdm=False)
        return [self._with_logprobs(*pair) for pair in zip(requests, outputs, strict=True)]

    def _with_logprobs(self, request: Request, output: Any) -> Completion:
        completion, sample = _completion(request, output), output.outputs[0]
        logprobs = tuple(entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs, strict=True))
        return replace(completion, logprobs=logprobs, versions=(self._version,) * len(logprobs))

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        _close(self._llm)
        del self._llm


class FixedVLLM:
    """vLLM with a directory's weights. Seeds travel with the requests: equal ones give equal
    responses up to rounding.

    Args:
        model: the directory.
        options: how it is run.
        dtype: what to compute in; None = what the weights are in.
        max_length: prompt and response together (tokens); with it vLLM chooses LongRoPE's factors.
        stop_ids: end a response, beside those that the model's own files name.

    Raises:
        UserError: vLLM is not installed here, or refuses the model.
    """

    def __init__(
        self, model: Path, options: VLLMEngine, *, dtype: str | None, max_length: int, stop_ids: Sequence[int]
    ) -> None:
        # An engine in a process of its own outlives this one when this one is killed.
        os.environ.setdefault(IN_PROCESS, "0")
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(
                f"engine.kind=vllm, but vLLM cannot be imported here ({error})",
                rule="vLLM has an environment of its own",
                remedy="make setup-vllm, then .venv-vllm/bin/phimr with the same arguments; or serve the model "
                "elsewhere and use engine.kind=endpoint",
            ) from error
        require_promised_gpus("engine.kind=vllm")
        self._stop_ids = list(stop_ids)
        try:
            self._llm = LLM(
                model=str(model),
                tokenizer=str(model),
                trust_remote_code=False,
                load_format="safetensors",
                dtype=AUTOMATIC if dtype is None else TORCH_NAMES[dtype],
                max_model_len=max_length,
                max_num_seqs=options.max_batch,
                tensor_parallel_size=options.tensor,
                gpu_memory_utilization=options.memory_share,
                enforce_eager=options.eager,
            )
        except ValueError as error:
            # vLLM checks its settings against the model and the memory, and says what does not fit.
            raise UserError(
                f"vLLM refuses {model}: {error}",
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
            outputs = self._llm.generate(prompts, settings, use_tqdm=sys.stderr.isatty())
        except ValueError as error:
            raise UserError(
                f"vLLM refuses a prompt: {error}",
                rule="a prompt has at least one token and leaves room for a response",
                remedy="remove the problem, or raise max_new_tokens",
            ) from error
        return [_completion(request, output) for request, output in zip(requests, outputs, strict=True)]

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        _close(self._llm)
        del self._llm


def _close(llm: Any) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def _completion(request: Request, output: Any) -> Completion:
    sample = output.outputs[0]
    if sample.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended the response to request {request.id} with {sample.finish_reason!r}")
    return Completion(request.id, tuple(sample.token_ids), (), sample.finish_reason)


def load_any_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of any model; unlike the trained model's it need not be of Phi's kind.

    Raises:
        UserError: it cannot be loaded, or has no chat template.
    """
    from phimr_nemo.data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(directory)
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer in {directory} has no chat template",
            rule="a teacher is asked in its own chat format",
            remedy="use the instruction-tuned model, or add its chat_template",
        )
    return tokenizer


def check_longrope(directory: Path, policy: LongRopePolicy, max_length: int) -> None:
    """Refuse a policy that vLLM and TensorRT-LLM do not follow at this length, and warn of one not trained with.

    They use the long factors for every sequence as soon as their maximum length exceeds the original one.

    Raises:
        UserError: the policy asks for the short ones there.
    """
    if not is_phi(directory):
        return
    architecture = Architecture.from_directory(directory)
    warn_of_other_regime(architecture, directory, max_length, policy)
    original = architecture.original_max_position_embeddings
    if architecture.long_factor is None or max_length <= original:
        return
    if policy != "long_when_max_length_exceeds_original":
        raise UserError(
            f"longrope={policy} with sequences of up to {max_length} tokens",
            rule=f"above {original} tokens vLLM and TensorRT-LLM use LongRoPE's long factors for every sequence",
            remedy="use longrope=long_when_max_length_exceeds_original (and train with it), "
            f"or lower max_new_tokens until prompt and response fit {original}",
        )


def weights_hash(directory: Path) -> str:
    """A digest of the weights: for a model that stages read the one that they use, for others that of the files.

    Raises:
        UserError: there are no safetensors files.
    """
    if is_readable(directory):
        from phimr_nemo.model.files.hf import HFDirectory

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
