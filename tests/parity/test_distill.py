"""On-policy distillation: layouts, packing, teachers in the trainer and served, stopped runs, other tokenizers."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from align_inputs import CONF, make_inputs
from align_worker import Case, run_case
from distill_worker import one_update
from distributed import run_distributed
from grpo_worker import Update
from test_align_parity import curve, weights_differ_by

from phimr_nemo.config import BaseConfig, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.model.base import run_base
from phimr_nemo.model.vocabulary import check_same_words

LENGTHS = (7, 40, 12, 90, 8, 33, 9, 61)
TOLERANCE = 1e-5
"""Relative, float32: sums over the same numbers in another order."""
SAMPLED = ("loss.kind=sampled_reverse_kl", "loss.clip_low=0.2", "loss.clip_high=0.3")
WHOLE = ("loss.kind=reverse_kl",)
LOSSES = pytest.mark.parametrize("loss", [SAMPLED, WHOLE], ids=["sampled", "whole"])
STEPS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, its prompts, and a wider and deeper teacher of its vocabulary."""
    root = tmp_path_factory.mktemp("distill")
    make_inputs(root)
    shape = ("hidden_size=96", "intermediate_size=160", "num_hidden_layers=4", "num_attention_heads=4")
    lengths = ("original_max_position_embeddings=256", "max_position_embeddings=8192")
    given = [f"run.output={root / 'teacher'}", "run.seed=7", "initializer_range=0.15", *shape, *lengths]
    run_base(load_config(BaseConfig, CONF / "base" / "tiny.yaml", given))
    return root


def settings(root: Path) -> list[str]:
    return [f"base={root / 'base' / 'hf'}", f"prompts={root / 'prompts'}"]


def directory(root: Path) -> list[str]:
    return [f"teacher.path={root / 'teacher' / 'hf'}"]


def update(
    root: Path, *overrides: str, ranks: int = 1, fault: str | None = None, teacher: Sequence[str] = ()
) -> list[Update]:
    given = [f"run.output={root / 'run'}", *settings(root), *(teacher or directory(root))]
    given += ["sequence_length=100", "max_new_tokens=80", "micro_batch=3", *overrides]
    found: list[Update] = run_distributed(one_update, ranks, CONF / "distill" / "tiny.yaml", given, LENGTHS, fault)
    return found


def difference(one: Update, other: Update) -> float:
    """Largest difference of a gradient's entry, relative to the largest entry."""
    return float((one.gradients - other.gradients).abs().max() / other.gradients.abs().max())


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[tuple[str, ...], Update]:
    return {loss: update(root, *loss)[0] for loss in (SAMPLED, WHOLE)}


LAYOUTS = {
    "packed": (1, ("packed=true",)),
    "tensor and sequence, packed": (2, ("parallel.tensor=2", "parallel.sequence=true", "packed=true")),
    "pipeline": (2, ("parallel.pipeline=2",)),
    "context, packed": (2, ("parallel.context=2", "packed=true", "optim.distributed=false")),
}


@LOSSES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_update_of_one_process(
    root: Path, alone: dict[tuple[str, ...], Update], loss: tuple[str, ...], layout: str
) -> None:
    ranks, overrides = LAYOUTS[layout]
    expected = alone[loss]
    for found in update(root, *loss, *overrides, ranks=ranks):
        assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
        assert difference(found, expected) < TOLERANCE
        assert torch.allclose(found.before, expected.before, rtol=TOLERANCE, atol=TOLERANCE)
        assert found.metrics == pytest.approx(expected.metrics, rel=10 * TOLERANCE, abs=TOLERANCE)


def test_states_of_other_tokens_are_noticed(root: Path, alone: dict[tuple[str, ...], Update]) -> None:
    (found,) = update(root, *WHOLE, fault="states of the token before")
    assert difference(found, alone[WHOLE]) > 100 * TOLERANCE


@contextlib.contextmanager
def served(reply: Callable[[list[int]], dict[str, Any]]) -> Iterator[list[str]]:
    """The settings of a teacher behind a server in this process; `reply` tells of a prompt."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (self.path, asked["echo"], asked["model"]) == ("/v1/completions", True, "large")
            body = json.dumps({"choices": [reply(asked["prompt"])]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "base_urls": f"[http://127.0.0.1:{server.server_port}/v1]",
        "model": "large",
        "concurrency": 3,
        "idle_seconds": 100,
        "total_seconds": 200,
        "attempts": 2,
        "backoff_seconds": 0.01,
    }
    try:
        yield ["teacher.kind=server", *(f"teacher.endpoint.{key}={value}" for key, value in settings.items())]
    finally:
        server.shutdown()
        server.server_close()


def by_transformers(teacher: Path) -> Callable[[list[int]], dict[str, Any]]:
    """What a server says that has the teacher in another implementation; a sampled token comes behind the prompt."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, torch_dtype=torch.float32)

    @torch.no_grad()
    def reply(prompt: list[int]) -> dict[str, Any]:
        logprobs = torch.log_softmax(model(torch.tensor([prompt])).logits[0], dim=-1)
        found = [float(logprobs[place, token]) for place, token in enumerate(prompt[1:])]
        tokens = [f"token_id:{token}" for token in [*prompt, 0]]
        return {"text": "", "logprobs": {"tokens": tokens, "token_logprobs": [None, *found, -1.0]}}

    return reply


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_served_teacher_is_the_one_of_the_directory(
    root: Path, alone: dict[tuple[str, ...], Update], ranks: int
) -> None:
    teacher = root / "teacher" / "hf"
    layout = ("parallel.tensor=2",) if ranks == 2 else ()
    with served(by_transformers(teacher)) as there:
        given = [*there, f"teacher.tokenizer={teacher}"]
        for found in update(root, *SAMPLED, *layout, ranks=ranks, teacher=given):
            assert torch.allclose(found.before, alone[SAMPLED].before, atol=1e-4)
            assert found.loss == pytest.approx(alone[SAMPLED].loss, rel=1e-4)
            assert difference(found, alone[SAMPLED]) < 1e-4


OTHER_TOKENS = {"tokens": ["token_id:0"] * 200, "token_logprobs": [-1.0] * 200}


@pytest.mark.parametrize(
    ("logprobs", "said"),
    [
        (None, "no log-probabilities of the prompt"),
        ({"token_logprobs": [None] * 200}, "no finite number"),
        (OTHER_TOKENS, "other tokens than it was sent"),
    ],
    ids=["none", "not finite", "other tokens"],
)
def test_a_server_that_does_not_score_the_prompt_is_named(root: Path, logprobs: Any, said: str) -> None:
    with served(lambda _: {"logprobs": logprobs}) as there, pytest.raises(AssertionError, match=said):
        update(root, *SAMPLED, teacher=[*there, f"teacher.tokenizer={root / 'teacher' / 'hf'}"])


def case(root: Path, name: str, *extra: str, stop: int | None = None) -> Case:
    given = (
        *settings(root),
        *directory(root),
        f"steps={STEPS}",
        "prompts_per_step=6",
        "group_size=4",
        "micro_batch=5",
    )
    given += (
        "micro_batch=5",
        "max_new_tokens=12",
        "optim.lr=3e-3",
        "inner_batches=2",
        "checkpoint.every=100",
        *extra,
    )
    preset = CONF / "distill" / "tiny.yaml"
    return Case("distill", preset, "even length", (f"run.output={root / name}", *given), None, stop)


@pytest.mark.parametrize(
    ("name", "extra"), [("whole", WHOLE), ("sampled", (*SAMPLED, "verify_workers=0"))], ids=["whole", "sampled"]
)
def test_a_student_gets_nearer_to_its_teacher_and_a_stopped_run_ends_the_same(
    root: Path, name: str, extra: tuple[str, ...]
) -> None:
    run_distributed(run_case, 1, case(root, name, *extra))
    rows = curve(root / name, steps=STEPS)
    assert rows[-1]["reverse_kl"] < rows[0]["reverse_kl"] - 0.1
    assert ("pass_rate" in rows[0]) == (name == "whole")
    assert (root / name / "distill.png").read_bytes().startswith(b"\x89PNG")
    run_distributed(run_case, 1, case(root, f"{name}-stopped", *extra, stop=2))
    run_distributed(run_case, 1, case(root, f"{name}-stopped", *extra))
    again = curve(root / f"{name}-stopped", steps=STEPS)
    assert [row["reverse_kl"] for row in again] == [row["reverse_kl"] for row in rows]
    assert weights_differ_by(root / name, root / f"{name}-stopped") == 0.0


def test_a_run_goes_on_with_its_own_teacher_only(root: Path) -> None:
    run_distributed(run_case, 1, case(root, "other", *WHOLE, stop=1))
    other = case(root, "other", *WHOLE, f"teacher.path={root / 'base' / 'hf'}")
    with pytest.raises(AssertionError, match="teacher weights"):
        run_distributed(run_case, 1, other)


def test_a_teacher_of_another_tokenizer_is_refused_and_both_are_named(root: Path) -> None:
    student, teacher = root / "base" / "hf", root / "stranger"
    shutil.copytree(root / "teacher" / "hf", teacher)
    file = teacher / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(content, indent=4), "utf-8")
    check_same_words(student, teacher)
    content["model"]["merges"] = content["model"]["merges"][:-1]
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError) as refused:
        check_same_words(student, teacher)
    assert str(student) in refused.value.problem
    assert str(teacher) in refused.value.problem


def test_a_teacher_with_more_words_is_refused(root: Path) -> None:
    student, teacher = root / "base" / "hf", root / "larger"
    shutil.copytree(root / "teacher" / "hf", teacher)
    settings = json.loads((teacher / "config.json").read_text("utf-8"))
    (teacher / "config.json").write_text(json.dumps(settings | {"vocab_size": settings["vocab_size"] + 64}), "utf-8")
    with pytest.raises(UserError, match=str(settings["vocab_size"] + 64)):
        check_same_words(student, teacher)
