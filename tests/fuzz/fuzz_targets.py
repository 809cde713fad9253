"""What is fuzzed: each target takes bytes, and ends in a result with certain properties or in one clear error.

A target is made by a function without arguments, which imports what it needs and prepares its surroundings once.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Target = Callable[[bytes], None]
CORPUS = Path(__file__).parent / "corpus"
SEPARATOR = b"\x1f"
"""Between the parts of an input that has several."""


def scratch() -> Path:
    """A directory of this process's own; the caller's temporary directory is cleared by whoever made it."""
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def text_parts(data: bytes, count: int) -> list[str]:
    """`count` texts; what is absent is empty. Lone surrogates can be among them, as in JSON."""
    parts = data.split(SEPARATOR, count - 1)
    return [part.decode("utf-8", "surrogatepass" if _is_utf8(part) else "replace") for part in parts] + [""] * (
        count - len(parts)
    )


def _is_utf8(part: bytes) -> bool:
    try:
        part.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def config() -> Target:
    """A YAML file and overrides, for two stages: a typed configuration or a UserError."""
    from phimr_nemo.config import CurateConfig, GenerateConfig, load_config, parse_config, to_dict
    from phimr_nemo.errors import UserError

    file = scratch() / "x.yaml"

    def target(data: bytes) -> None:
        yaml, *overrides = data.split(SEPARATOR, 3)
        file.write_bytes(yaml)
        for schema in (GenerateConfig, CurateConfig):
            try:
                made: Any = load_config(schema, file, [item.decode("utf-8", "replace") for item in overrides])
            except UserError:
                continue
            assert parse_config(schema, to_dict(made)) == made

    return target


def answer() -> Target:
    """A response and a gold answer, up to where a worker would take over."""
    from phimr_nemo.verify.answer import _decide
    from phimr_nemo.verify.verdict import MAX_ANSWER_CHARS
    from phimr_nemo.verify.workers.pool import Job

    def target(data: bytes) -> None:
        response, gold = text_parts(data, 2)
        decided = _decide(response, gold)
        if isinstance(decided, Job):
            assert decided.gold
            assert decided.text
            return
        assert decided.verdict in ("correct", "wrong", "unparsable", "error", "gold_unreadable", "timeout")
        assert len(decided.extracted) <= MAX_ANSWER_CHARS
        if decided.verdict == "correct":
            assert response.strip()
            assert gold.strip()

    return target


def rawfile() -> Target:
    """A user's file in every format: rows that are objects, or a UserError."""
    import gzip

    from phimr_nemo.data.sources.rawfiles import read_rows
    from phimr_nemo.errors import UserError

    place = scratch()
    endings = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".jsonl.zst")

    def target(data: bytes) -> None:
        if not data:
            return
        ending, content = endings[data[0] % len(endings)], data[1:]
        if ending == ".jsonl.gz" and data[0] >= 128:
            content = gzip.compress(content)
        file = place / f"x{ending}"
        file.write_bytes(content)
        with contextlib.suppress(UserError):
            for where, row in read_rows(file):
                assert where
                assert isinstance(row, dict)

    return target


def problem() -> Target:
    """Rows of any shape as problems: text that can be stored, or a row counted as incomplete, or a UserError."""
    from phimr_nemo.data.sources.problems import read_problems
    from phimr_nemo.errors import UserError

    file = scratch() / "x.jsonl"

    def target(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(UserError):
            for row in read_problems(file).to_pylist():
                assert row["question"].strip()
                assert row["answer"].strip()
                json.loads(row["metadata"])

    return target


def shard() -> Target:
    """A finished record directory in which one file was replaced: the same rows, or a UserError, never other rows."""
    from phimr_nemo.errors import UserError
    from phimr_nemo.store.shards import finish, read_table, rows_to_table, shard_is_complete, write_shard

    place = scratch() / "records"
    rows = [
        {
            "id": str(i),
            "problem_id": "p",
            "question": f"{i}?",
            "response": "r" * i,
            "domain": None,
            "difficulty": None,
        }
        for i in range(3)
    ]
    write_shard(place, 0, rows_to_table(rows, "conversations"), kind="conversations")
    finish(place, kind="conversations", config={})
    files = [place / name for name in ("part-00000.parquet", "part-00000.json", "manifest.json")]
    originals = [file.read_bytes() for file in files]
    table = read_table(place, "conversations")

    def target(data: bytes) -> None:
        if not data:
            return
        number = data[0] % len(files)
        content = data[1:] or originals[number][: data[0]]
        files[number].write_bytes(content)
        try:
            shard_is_complete(place, 0)
            # The sidecar is not read here: the manifest says what the shard is.
            assert read_table(place, "conversations").equals(table)
        except UserError:
            assert content != originals[number]
        finally:
            files[number].write_bytes(originals[number])

    return target


def chat() -> Target:
    """A question and a response: no turn more than was meant, and the response comes back, or a UserError."""
    from phimr_nemo.data.chat import SPECIAL_TOKENS, decode_response, render_conversation
    from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
    from phimr_nemo.errors import UserError

    tokenizer = build_tokenizer(synthetic_corpus(), system_prompt="Be brief.")
    special = [tokenizer.get_vocab()[token] for token in SPECIAL_TOKENS]

    def counts(ids: list[int]) -> list[int]:
        return [ids.count(token) for token in special]

    usual = counts(render_conversation(tokenizer, "1+1?", "2")[0])

    def target(data: bytes) -> None:
        question, response = text_parts(data, 2)
        try:
            ids, mask = render_conversation(tokenizer, question, response)
        except UserError:
            return
        assert counts(ids) == usual
        assert len(ids) == len(mask)
        learned = [token for token, counted in zip(ids, mask, strict=True) if counted]
        assert learned[-1] == ids[-1]
        # Texts of a tokenizer hold no lone surrogates.
        if response.isprintable() and response.encode("utf-8", "replace").decode() == response:
            assert decode_response(tokenizer, learned) == response

    return target


def architecture() -> Target:
    """A config.json: an architecture that writes itself back to the same one, or a UserError."""
    from phimr_nemo.errors import UserError
    from phimr_nemo.model.architecture import Architecture

    place = scratch()

    def target(data: bytes) -> None:
        (place / "config.json").write_bytes(data)
        try:
            made = Architecture.from_directory(place)
        except UserError:
            return
        assert Architecture.from_hf_config(made.to_hf_config()) == made
        assert made.num_parameters > 0

    return target


def weights() -> Target:
    """A model directory whose weights or config were replaced: finite tensors of the right shape, or a UserError."""
    import torch
    from safetensors.torch import save_file

    from phimr_nemo.errors import UserError
    from phimr_nemo.model.architecture import Architecture
    from phimr_nemo.model.files.hf import HFDirectory
    from phimr_nemo.model.table import tensor_shapes

    place = scratch()
    values = _tiny_architecture()
    (place / "config.json").write_text(json.dumps(values))
    shapes = tensor_shapes(Architecture.from_hf_config(values))
    file = place / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")

    def target(data: bytes) -> None:
        # Mostly the header: the numbers behind it may be any.
        file.write_bytes(data if data[:1] == b"\x00" else data + whole[header:])
        with contextlib.suppress(UserError):
            directory = HFDirectory(place)
            for name in directory.names():
                tensor = directory.read(name)
                assert tuple(tensor.shape) == tuple(shapes[name])
                assert torch.isfinite(tensor.float()).all()

    target.seed = whole[:header]  # type: ignore[attr-defined]
    return target


def _tiny_architecture() -> dict[str, Any]:
    import yaml

    from phimr_nemo.model.architecture import Architecture

    repository = Path(__file__).resolve().parents[2]
    preset = yaml.safe_load((repository / "conf" / "model" / "tiny.yaml").read_text("utf-8"))
    small: dict[str, Any] = {
        "vocab_size": 16,
        "hidden_size": 48,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return Architecture.from_preset(preset, **small).to_hf_config()


def index() -> Target:
    """The pickled index of a distributed checkpoint: data or a UserError, and nothing that it names is called."""
    from phimr_nemo.errors import UserError
    from phimr_nemo.model.files.distindex import read_index
    from phimr_nemo.model.files.plaindata import check_index

    file = scratch() / ".metadata"

    def target(data: bytes) -> None:
        file.write_bytes(data)
        before = len(os.environ)
        for read in (read_index, check_index):
            with contextlib.suppress(UserError):
                read(file)
        assert len(os.environ) == before

    return target


def stream() -> Target:
    """What an endpoint sends: a reply put together in bounded memory, or the client's own errors."""
    from phimr_nemo.endpoint.wire import Assembly, LineSplitter, RequestFailed, Transient, parse_object

    limit = 1 << 16

    def target(data: bytes) -> None:
        splitter, assembly = LineSplitter(limit), Assembly()
        with contextlib.suppress(Transient, RequestFailed):
            for start in range(0, len(data), 97):
                for line in splitter.feed(data[start : start + 97]):
                    content = line.removeprefix("data:").strip()
                    if line.startswith("data:") and content != "[DONE]":
                        assembly.add(parse_object(content))
            reply = assembly.reply()
            assert reply.finish_reason in ("stop", "length")
            reply.response.encode("utf-8", "surrogatepass")

    return target


def journal() -> Target:
    """A damaged journal of replies: only records that were written whole."""
    from phimr_nemo.endpoint.journal import Journal, read_journal

    file = scratch() / "journal"
    records = [{"id": str(i), "text": "t" * i} for i in range(4)]
    with Journal(file) as made:
        for record in records:
            made.append(record)
    whole = file.read_bytes()

    def target(data: bytes) -> None:
        cut = data[0] % (len(whole) + 1) if data else 0
        file.write_bytes(whole[:cut] + data[1:])
        for record in read_journal(file):
            assert isinstance(record, dict)

    target.seed = bytes([255]) + whole  # type: ignore[attr-defined]
    return target


TARGETS: Mapping[str, Callable[[], Target]] = {
    make.__name__: make
    for make in (config, answer, rawfile, problem, shard, chat, architecture, weights, index, stream, journal)
}


def read_corpus(name: str) -> list[bytes]:
    """The kept inputs of a target."""
    path = CORPUS / f"{name}.json"
    return [base64.b64decode(item) for item in json.loads(path.read_text("utf-8"))] if path.is_file() else []


def write_corpus(name: str, inputs: list[bytes]) -> None:
    """Keep inputs: one JSON file a target, so that no byte of them is taken for text of the project."""
    encoded = sorted({base64.b64encode(item).decode("ascii") for item in inputs}, key=lambda item: (len(item), item))
    (CORPUS / f"{name}.json").write_text(json.dumps(encoded, indent=0) + "\n", "utf-8")


def mutate(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """An input near a kept one: bits flipped, pieces cut, doubled, replaced by noise or by a piece of another."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(made) + 1)
        length = draw.choice((1, 1, 2, 4, 16, 64))
        kind = draw.randrange(6)
        if kind == 0 and made:
            made[at % len(made)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del made[at : at + length]
        elif kind == 2:
            made[at:at] = made[at : at + length] * draw.choice((1, 2, 50))
        elif kind == 3:
            made[at : at + length] = draw.randbytes(length)
        elif kind == 4:
            start = draw.randrange(len(other) + 1)
            made[at:at] = other[start : start + length]
        else:
            number = draw.choice((b"-1", b"0", b"1e999", b"99999999999999999999", b"NaN", b"null", b"[]", b'"', b"{"))
            made[at : at + length] = number
    return bytes(made[: 1 << 14])
