"""How cost grows (bench/growth.py): what its limit counts, and its slopes."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from phimr_nemo.model.table import tensor_shapes


@pytest.fixture
def growth(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "bench"))
    return importlib.import_module("growth")


def test_the_limit_has_every_weight_matrix_that_tokens_are_multiplied_by(growth: ModuleType) -> None:
    """Counted by the table of tensors: all matrices, the embedding for the tied output layer."""
    for layers, vocabulary in ((1, 2048), (3, 8192)):
        arch = growth.architecture({**growth.START, "layers": layers, "vocabulary": vocabulary})
        assert (arch.num_hidden_layers, arch.vocab_size, arch.tie_word_embeddings) == (layers, vocabulary, True)
        matrices = [shape for shape in tensor_shapes(arch).values() if len(shape) == 2]
        counted = growth.product_shapes(arch)
        assert sum(a * b for a, b in counted) == sum(a * b for a, b in matrices)
        assert sorted(counted) == sorted((inputs, outputs) for outputs, inputs in matrices)


def test_a_slope_is_the_power_that_the_cost_grows_with(growth: ModuleType) -> None:
    """A step of n tokens that costs n^2 seconds has n / n^2 tokens a second."""
    points = [{"size": n, "ours": n / n**2, "limit": n / n, "memory": 7.0 * n**0.5} for n in (64.0, 128.0, 512.0)]
    found = growth.slopes("length", points)
    assert found["seconds"] == pytest.approx(2)
    assert found["limit's seconds"] == pytest.approx(1)
    assert found["memory"] == pytest.approx(0.5)
    assert found["share of the limit"] == pytest.approx(1 / 512)
    # Layers leave the tokens of a step as they are.
    assert growth.slopes("layers", points)["seconds"] == pytest.approx(1)
