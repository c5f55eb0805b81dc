"""Values of a row, from text or JSON to exact integers. Every failure is a `TraceError`."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from reprlib import repr as shown
from typing import Any, NoReturn

from gllm.trace.errors import TraceError

NS_PER_S = 1_000_000_000
MAX_TOKENS = 1_000_000_000
"""No request is longer: a larger number is a broken file."""
MAX_NS = 2**63 - 1
"""Downstream tables hold times as 64-bit integers: 292 years."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ISO = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII)


def tokens(value: object, name: str) -> int:
    """A length in tokens; `374`, `"374"` and a spreadsheet's `374.0` are fine, 374.5 is not."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)  # the usual case
    number = _decimal(value, name)
    if not 0 <= number <= MAX_TOKENS:
        raise TraceError(f"{name} is {shown(value)}; it must be between 0 and {MAX_TOKENS:,} tokens")
    if number != int(number):
        raise TraceError(f"{name} is {shown(value)}; it must be a whole number of tokens")
    return int(number)


def decimal_ns(value: object, name: str, unit_ns: int = NS_PER_S) -> int:
    """A time of `unit_ns` each in integer ns: read as a decimal, never through a float."""
    number = _decimal(value, name)
    if not 0 <= number <= MAX_NS // unit_ns:
        raise TraceError(f"{name} is {shown(value)}; a time must not be negative, nor 292 years or more")
    return round(number * unit_ns)


def iso_ns(value: object, name: str) -> int:
    """A date and time in integer ns since 1970, exact to 1 ns; without a zone it is taken as UTC."""
    match = _ISO.fullmatch(value.strip()) if isinstance(value, str) else None
    since = _since_epoch(match[1], match[3] or "Z") if match else None
    if match is None or since is None:
        raise TraceError(f"{name} is {shown(value)}; a time looks like 2023-11-16 18:17:03.9799600")
    time_ns = since // timedelta(microseconds=1) * 1000 + int((match[2] or "").ljust(9, "0"))
    if abs(time_ns) > MAX_NS:
        raise TraceError(f"{name} is {shown(value)}; a time must lie between the years 1678 and 2262")
    return time_ns


def integer(value: object, name: str, low: int = -MAX_NS) -> int:
    """A JSON integer of at least `low` that fits 64 bits."""
    if type(value) is not int or not low <= value <= MAX_NS:
        at_least = "" if low < 0 else f" of at least {low}"
        raise TraceError(f"{name} is {shown(value)}; it must be an integer{at_least} below 2^63")
    return value


def integers(value: object, name: str) -> tuple[int, ...]:
    """A JSON list of integers."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise TraceError(f"{name} is {shown(value)}; it must be a list of integers")
    return tuple(value)


def json_object(line: str) -> dict[str, Any]:
    """The object on a line of JSON; NaN and infinities are refused, since they equal nothing."""
    try:
        value = json.loads(line, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise TraceError("is nested too deeply to be a request") from None
    except ValueError as error:
        raise TraceError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TraceError(f"is {shown(value)}; every line must be a JSON object")
    return value


def _since_epoch(stamp: str, zone: str) -> timedelta | None:
    try:
        return datetime.fromisoformat(stamp + zone) - _EPOCH
    except (ValueError, OverflowError):  # the 31st of February; a zone that leaves year 1
        return None


def _decimal(value: object, name: str) -> Decimal:
    """A finite number from text or JSON; a float by its shortest text, which is what the file said."""
    is_number = isinstance(value, str | int | float) and not isinstance(value, bool)
    try:
        number = Decimal(str(value) if is_number else "NaN")
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite():
        raise TraceError(f"{name} is {shown(value)}; it must be a number")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        _refuse(text)
    return number


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")
