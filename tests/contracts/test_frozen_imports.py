"""Every import of NeMo and NeMo-Aligner, which are frozen (docs/bridge.md): a new one has to be wanted.

NeMo is for stages 1 and 2, NeMo-Aligner for stages 3 and 4; the adapters of LoRA are NeMo's in all four. Nothing else
of the project knows either.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

FROZEN = ("nemo", "nemo_aligner")
IMPORTS = {
    "phimr_nemo/align/compat.py": {
        "nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers.MegatronPretrainingBatchSampler",
        "nemo.utils.logging",
        "nemo_aligner.algorithms.dpo",
        "nemo_aligner.algorithms.reinforce",
        "nemo_aligner.models.alignable_interface.AlignableGenerativeInterface",
    },
    "phimr_nemo/supervised/assembly.py": {
        "nemo.lightning",
        "nemo.lightning.pytorch.callbacks.megatron_comm_overlap.MegatronCommOverlapCallback",
    },
    "phimr_nemo/supervised/checkpointing.py": {
        "nemo.lightning.ckpt_utils.ckpt_to_dir",
        "nemo.lightning.io.pl.MegatronCheckpointIO",
    },
    "phimr_nemo/supervised/data.py": {"nemo.lightning.pytorch.plugins.MegatronDataSampler"},
    "phimr_nemo/supervised/native.py": {"nemo.collections.llm", "nemo.lightning"},
    "phimr_nemo/supervised/nemo_model.py": {
        "nemo.collections.common.tokenizers.AutoTokenizer",
        "nemo.collections.llm",
        "nemo.collections.llm.modelopt.distill.utils",
        "nemo.collections.llm.modelopt.model_utils",
        "nemo.lightning",
        "nemo.lightning.io",
        "nemo.lightning.io.pl.TrainerContext",
    },
    "phimr_nemo/supervised/schedule.py": {"nemo.lightning.pytorch.optim.LRSchedulerModule"},
    "phimr_nemo/supervised/stage.py": {
        "nemo.lightning",
        "nemo.lightning.pytorch.trainer.configure_no_restart_validation_training_loop",
    },
    "phimr_nemo/training/adapters/modules.py": {
        "nemo.collections.llm.peft.lora.LoRALinear",
        "nemo.collections.llm.peft.utils.ParallelLinearAdapter",
        "nemo.collections.llm.peft.utils.get_adapter_attributes_from_linear",
    },
    "phimr_nemo/training/platform.py": {"nemo.lightning.io.pl"},
    "phimr_nemo/training/precision.py": {"nemo.lightning"},
}


def frozen_imports(root: Path) -> dict[str, set[str]]:
    """File -> what it imports of the frozen packages, at its top or in a function."""
    found: dict[str, set[str]] = defaultdict(set)
    for package in ("phimr_nemo", "recipes"):
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names: list[str] = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted = {name for name in names if name.split(".")[0] in FROZEN}
                if wanted:
                    found[str(path.relative_to(root))] |= wanted
    return dict(found)


def test_the_list_is_complete(repository: Path) -> None:
    assert frozen_imports(repository) == IMPORTS


def test_an_import_inside_a_function_is_found(tmp_path: Path) -> None:
    (tmp_path / "phimr_nemo").mkdir()
    (tmp_path / "phimr_nemo" / "x.py").write_text("def f():\n    from nemo.utils import a, b\n    import nemo_run\n")
    assert frozen_imports(tmp_path) == {"phimr_nemo/x.py": {"nemo.utils.a", "nemo.utils.b"}}
