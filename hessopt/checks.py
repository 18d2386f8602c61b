"""Checks of single arguments, for every room."""

from __future__ import annotations


def check_choice(name: str, value: object, choices: tuple[str, ...], other: str = "") -> None:
    """Raise a ValueError unless ``value`` is one of the choices; ``other`` says what else it may be."""
    if value not in choices:
        known = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be {'one of ' if len(choices) > 1 else ''}{known}{other}, got {value!r}.")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise a ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def check_type(name: str, value: object, *kinds: type) -> None:
    """Raise a TypeError unless ``value`` is of one of these exported classes."""
    if not isinstance(value, kinds):
        known = " or ".join(f"hessopt.{kind.__name__}" for kind in kinds)
        raise TypeError(f"{name} must be a {known}, got {type(value).__name__}.")
