"""Formats numbers as text."""

from __future__ import annotations

import math


def fixed(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    text = "∞" if math.isinf(value) else f"{abs(value):,.{digits}f}"
    return f"−{text}" if value < 0 else text


def percent(share: float | None) -> str:
    text = fixed(None if share is None else 100 * share, 1)
    return f"{text} %" if share is not None and math.isfinite(share) else text


def perplexity(loss: float | None) -> str:
    """exp of a loss in nats: of how many equally likely tokens it would be the loss."""
    if loss is None or not loss < 700:  # beyond it, exp is infinite
        return fixed(loss and math.inf, 1)
    return fixed(math.exp(loss), 1)


def counted(number: float, noun: str) -> str:
    """1, "task" -> "1 task"; 1234, "batch" -> "1,234 batches"."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{number:{',' if isinstance(number, int) else 'g'}} {noun}{ending}"


def count(number: int) -> str:
    """22_700_000 -> "22.7 M"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.99995 * scale:  # 1000.0 after rounding is 1.0 of the next unit
            return f"{number / scale:,.1f} {unit}"
    return str(number)


def duration(seconds: float | None) -> str:
    """192 -> "3 min 12 s"; always at most two units."""
    if seconds is None or not math.isfinite(seconds):
        return fixed(seconds, 0)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"
