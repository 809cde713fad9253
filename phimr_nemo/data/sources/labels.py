"""A source's own labels on our scales of domain and difficulty. The tables are repeated in docs/data.md.

The paper names the domains "algebra, geometry, theory, probability, calculus, ..." without a full list, and five
difficulties. Which label is which is therefore our choice; a label that is not in a table maps to None, and the
source's own word stays in the row's metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal, get_args

from phimr_nemo.store.records import Difficulty

Domain = Literal[
    "arithmetic",
    "algebra",
    "geometry",
    "number_theory",
    "combinatorics",
    "probability",
    "calculus",
    "logic",
    "other",
]
DOMAINS: Final[tuple[Domain, ...]] = get_args(Domain)

# The first entry found in a label decides, so the special come before the general.
DOMAIN_LABELS: Final[Mapping[str, Domain]] = {
    "number theory": "number_theory",
    "数论": "number_theory",
    "counting & probability": "probability",
    "probability": "probability",
    "statistics": "probability",
    "概率": "probability",
    "combinatori": "combinatorics",
    "discrete math": "combinatorics",
    "counting": "combinatorics",
    "graph theory": "combinatorics",
    "计数": "combinatorics",
    "组合": "combinatorics",
    "precalculus": "algebra",
    "calculus": "calculus",
    "differential equations": "calculus",
    "analysis": "calculus",
    "微积分": "calculus",
    "geometry": "geometry",
    "trigonometry": "geometry",
    "topology": "geometry",
    "几何": "geometry",
    "algebra": "algebra",
    "inequalit": "algebra",
    "equation": "algebra",
    "polynomial": "algebra",
    "函数": "algebra",
    "方程": "algebra",
    "代数": "algebra",
    "logic": "logic",
    "puzzle": "logic",
    "逻辑": "logic",
    "推理": "logic",
    "arithmetic": "arithmetic",
    "calculation": "arithmetic",
    "word problem": "arithmetic",
    "计算": "arithmetic",
    "应用题": "arithmetic",
    "other": "other",
}

# Where a source tells the origin of a question: NuminaMath's and Big-Math's `source`, MetaMathQA's `type`,
# MathInstruct's file. Sets that span several tiers (MATH, HARP, Omni-MATH: they have levels) are left out.
ORIGIN_DIFFICULTY: Final[Mapping[str, Difficulty]] = {
    "gsm8k": "elementary",
    "orca_math": "elementary",
    "orca-math": "elementary",
    "ape210k": "elementary",
    "cn_k12": "high_school",
    "aqua_rat": "high_school",
    "amc_aime": "high_school",
    "synthetic_amc": "high_school",
    "synthetic_math": "high_school",
    "cn_contest": "college",
    "aops_forum": "college",
    "olympiads": "college",
    "olympiads_ref": "college",
    "inequalities": "college",
    "number_theory": "college",
    "theoremqa": "college",
}

# TAL-SCQ5K's `difficulty` is a place within a primary, junior high or high school set; the set is not told.
TAL_DIFFICULTY: Final[Mapping[str, Difficulty]] = {
    "0": "elementary",
    "1": "elementary",
    "2": "middle",
    "3": "middle",
    "4": "high_school",
}

_ARROW: Final = re.compile(r"\s*->\s*")


def domain_of(label: object) -> Domain | None:
    """A source's own label of a domain, or a path of labels ("Mathematics -> Algebra -> ..."), as one of ours.

    Of a path the most general part that the table knows decides.
    """
    if isinstance(label, list):
        return next((domain for domain in map(domain_of, label) if domain is not None), None)
    if not isinstance(label, str):
        return None
    exact = label.strip().lower().replace(" ", "_")
    for domain in DOMAINS:
        if exact == domain:
            return domain
    for part in _ARROW.split(label.lower()):
        for known, domain in DOMAIN_LABELS.items():
            if known in part.replace("_", " "):
                return domain
    return None


def origin_difficulty(origin: object) -> Difficulty | None:
    """The tier of a set of questions by its name in another collection; None where the name says nothing."""
    return ORIGIN_DIFFICULTY.get(origin.strip().lower()) if isinstance(origin, str) else None
