"""Where two results of the same cell differ: `dipper reproduce --check`.

differences({"loss": 1.5, "tok_per_s": 9.0}, {"loss": 1.6, "tok_per_s": 9.1}, ("tok_per_s",), ("tok_per_s",))
# ["loss is 1.5, now 1.6"]
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["RATIO", "differences"]

RATIO = 1.25  # within which a figure that varies, and has no error bars, is the same
_ERROR_BARS = ("_stderr", "_ci95")


def differences(old: Any, new: Any, varies: Sequence[str] = (), within: Sequence[str] = ()) -> list[str]:
    """Where two results differ: figures exactly, save those that a rerun may change.

    Args:
        old, new: of JSON types.
        varies: dotted names in them, `*` for any name or index; with all that is under them.
        within: of these, numbers that must still agree: within three standard errors where there is one beside them
            (`x_stderr` of `x`), within their intervals (`x_ci95`), or else within `RATIO` of each other, and must
            still be there. Other values may differ, and so may the error bars.

    Returns:
        A line for each difference.
    """
    return list(_differ(old, new, (), _patterns(varies), _patterns(within)))


_ABSENT = object()
_Patterns = tuple[tuple[str, ...], ...]


def _patterns(names: Sequence[str]) -> _Patterns:
    return tuple(tuple(name.split(".")) for name in names)


def _differ(
    old: Any, new: Any, at: tuple[str, ...], varies: _Patterns, within: _Patterns, agree: bool | None = None
) -> Iterator[str]:
    """`agree`: by the error bars beside these numbers; None: they have none."""
    varying = _covered(varies, at)
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if _covered(varies, (*at, key)) and _is_error_bar(key, old):
                continue
            a, b = old.get(key, _ABSENT), new.get(key, _ABSENT)
            yield from _differ(a, b, (*at, key), varies, within, _agree(key, old, new))
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new) and (not varying or _reaches(within, at)):
            yield f"{_dotted(at)} has {len(old)} values, now {len(new)}"
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            yield from _differ(a, b, (*at, str(i)), varies, within)
    elif varying:
        numbers = _is_number(old) and _is_number(new)
        same = (_near(old, new) if agree is None else agree) if numbers else _sort(old) is _sort(new)
        if not same and (_covered(within, at) if numbers else _reaches(within, at)):
            yield f"{_dotted(at)} is {_told(old)}, now {_told(new)}"
    elif old != new or type(old) is not type(new):
        yield f"{_dotted(at)} is {_told(old)}, now {_told(new)}"


def _covered(patterns: _Patterns, at: tuple[str, ...]) -> bool:
    """Whether one of the dotted names is this place or holds it."""
    return any(
        len(pattern) <= len(at) and all(p in ("*", name) for p, name in zip(pattern, at, strict=False))
        for pattern in patterns
    )


def _reaches(patterns: _Patterns, at: tuple[str, ...]) -> bool:
    """Whether one of the dotted names is this place, holds it, or lies in it."""
    return any(all(p in ("*", name) for p, name in zip(pattern, at, strict=False)) for pattern in patterns)


def _sort(value: Any) -> type:
    return float if _is_number(value) else type(value)


def _agree(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool | None:
    values: list[Any]
    errors: list[Any]
    intervals: list[Any]
    values, errors, intervals = ([side.get(key + end) for side in (old, new)] for end in ("", *_ERROR_BARS))
    if not all(map(_is_number, values)):
        return None
    if all(map(_is_number, errors)):
        return bool(abs(values[0] - values[1]) <= 3 * math.hypot(*errors))
    if all(isinstance(interval, list) and len(interval) == 2 for interval in intervals):
        return bool(max(low for low, _ in intervals) <= min(high for _, high in intervals))
    return None


def _is_error_bar(key: str, beside: Mapping[str, Any]) -> bool:
    return any(_is_number(beside.get(key.removesuffix(end))) for end in _ERROR_BARS if key.endswith(end))


def _near(a: float, b: float) -> bool:
    low, high = sorted((a, b))
    return low == high or (low > 0 and high <= RATIO * low) or (high < 0 and -low <= -RATIO * high)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _dotted(at: Sequence[str]) -> str:
    return ".".join(at) or "the result"


def _told(value: Any) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
