"""The header by which a server says when to come back."""

from __future__ import annotations

import re
from datetime import UTC
from email.utils import parsedate_to_datetime


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
