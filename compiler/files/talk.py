"""What takes time, and what should be known, told line by line; to the logger `peltc` where nobody else listens."""

from __future__ import annotations

import logging
from collections.abc import Callable

Talk = Callable[[str], None]
"""Is told a line; one that begins with `warning: ` is no progress."""

LOGGER = logging.getLogger("peltc")
LOGGER.addHandler(logging.NullHandler())


def logged(line: str) -> None:
    """Log a line: a warning as such, progress as information. A program that configures no logging sees neither."""
    level = logging.WARNING if line.startswith("warning: ") else logging.INFO
    LOGGER.log(level, line.removeprefix("warning: "))
