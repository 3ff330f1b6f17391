"""Formats of numbers on pages and in the terminal."""

from collections.abc import Mapping


def km(value: float) -> str:
    """Returns a distance in meters below 1 km, else in kilometers: 350 m, 12.3 km, 1,234 km."""
    return f"{1000 * float(value):.0f} m" if value < 1 else f"{number(value)} km"


def number(value: float) -> str:
    """Returns a number with one decimal below 100, else an integer with commas: 12.3, 1,234."""
    return f"{float(value):.1f}" if value < 100 else f"{float(value):,.0f}"


def percent(share: float) -> str:
    """Returns a share in percent: 12.3 %, or < 0.1 % if the share is positive and below 0.001."""
    return f"{100 * share:.1f} %" if share >= 0.001 or not share else "< 0.1 %"


def percent_interval(estimate: Mapping[str, float]) -> str:
    """Returns a share with its interval, in percent: 12.3 % (11.0 to 13.6)."""
    return f"{percent(estimate['value'])} ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"


def signed(value: float) -> str:
    """Returns a number with its sign and one decimal: +1.2, or 0.0 if it is between -0.05 and 0.05.

    The minus sign is the Unicode character.
    """
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
