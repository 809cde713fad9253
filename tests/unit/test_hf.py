"""Hugging Face directories: read what transformers wrote, write what transformers reads, refuse the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files.companions import generation_config
from phimr_nemo.model.files.hf import HFDirectory, copy_hf_directory, write_hf_directory
from phimr_nemo.model.files.shards import plan_shards
from phimr_nemo.model.table import tensor_shapes

SMALL_SHARD = 30_000
END, END_OF_TEXT = 9, 0


@pytest.fixture(scope="module")
def arch() -> Architecture:
    values = yaml.safe_load((Path(__file__).parents[2] / "conf/model/tiny.yaml").read_text())
    return Architecture.from_preset(
        values,
        vocab_size=32,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    content = {
        "model": {"vocab": {"a": 1, "b": 2}},
        "added_tokens": [{"content": "<|endoftext|>", "id": END_OF_TEXT}, {"content": "<|end|>", "id": END}],
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    return directory


def weights(arch: Architecture, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in tensor_shapes(arch).items()}


@pytest.fixture
def directory(arch: Architecture, tokenizer: Path, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    write_hf_directory(target, arch, weights(arch).items(), tokenizer_from=tokenizer, max_shard_bytes=SMALL_SHARD)
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [SMALL_SHARD, 10**9])
def test_what_is_written_is_read_back_by_safetensors_and_transformers(
    arch: Architecture, tokenizer: Path, tmp_path: Path, dtype: torch.dtype, shard_bytes: int
) -> None:
    transformers = pytest.importorskip("transformers")
    wanted = weights(arch, dtype)
    target = tmp_path / "model"
    write_hf_directory(target, arch, wanted.items(), tokenizer_from=tokenizer, max_shard_bytes=shard_bytes)
    files = sorted(target.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == SMALL_SHARD)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    model = transformers.Phi3ForCausalLM.from_pretrained(target, torch_dtype="auto")
    assert model.dtype == dtype
    state = model.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert model.generation_config.eos_token_id == [END, END_OF_TEXT]
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == json.loads((tokenizer / "tokenizer_config.json").read_text())["chat_template"]


def test_the_index_is_right(directory: Path, arch: Architecture) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * arch.num_parameters
    assert list(index["weight_map"]) == list(tensor_shapes(arch))
    sizes = [file.stat().st_size for file in directory.glob("*.safetensors")]
    header_bytes = 2000
    assert max(sizes) <= SMALL_SHARD + header_bytes


def test_a_tensor_is_read_from_the_shard_that_the_index_names(directory: Path, tmp_path: Path) -> None:
    """Some writers leave a copy of a shared tensor in a second shard, at another place in the file."""
    shutil.copytree(directory, tmp_path / "copies")
    files = sorted((tmp_path / "copies").glob("*.safetensors"))
    first = load_file(files[0])
    for file in files[1:]:
        others = load_file(file)
        strays = {name: torch.zeros_like(tensor) for name, tensor in first.items()}
        save_file({**strays, **others}, file, metadata={"format": "pt"})
    assert HFDirectory(tmp_path / "copies").weights_hash() == HFDirectory(directory).weights_hash()


def test_shards_are_filled_in_order_and_a_giant_stands_alone() -> None:
    shapes = {"a": (3,), "b": (2,), "giant": (50,), "c": (5,), "d": (1,)}
    assert plan_shards(shapes, 2, 10) == [["a", "b"], ["giant"], ["c"], ["d"]]


def test_what_transformers_writes_is_read_lazily_and_exactly(arch: Architecture, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**arch.to_hf_config()))
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    source = HFDirectory(tmp_path / "saved")
    assert source.architecture == arch
    for name, wanted in model.state_dict().items():
        if name == "lm_head.weight":
            assert name not in source.names()
            continue
        assert torch.equal(source.read(name), wanted)
        assert torch.equal(source.read_pieces(name, 0, ((5, 7), (1, 2))), torch.cat((wanted[5:7], wanted[1:2])))
        if wanted.ndim == 2:
            assert torch.equal(source.read_slice(name, 1, 3, 8), wanted[:, 3:8])


def test_the_hash_depends_on_the_weights_alone(
    arch: Architecture, tokenizer: Path, directory: Path, tmp_path: Path
) -> None:
    wanted = weights(arch)
    write_hf_directory(tmp_path / "one", arch, wanted.items(), tokenizer_from=tokenizer)
    assert HFDirectory(directory).weights_hash() == HFDirectory(tmp_path / "one").weights_hash()
    wanted["model.norm.weight"][0] += 1e-6
    write_hf_directory(tmp_path / "two", arch, wanted.items(), tokenizer_from=tokenizer)
    assert HFDirectory(directory).weights_hash() != HFDirectory(tmp_path / "two").weights_hash()


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Replace the shards by one file with changed tensors."""
    tensors = {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}
    for file in [*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"]:
        file.unlink()
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def drop_norm(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


def add_bias(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.bias"] = torch.zeros(3)


def shrink(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(7)


def quantise(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop_norm, "model.norm.weight"),
        (add_bias, "down_proj.bias"),
        (shrink, "[7]"),
        (quantise, "I8"),
    ],
)
def test_other_tensors_than_the_config_promises(
    directory: Path, change: Callable[[dict[str, Tensor]], None], named: str
) -> None:
    rewrite(directory, change)
    with pytest.raises(UserError) as caught:
        HFDirectory(directory)
    assert named in caught.value.problem


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(directory: Path, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    rewrite(directory, spoil)
    source = HFDirectory(directory)
    source.read("model.norm.weight")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj"):
        source.read("model.layers.1.mlp.down_proj.weight")


def test_truncated_missing_and_swapped_shards(directory: Path, tmp_path: Path) -> None:
    shards = sorted(directory.glob("*.safetensors"))
    for number, (damage, named) in enumerate(
        [
            (lambda file: file.write_bytes(file.read_bytes()[:-1]), "cannot be read as safetensors"),
            (lambda file: file.write_bytes(b"\xff" * 100), "cannot be read as safetensors"),
            (lambda file: file.write_bytes(b""), "cannot be read as safetensors"),
            (lambda file: file.unlink(), "missing"),
            (lambda file: shutil.copyfile(shards[0], file), "lacks the tensor"),
        ]
    ):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(directory, copy)
        damage(copy / shards[1].name)
        with pytest.raises(UserError, match=named):
            HFDirectory(copy)


def test_pickle_weights_are_refused_without_being_opened(directory: Path) -> None:
    for file in [*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"]:
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match="pickle"):
        HFDirectory(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="no weights"):
        HFDirectory(directory)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_cannot_point_elsewhere(directory: Path, shard: str) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="names the shard"):
        HFDirectory(directory)
    index.write_text("{}")
    with pytest.raises(UserError, match="weight_map"):
        HFDirectory(directory)


def spoiled_streams(arch: Architecture) -> Iterator[tuple[str, Any]]:
    good = list(weights(arch).items())
    yield "nothing", []
    yield "nothing", good[:-1]
    yield "extra", [*good, ("extra", torch.zeros(1))]
    yield good[1][0], [good[1], good[0], *good[2:]]
    yield "bfloat16", [good[0], (good[1][0], good[1][1].bfloat16()), *good[2:]]
    yield "NaN", [*good[:-1], (good[-1][0], good[-1][1] * float("nan"))]
    yield "int64", [(good[0][0], good[0][1].long())]


def test_a_failed_export_leaves_nothing_and_a_rerun_completes(
    arch: Architecture, tokenizer: Path, tmp_path: Path
) -> None:
    target = tmp_path / "model"
    for named, stream in spoiled_streams(arch):
        with pytest.raises(UserError) as caught:
            write_hf_directory(target, arch, stream, tokenizer_from=tokenizer)
        assert named in caught.value.problem or "none" in caught.value.problem
        assert list(tmp_path.iterdir()) == []
    write_hf_directory(target, arch, weights(arch).items(), tokenizer_from=tokenizer)
    assert HFDirectory(target).names() == tuple(tensor_shapes(arch))
    with pytest.raises(UserError, match="exists"):
        write_hf_directory(target, arch, weights(arch).items(), tokenizer_from=tokenizer)


def test_tokenizers_that_do_not_fit(arch: Architecture, tokenizer: Path, tmp_path: Path) -> None:
    for content, named in [
        (None, "tokenizer.json"),
        ("{", "tokenizer.json"),
        (json.dumps({"model": {"vocab": {"a": 32}}, "added_tokens": []}), "id 32"),
    ]:
        source = tmp_path / "source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        if content is not None:
            (source / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=named):
            write_hf_directory(tmp_path / "out", arch, weights(arch).items(), tokenizer_from=source)
        assert not (tmp_path / "out").exists()


def test_phi4_minis_tokenizer_gives_its_own_generation_config(shared_data: Path, tmp_path: Path) -> None:
    real = shared_data / "phi4-mini"
    arch = Architecture.from_directory(real)
    wanted = json.loads((real / "generation_config.json").read_text())
    assert wanted["eos_token_id"] == [200020, 199999]
    assert generation_config(arch, real) == wanted
    shutil.copyfile(real / "tokenizer.json", tmp_path / "tokenizer.json")
    del wanted["transformers_version"]
    assert generation_config(arch, tmp_path) == wanted


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        HFDirectory(tmp_path / "nowhere")


def test_a_link_among_its_files_is_not_followed_out(directory: Path, tmp_path: Path) -> None:
    """Neither when a model is opened, nor when its tokenizer's files are copied with it."""
    source = HFDirectory(directory)
    secret = tmp_path / "secret"
    secret.write_text("key", "utf-8")
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / "merges.txt").unlink(missing_ok=True)
    (copy / "merges.txt").symlink_to(secret)
    with pytest.raises(UserError, match="outside its directory"):
        HFDirectory(copy)
    with pytest.raises(UserError, match="outside its directory"):
        copy_hf_directory(tmp_path / "out", source, tokenizer_from=copy)
    assert not (tmp_path / "out").exists()


ABSURD: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10**9},
    "negative layers": {"num_hidden_layers": -1},
    "true layers": {"num_hidden_layers": True},
    "text": {"hidden_size": "96"},
    "a fraction": {"hidden_size": 96.5},
    "a huge number": {"vocab_size": 10**4000},
    "infinity": {"intermediate_size": float("inf")},
    "no epsilon": {"rms_norm_eps": float("nan")},
    "infinite epsilon": {"rms_norm_eps": float("inf")},
    "negative epsilon": {"rms_norm_eps": -1e-5},
    "theta": {"rope_theta": float("nan")},
    "positions": {"max_position_embeddings": 10**15},
    "a window": {"sliding_window": -5},
    "a window of text": {"sliding_window": "all"},
    "range": {"initializer_range": float("nan")},
    "an end token outside": {"eos_token_id": 10**9},
    "a negative token": {"pad_token_id": -1},
    "many factors": {"rope_scaling": {"type": "longrope", "short_factor": [1] * 10**6, "long_factor": [1] * 10**6}},
    "factors of text": {"rope_scaling": {"type": "longrope", "short_factor": ["x"] * 10**5, "long_factor": [1]}},
    "a long name": {"model_type": "x" * 10**6},
    "many classes": {"architectures": ["x" * 100] * 10**4},
}


@pytest.mark.parametrize("kind", ABSURD)
def test_absurd_numbers_in_a_configuration_are_one_short_message(kind: str, directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    file = copy / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **ABSURD[kind]}), "utf-8")
    with pytest.raises(UserError) as caught:
        HFDirectory(copy)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["deep", "huge", "no text", "a list"])
def test_a_json_file_that_is_none_is_one_message(name: str, kind: str, directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / name).write_bytes({"deep": b"[" * 200_000, "huge": b"", "no text": b"\xff\xfe", "a list": b"[]"}[kind])
    if kind == "huge":
        with (copy / name).open("ab") as file:
            file.truncate(1 << 33)
    with pytest.raises(UserError):
        HFDirectory(copy)
