"""The LaTeX commands that the grader knows by name."""

from __future__ import annotations

from typing import Final


def words(text: str) -> tuple[str, ...]:
    """The words of a table."""
    return tuple(text.split())


GREEK: Final = words(
    """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho sigma tau
    upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"""
)
TRIGONOMETRIC: Final = words("sin cos tan cot sec csc")
FUNCTIONS: Final = words(
    """sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth ln log lg exp det gcd lcm
    max min deg dim ker arg Re Im sup inf lim bmod mod"""
)
GLUABLE: Final = tuple(
    sorted([*GREEK, *FUNCTIONS, *words("cdot times pm hbar angle div infty")], key=len, reverse=True)
)
"""Commands to which a source that strips spaces may have glued what follows, longest first."""

KNOWN: Final = frozenset(
    [
        *GREEK,
        *FUNCTIONS,
        *words(
            """frac sqrt text left right cdot cdots ldots dots times div pm mp infty cup cap in notin subset emptyset
            mathbb mathcal mathrm begin end overline bar vec hat dot ddot tilde angle triangle circ degree prime leq
            geq neq le ge ne lt gt approx equiv sim to rightarrow mid lfloor rfloor lceil rceil langle rangle
            lvert rvert vert binom dbinom tbinom sum prod int oint partial nabla hbar odot oplus otimes star setminus
            land lor neg forall exists mathring underline widehat pmod operatorname implies iff perp parallel cong
            propto infinity limits displaystyle not quad qquad ell varnothing imath jmath boxed overrightarrow
            underbrace overbrace stackrel substack choose over textstyle mho because therefore"""
        ),
    ]
)
