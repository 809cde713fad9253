"""Conversion between the three kinds of checkpoint: the way there and back is the identity, damage is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from warm_phimr import phimr

from phimr_nemo.config import ParallelConfig
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.families import FAMILIES
from phimr_nemo.model.files import blocks as rows
from phimr_nemo.model.files import distcheckpoint
from phimr_nemo.model.files.blocks import write_at
from phimr_nemo.model.files.checkpoints import Kind, open_checkpoint, recognise
from phimr_nemo.model.files.hf import write_hf_directory
from phimr_nemo.model.table import SavedTensor, tensor_shapes
from phimr_nemo.supervised.conversion import convert

END, END_OF_TEXT, TOKENS = 3, 0, 4
BASE = Architecture.from_preset(
    yaml.safe_load((Path(__file__).parents[2] / "conf/model/tiny.yaml").read_text()),
    vocab_size=32,
    bos_token_id=END_OF_TEXT,
    eos_token_id=END_OF_TEXT,
    pad_token_id=END_OF_TEXT,
)


def make_hf(directory: Path, arch: Architecture, dtype: torch.dtype = torch.float32) -> Path:
    """A Hugging Face directory of random weights with a tokenizer of a few tokens."""
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir(parents=True)
    content = {
        "model": {"vocab": {"a": 1, "b": 2}},
        "added_tokens": [{"content": "<|endoftext|>", "id": END_OF_TEXT}, {"content": "<|end|>", "id": END}],
    }
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    generator = torch.Generator().manual_seed(0)
    tensors = ((n, torch.randn(s, generator=generator).to(dtype)) for n, s in tensor_shapes(arch).items())
    write_hf_directory(directory / "hf", arch, tensors, tokenizer_from=tokenizer)
    return directory / "hf"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def to_megatron(source: Path, target: Path, tensor: int = 1, pipeline: int = 1, hf: Path | None = None) -> Path:
    layout = ParallelConfig(tensor=tensor, pipeline=pipeline)
    assert convert(source, target, kind="megatron", layout=layout, hf=hf) == "megatron"
    return target


def to_hf(source: Path, target: Path, hf: Path | None = None) -> Path:
    assert convert(source, target, kind="hf", layout=ParallelConfig(), hf=hf) == "hf"
    return target


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("model"), BASE)


@pytest.fixture(scope="module")
def megatron(hf: Path) -> Path:
    return to_megatron(hf, hf.parent / "megatron", 2, 2)


@st.composite
def models(draw: st.DrawFn) -> tuple[Architecture, ParallelConfig, ParallelConfig]:
    """A random architecture and two layouts that can hold it."""
    sizes = draw(st.sampled_from([(1, 2), (1, 3), (2, 4), (2, 2), (4, 4)]))
    groups = max(sizes) * draw(st.integers(1, 2))
    heads = groups * draw(st.integers(1, 3))
    layers = draw(st.sampled_from([1, 2, 4, 6]))
    family = draw(st.sampled_from(sorted(FAMILIES)))
    arch = dataclasses.replace(
        BASE,
        vocab_size=max(sizes) * draw(st.integers(TOKENS, 9)),
        hidden_size=heads * draw(st.sampled_from([2, 4])),
        intermediate_size=max(sizes) * draw(st.integers(1, 5)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        partial_rotary_factor=1.0,
        short_factor=None,
        long_factor=None,
        tie_word_embeddings=draw(st.booleans()),
        family=family,
        no_rope_layers=(1,) * layers if "no_rope_layers" in FAMILIES[family].has else None,
    )
    stages = [n for n in (1, 2, 3, 4, 6) if layers % n == 0]
    first, second = (ParallelConfig(tensor=size, pipeline=draw(st.sampled_from(stages))) for size in sizes)
    return arch, first, second


@settings(deadline=None, max_examples=10)
@given(case=models(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_to_megatron_and_back_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[Architecture, ParallelConfig, ParallelConfig],
    dtype: torch.dtype,
) -> None:
    arch, first, second = case
    work = tmp_path_factory.mktemp("identity")
    source = make_hf(work, arch, dtype)
    one = to_megatron(source, work / "one", first.tensor, first.pipeline)
    two = to_megatron(one, work / "two", second.tensor, second.pipeline)
    for layout, directory in ((first, one), (second, two)):
        assert len(list(directory.glob("*.distcp"))) == layout.world_size
        back = to_hf(directory, work / f"from_{directory.name}")
        assert contents(back) == contents(source)
    # Written from Hugging Face or from another layout: the same data.
    direct = to_megatron(source, work / "direct", second.tensor, second.pipeline)
    assert contents(direct) == contents(two)
    shutil.rmtree(work)


def test_a_swapped_piece_is_seen(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the ranks' parts are saved in each other's places."""
    parts = distcheckpoint._parts

    def swapped(arch: Architecture, tensor: SavedTensor, rank: int, size: int) -> Iterator[distcheckpoint.Part]:
        mine, other = (list(parts(arch, tensor, r, size)) for r in (rank, 1 - rank))
        for number, part in enumerate(mine):
            yield dataclasses.replace(part, ranges=other[number].ranges) if other else part

    monkeypatch.setattr(distcheckpoint, "_parts", swapped)
    wrong = to_megatron(hf, tmp_path / "wrong", 2, 1)
    assert contents(to_hf(wrong, tmp_path / "back"))["model.safetensors"] != contents(hf)["model.safetensors"]


def test_kinds_are_recognised(hf: Path, megatron: Path, tmp_path: Path) -> None:
    assert recognise(hf) == "hf"
    assert recognise(megatron) == "megatron"
    nemo = tmp_path / "nemo"
    shutil.copytree(megatron, nemo / "weights")
    assert recognise(nemo) == "nemo"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mp_rank_00").mkdir()
    for path, named in [
        (tmp_path / "other", "mp_rank_00"),
        (tmp_path / "nowhere", "no directory"),
        (hf / "config.json", "no directory"),
    ]:
        with pytest.raises(UserError, match=named):
            recognise(path)


def test_the_target_follows_from_the_source(hf: Path, megatron: Path, tmp_path: Path) -> None:
    layout = ParallelConfig()
    assert convert(hf, tmp_path / "a", kind=None, layout=layout, hf=None) == "megatron"
    assert convert(megatron, tmp_path / "b", kind=None, layout=layout, hf=None) == "hf"
    assert [recognise(tmp_path / name) for name in "ab"] == ["megatron", "hf"]


def test_mistakes_are_told_before_anything_is_written(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = contents(tmp_path)
    kind: Kind
    for kind in ("hf", "megatron"):
        with pytest.raises(UserError, match="exists already"):
            convert(hf, tmp_path / "full", kind=kind, layout=ParallelConfig(), hf=None)
    with pytest.raises(UserError, match="'onnx'"):
        convert(hf, tmp_path / "new", kind="onnx", layout=ParallelConfig(), hf=None)
    for layout, named in [(ParallelConfig(tensor=4), "6 attention heads"), (ParallelConfig(pipeline=3), "4 layers")]:
        with pytest.raises(UserError, match=named):
            convert(hf, tmp_path / "new", kind="megatron", layout=layout, hf=None)
    assert contents(tmp_path) == before


def test_a_bare_checkpoint_takes_its_model_from_elsewhere(hf: Path, megatron: Path, tmp_path: Path) -> None:
    """As Megatron itself writes one: no config.json, no tokenizer."""
    bare = tmp_path / "bare"
    shutil.copytree(megatron, bare, ignore=lambda _, names: {"hf"} & set(names))
    with pytest.raises(UserError, match="--hf"):
        to_hf(bare, tmp_path / "out")
    assert contents(to_hf(bare, tmp_path / "out", hf)) == contents(hf)
    taller = make_hf(tmp_path / "taller", dataclasses.replace(BASE, num_hidden_layers=6))
    with pytest.raises(UserError, match=r"shape \[4, "):
        to_hf(bare, tmp_path / "never", taller)
    untied = make_hf(tmp_path / "untied", dataclasses.replace(BASE, tie_word_embeddings=False))
    with pytest.raises(UserError, match=r"lacks the tensor output_layer\.weight"):
        to_hf(bare, tmp_path / "never", untied)


class Payload:
    """What a hostile index does when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.proof),)


def hostile_index(directory: Path) -> None:
    index = pickle.loads((directory / ".metadata").read_bytes())
    index.planner_data = Payload(directory / "proof")
    (directory / ".metadata").write_bytes(pickle.dumps(index))


def test_code_in_an_index_is_not_run(hf: Path, megatron: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(megatron, copy)
    hostile_index(copy)
    assert contents(to_hf(copy, tmp_path / "out")) == contents(hf)
    assert not (copy / "proof").exists()
    # The payload works: an ordinary reader runs it.
    pickle.loads((copy / ".metadata").read_bytes())
    assert (copy / "proof").exists()
    (copy / ".metadata").write_bytes(pickle.dumps(Payload(copy / "second")))
    with pytest.raises(UserError, match="no index"):
        open_checkpoint(copy)
    assert not (copy / "second").exists()


def truncate(directory: Path) -> None:
    file = directory / "__1_0.distcp"
    os.truncate(file, file.stat().st_size // 2)


def scramble(directory: Path) -> None:
    """Bytes that are no saved tensor, at the right length."""
    file = directory / "__1_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)


def change_index(change: Callable[[dict[object, object]], None]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        index = pickle.loads((directory / ".metadata").read_bytes())
        change(index)
        (directory / ".metadata").write_bytes(pickle.dumps(index))

    return damage


def drop_chunk(index: object) -> None:
    index.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks.pop()  # type: ignore[attr-defined]


def point_elsewhere(index: object) -> None:
    for info in index.storage_data.values():  # type: ignore[attr-defined]
        info.relative_path = "../secret"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "truncated"),
        (scramble, "cannot be read"),
        (lambda d: (d / "__3_0.distcp").unlink(), "missing"),
        (lambda d: (d / ".metadata").unlink(), "metadata"),
        (lambda d: (d / ".metadata").write_bytes(b"\x80\x04nonsense"), "cannot be read"),
        (lambda d: (d / "metadata.json").write_text("{"), "metadata.json"),
        (lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "zarr"),
        (lambda d: (d / "hf" / "config.json").unlink(), "--hf"),
        (lambda d: (d / "hf" / "tokenizer.json").unlink(), "tokenizer"),
        (change_index(drop_chunk), "do not add up"),
        (change_index(point_elsewhere), "no plain data"),
    ],
)
def test_damage_is_refused_and_leaves_nothing(
    damage: Callable[[Path], None], named: str, megatron: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(megatron, copy)
    damage(copy)
    with pytest.raises(UserError) as caught:
        to_hf(copy, tmp_path / "out")
    assert named in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_hf(tmp_path / "model", BASE)
    with monkeypatch.context() as patch:
        patch.setattr(distcheckpoint, "write_at", lambda d, start, data: write_at(d, start, data * torch.nan))
        bad = to_megatron(source, tmp_path / "bad")
    with pytest.raises(UserError, match="NaN"):
        to_hf(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_nan_in_a_hugging_face_directory_is_refused(hf: Path, tmp_path: Path) -> None:
    """In the last place of the last block, found by whichever thread has it."""
    copy = tmp_path / "copy"
    shutil.copytree(hf, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][-1] = torch.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    for kind in ("hf", "megatron"):
        with pytest.raises(UserError, match=r"model\.norm\.weight .* NaN"):
            convert(copy, tmp_path / "out", kind=kind, layout=ParallelConfig(), hf=None)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_tensors_of_several_dtypes_are_refused(hf: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(hf, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight .* torch\.bfloat16"):
        to_megatron(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_blocks_of_any_size_give_the_same_files(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one row a block to blocks that hold every tensor whole."""
    monkeypatch.setattr(rows, "BLOCK_BYTES", 1)
    small = to_megatron(hf, tmp_path / "small", 2, 2)
    small_back = to_hf(small, tmp_path / "small_back")
    monkeypatch.setattr(rows, "BLOCK_BYTES", 2**30)
    large = to_megatron(hf, tmp_path / "large", 2, 2)
    assert contents(small) == contents(large)
    assert contents(small_back) == contents(to_hf(large, tmp_path / "large_back")) == contents(hf)


def test_a_chunk_in_another_order_is_refused(megatron: Path, tmp_path: Path) -> None:
    """A saved tensor can be a transposed view; its bytes are then not its rows."""
    copy = tmp_path / "copy"
    shutil.copytree(megatron, copy)
    index = pickle.loads((copy / ".metadata").read_bytes())
    place = next(place for place in index.storage_data if place.fqn == "embedding.word_embeddings.weight")
    saved = index.storage_data[place]
    with (copy / saved.relative_path).open("r+b") as file:
        file.seek(saved.offset)
        tensor = torch.load(io.BytesIO(file.read(saved.length)), weights_only=True)
        file.seek(0, os.SEEK_END)
        saved.offset = file.tell()
        torch.save(tensor.T.contiguous().T, file)
        saved.length = file.tell() - saved.offset
    (copy / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match="another order"):
        open_checkpoint(copy)


def test_no_room_is_told_before_the_work(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for kind in ("hf", "megatron"):
        with pytest.raises(UserError, match="no space left"):
            convert(hf, tmp_path / "out", kind=kind, layout=ParallelConfig(), hf=None)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import itertools, os, random, signal, sys
from pathlib import Path
import torch
from phimr_nemo.config import ParallelConfig
from phimr_nemo.model.files import blocks as rows
from phimr_nemo.supervised.conversion import convert

source, target, kind, kills = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
torch.set_num_threads(1)
rows.BLOCK_BYTES = 2048
calls = itertools.count(1)
last = None

def counted(call):
    def counting(*arguments, **options):
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return counting

for name in ("open", "pwrite", "fsync"):
    setattr(os, name, counted(getattr(os, name)))

def start(where):
    child = os.fork()
    if child == 0:
        convert(source, where, kind=kind, layout=ParallelConfig(tensor=2), hf=None)
        where.with_name("calls").write_text(str(next(calls) - 1))
        os._exit(0)
    return os.waitpid(child, 0)[1]

assert start(target.with_name("whole")) == 0
made = target.with_name("calls")
moments = random.Random(0).sample(range(1, int(made.read_text()) + 1), kills)
made.unlink()
for number, last in enumerate(moments):
    assert start(target.with_name(f"{target.name}{number}")) == signal.SIGKILL
"""


@pytest.mark.parametrize("kind", ["megatron", "hf"])
def test_a_conversion_killed_at_any_moment_leaves_nothing_that_looks_complete(
    kind: Kind, hf: Path, megatron: Path, tmp_path: Path
) -> None:
    """SIGKILL before random calls of the operating system: the target is absent or whole; a rerun completes it."""
    kills = 20
    source = hf if kind == "megatron" else megatron
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), kind, str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = contents(tmp_path / "whole")
    targets = [tmp_path / f"out{number}" for number in range(kills)]
    assert not all(target.exists() for target in targets)
    for target in targets:
        if not target.exists():
            convert(source, target, kind=kind, layout=ParallelConfig(tensor=2), hf=None)
        assert contents(target) == wanted
    # Whatever else is left has a hidden temporary name.
    finished = {tmp_path / "whole", *targets}
    assert all(path.name.startswith(".") for path in tmp_path.iterdir() if path not in finished)


FULL = """
import resource, sys
from pathlib import Path
from phimr_nemo.config import ParallelConfig
from phimr_nemo.errors import UserError
from phimr_nemo.supervised.conversion import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    convert(Path(sys.argv[1]), Path(sys.argv[2]), kind="megatron", layout=ParallelConfig(), hf=None)
except UserError as error:
    print(error.problem)
"""


@pytest.mark.parametrize("limit", [8192, 200_000], ids=["in the first tensor", "in a later one"])
def test_a_disk_that_fills_up(limit: int, hf: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk's: the kernel refuses the write in the same place."""
    command = [sys.executable, "-c", FULL, str(hf), str(tmp_path / "megatron"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "no space left" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command(hf: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "megatron")
    done = phimr("convert", str(hf), target, "--tp", "2", "--pp", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{target}: megatron, tensor 2 x pipeline 4\n"
    assert contents(to_hf(Path(target), tmp_path / "out")) == contents(hf)
    again = phimr("convert", str(hf), target)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert "Traceback" not in again.stderr
