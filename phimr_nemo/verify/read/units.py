"""Units of measurement: which words are units, and how large they are."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

from phimr_nemo.verify.read.names import words

_INCH, _FOOT, _MILE = Fraction(254, 10_000), Fraction(3048, 10_000), Fraction(1_609_344, 1000)
_POUND: Final = Fraction(45_359_237, 100_000)
_HOUR: Final = 3600

_LENGTHS: Final = {
    "mm millimeter millimetre": Fraction(1, 1000),
    "cm centimeter centimetre": Fraction(1, 100),
    "dm decimeter decimetre": Fraction(1, 10),
    "m meter metre": Fraction(1),
    "km kilometer kilometre": Fraction(1000),
    "nm nanometer": Fraction(1, 10**9),
    "in inch inche": _INCH,
    "ft foot feet": _FOOT,
    "yd yard": 3 * _FOOT,
    "mi mile": _MILE,
}
_OTHERS: Final = {
    "volume": {"l liter litre": Fraction(1, 1000), "ml milliliter millilitre": Fraction(1, 10**6)},
    "mass": {
        "mg milligram": Fraction(1, 1000),
        "g gram gm": Fraction(1),
        "kg kilogram": Fraction(1000),
        "t ton tonne": Fraction(10**6),
        "lb pound": _POUND,
        "oz ounce": _POUND / 16,
    },
    "time": {
        "ms millisecond": Fraction(1, 1000),
        "s sec second": Fraction(1),
        "min minute": Fraction(60),
        "h hr hour": Fraction(_HOUR),
        "day": Fraction(24 * _HOUR),
        "week": Fraction(168 * _HOUR),
    },
    "speed": {
        "m/s": Fraction(1),
        "km/h kmh kmph kph km/hr km/hour": Fraction(1000, _HOUR),
        "mph mi/h mile/hour milesperhour mi/hr": _MILE / _HOUR,
        "ft/s": _FOOT,
    },
    "money": {"dollar usd": Fraction(1), "cent": Fraction(1, 100)},
}
_UNCONVERTED: Final = frozenset(
    words(
        """mol J kJ cal kcal N kN W kW MW V kV mV A mA Hz kHz MHz GHz Pa kPa MPa atm eV bar keV MeV GeV K C F T rad
        rpm pc kpc Mpc AU erg dyn bit byte amu ohm deg Å yr secs mins gal gallon acre hectare"""
    )
)


def _table() -> dict[str, tuple[str, Fraction]]:
    """Every spelling of a unit -> its dimension and size; areas and volumes follow from the lengths."""
    units: dict[str, tuple[str, Fraction]] = {}
    for names, size in _LENGTHS.items():
        for name in words(names):
            units[name] = ("length", size)
            for spelling in (f"{name}^2", f"square{name}", f"sq{name}"):
                units[spelling] = ("area", size**2)
            for spelling in (f"{name}^3", f"cubic{name}", f"cu{name}"):
                units[spelling] = ("volume", size**3)
    for dimension, sizes in _OTHERS.items():
        for names, size in sizes.items():
            units.update(dict.fromkeys(words(names), (dimension, size)))
    return units


_UNITS: Final = _table()


def unit_size(unit: str) -> tuple[str, Fraction] | None:
    """The dimension of a unit and its size in that dimension's base unit; None for a word that is no known unit."""
    name = re.sub(r"[\s.{}~()]|\\text|\\cdot|\\", "", unit).replace("²", "^2").replace("³", "^3")
    for candidate in (name, name.lower()):
        for spelling in (candidate, re.sub(r"s(?=$|\^|/)", "", candidate)):
            if spelling in _UNITS:
                return _UNITS[spelling]
    return None


def is_unit(text: str) -> bool:
    """Whether bare letters are a unit or a quotient of units."""
    parts = re.split(r"\s*[/·]\s*|\s+per\s+", text)
    return all(unit_size(part) is not None or part.split("^")[0] in _UNCONVERTED for part in parts)
