"""The header by which a server says when to come back."""

from __future__ import annotations

import re
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def parse_retry_after(text: str, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks for, not below 0; None where it makes no sense.

    Source: RFC 9110 section 10.2.3: seconds, or a date in one of three forms. Fractions are sent all the same.

    Args:
        text: The header's value.
        now: Wall time in seconds.
    """
    text = text.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
        # A date without a zone is GMT, as all HTTP dates are.
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def longest_wait(headers: Iterable[str], now: float) -> float | None:
    """Return the longest of the waits that Retry-After headers ask for: one may be a proxy's, and one its server's.

    Args:
        headers: The headers' values; usually none or one.
        now: Wall time in seconds.

    Returns:
        Seconds; None where no header makes sense.
    """
    waits = (parse_retry_after(each, now) for each in headers)
    return max((wait for wait in waits if wait is not None), default=None)
