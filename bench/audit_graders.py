"""Graders of other packages behind one function, each run in a process and an environment of its own.

    python bench/audit_graders.py NAME PAIRS VERDICTS

PAIRS holds JSON lines with gold, answer and response; VERDICTS gets a line for each as it is decided: `accepted`
(null: given up), `why`, and the processor time used so far. `environment(NAME, DIR)` makes the virtual environment
that this file runs in for NAME; only the packages that a grader needs are installed, so the packages' own
`__init__`, which import torch or datasets, are passed over (`bare_packages`). For the benchmark only.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ITEM_SECONDS: Final = 10.0
"""Processor time for one pair, beyond each grader's own limits; giving up counts as not accepted."""
MEMORY_BYTES: Final = 4 << 30
BATCH: Final = 500
"""Pairs that our grader gets in one call."""
SYMPY: Final = "sympy==1.14.0"
MPMATH: Final = "mpmath==1.3.0"
ANTLR: Final = "antlr4-python3-runtime=="
Row = dict[str, str]
Decide = Callable[[Row], bool]
OURS: Final = "phimr-nemo"


class GaveUp(BaseException):
    """The processor time for one pair is used up; no `except Exception` on the way may swallow it."""


def _math_verify() -> Decide:
    from math_verify import parse, verify

    return lambda row: bool(verify(parse(f"${row['gold']}$"), parse(row["response"])))


def _latex2sympy_extended() -> Decide:
    from latex2sympy2_extended import latex2sympy

    return lambda row: _same_sympy(latex2sympy(row["gold"]), latex2sympy(row["answer"]))


def _parse_latex() -> Decide:
    from sympy.parsing.latex import parse_latex

    return lambda row: _same_sympy(parse_latex(row["gold"]), parse_latex(row["answer"]))


def _latex2sympy() -> Decide:
    from latex2sympy2 import latex2sympy

    return lambda row: _same_sympy(latex2sympy(row["gold"]), latex2sympy(row["answer"]))


def _same_sympy(gold: Any, answer: Any) -> bool:
    """What a user of a parser alone writes: the same tree, or a difference that simplifies to nothing."""
    import sympy

    return bool(gold == answer or sympy.simplify(gold - answer) == 0)


def _minerva() -> Decide:
    bare_packages("lm_eval", "lm_eval.tasks", "lm_eval.tasks.minerva_math")
    utils = importlib.import_module("lm_eval.tasks.minerva_math.utils")
    normal = utils.normalize_final_answer
    return lambda row: bool(utils.is_equiv(normal(row["answer"]), normal(row["gold"])))


def _hendrycks() -> Decide:
    bare_packages("verl", "verl.utils", "verl.utils.reward_score")
    grader = importlib.import_module("verl.utils.reward_score.math_reward")
    return lambda row: bool(grader.compute_score(row["response"], row["gold"]))


def _dapo() -> Decide:
    bare_packages("verl", "verl.utils", "verl.utils.reward_score")
    grader = importlib.import_module("verl.utils.reward_score.math_dapo")
    return lambda row: bool(grader.compute_score(row["response"], row["gold"], strict_box_verify=True)["acc"])


def _prime() -> Decide:
    bare_packages("verl", "verl.utils", "verl.utils.reward_score")
    stand_in("verl.utils.metric", "Metric")
    grader = importlib.import_module("verl.utils.reward_score.prime_math")
    return lambda row: bool(grader.compute_score(row["response"], row["gold"])[0])


def _lighteval() -> Decide:
    bare_packages("lighteval", "lighteval.metrics", "lighteval.metrics.utils", "lighteval.tasks")
    stand_in("pytablewriter", "MarkdownTableWriter")
    extract = importlib.import_module("lighteval.metrics.utils.extractive_match_utils")
    compare = importlib.import_module("lighteval.metrics.utils.math_comparison").compare_gold_target
    english = importlib.import_module("lighteval.utils.language").Language.ENGLISH
    doc = importlib.import_module("lighteval.tasks.requests").Doc(query="", choices=[""], gold_index=0)
    expression, latex = extract.ExprExtractionConfig(), extract.LatexExtractionConfig
    of_gold = extract.get_extraction_regexes(doc, (expression, latex()), english)
    of_response = extract.get_extraction_regexes(doc, (expression, latex(boxed_match_priority=0)), english)

    def found(text: str, patterns: Any) -> Any:
        return extract.extract_target_from_pred(text, patterns, "first_match")

    return lambda row: bool(compare(found(f"${row['gold']}$", of_gold), found(row["response"], of_response), 6))


@dataclass(frozen=True)
class Peer:
    """A grader of another package.

    Attributes:
        needs: requirements, installed without their dependencies.
        open: imports it in its environment.
        share: of the pairs that it gets, the same for every class; 1 = all.
    """

    needs: tuple[str, ...]
    open: Callable[[], Decide]
    share: float = 1.0


PEERS: Final[dict[str, Peer]] = {
    "math-verify": Peer(
        ("math-verify==0.9.0", "latex2sympy2_extended==1.11.0", SYMPY, MPMATH, ANTLR + "4.13.2"), _math_verify, 0.2
    ),
    "lighteval": Peer(
        ("lighteval==0.13.0", "latex2sympy2_extended==1.0.6", SYMPY, MPMATH, ANTLR + "4.13.2", "packaging", "numpy"),
        _lighteval,
        0.1,
    ),
    "latex2sympy2_extended alone": Peer(
        ("latex2sympy2_extended==1.11.0", SYMPY, MPMATH, ANTLR + "4.13.2"), _latex2sympy_extended, 0.1
    ),
    "sympy parse_latex": Peer((SYMPY, MPMATH, ANTLR + "4.11.1"), _parse_latex, 0.1),
    "latex2sympy2": Peer(("latex2sympy2==1.9.1", SYMPY, MPMATH, ANTLR + "4.7.2"), _latex2sympy, 0.1),
    "lm-eval minerva_math": Peer(
        ("lm-eval==0.4.13", "math-verify==0.9.0", "latex2sympy2_extended==1.11.0", SYMPY, MPMATH, ANTLR + "4.11.0"),
        _minerva,
        0.1,
    ),
    "verl math_reward (Hendrycks)": Peer(("verl==0.9.1",), _hendrycks),
    "verl math_dapo": Peer(("verl==0.9.1",), _dapo),
    "verl prime_math": Peer(
        ("verl==0.9.1", SYMPY, MPMATH, ANTLR + "4.11.1", "pylatexenc==2.10", "numpy", "packaging"), _prime, 0.1
    ),
}
"""Name -> grader. evalscope's calls math-verify, and crfm-helm's is Hendrycks' again."""


def bare_packages(*names: str) -> None:
    """Let modules below these packages be imported without running the packages' `__init__`."""
    root = Path(next(p for p in sys.path if Path(p, names[0]).is_dir()))
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = package


def stand_in(module: str, name: str) -> None:
    """Let a name be imported that grading never uses, where its package would bring a large one."""
    sys.modules[module] = types.ModuleType(module)
    setattr(sys.modules[module], name, None)


def environment(name: str, directory: Path) -> Path:
    """The Python of a grader's virtual environment, made when it is not there.

    Raises:
        subprocess.CalledProcessError: it cannot be installed.
    """
    home = directory / "".join(c if c.isalnum() else "-" for c in name)
    python, done = home / "bin" / "python", home / "installed"
    if not done.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *PEERS[name].needs]
        subprocess.run(install, check=True, capture_output=True)
        done.write_text("\n".join(PEERS[name].needs), "utf-8")
    return python


def _give_up(*_: object) -> None:
    raise GaveUp


def each_alone(rows: Sequence[Row], decide: Decide) -> Iterator[tuple[bool | None, str]]:
    """Verdicts of a function that decides one pair, under a limit of processor time."""
    signal.signal(signal.SIGPROF, _give_up)
    for row in rows:
        signal.setitimer(signal.ITIMER_PROF, ITEM_SECONDS)
        try:
            yield decide(row), ""
        except GaveUp:
            yield None, "time"
        except Exception as error:  # noqa: BLE001 - a grader that fails on a pair is a result
            yield None, type(error).__name__
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)


def ours() -> tuple[Callable[[Sequence[Row]], Iterator[tuple[bool | None, str]]], Callable[[], None]]:
    """Verdicts of this project's grader with one worker, which has started; and what ends it."""
    from phimr_nemo.verify import Grader

    grader = Grader(workers=1)
    grader.grade(r"\boxed{x+1}", "1+x")

    def decide(rows: Sequence[Row]) -> Iterator[tuple[bool | None, str]]:
        for start in range(0, len(rows), BATCH):
            part = [(row["response"], row["gold"]) for row in rows[start : start + BATCH]]
            for verdict in grader.grade_many(part):
                given_up = verdict.verdict not in ("correct", "wrong", "unparsable")
                yield None if given_up else verdict.verdict == "correct", f"{verdict.verdict}: {verdict.reason}"

    return decide, grader.close


def processor_seconds() -> float:
    """Of this process and its children, ended or not."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    total = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    try:
        import psutil
    except ImportError:
        return total
    for child in psutil.Process().children(recursive=True):
        total += sum(child.cpu_times()[:4])
    return total


def main(name: str, pairs: Path, verdicts: Path) -> None:
    """Grade the pairs that have no verdict yet: the verdicts of a run that died stay."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    rows: list[Row] = [json.loads(line) for line in pairs.read_text("utf-8").splitlines()]
    done = len(verdicts.read_text("utf-8").splitlines())
    if name == OURS:
        grade, close = ours()
    else:
        decide = PEERS[name].open()
        list(each_alone([{"gold": "1", "answer": "1", "response": r"$\boxed{1}$"}], decide))  # imports what it needs
        grade, close = (lambda given: each_alone(given, decide)), (lambda: None)
    before = processor_seconds()
    used = 0.0
    with verdicts.open("a", encoding="utf-8") as out:
        for number, (accepted, why) in enumerate(grade(rows[done:])):
            if name != OURS or number % BATCH == 0 or done + number + 1 == len(rows):
                used = processor_seconds() - before
            print(json.dumps({"accepted": accepted, "why": why, "seconds": used}), file=out, flush=True)
    close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
