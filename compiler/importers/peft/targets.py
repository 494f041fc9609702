"""Which of a model's modules a config of Hugging Face PEFT means: the rules of its own matcher.

A list's entries mean a module of that name or one whose name ends in `.entry`; a text is a regular expression for whole
names. `layers_to_transform` chooses among modules meant by an ending, by the first number in their name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from peltc.compiler.importers.quirks import Misread, Quirk, Shapes
from peltc.spec.diagnostics import fail

ALL_LINEAR = "all-linear"
MAX_REPEATS, MANY = 6, 20
"""How many unbounded repetitions an expression may have, and up to how often a repetition counts as bounded."""


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """An expression of a config, whose matching takes a bounded time: names are short, and an expression that can try
    too many ways is refused.

    Raises:
        PeltError: E430.
    """
    try:
        found = re.compile(pattern)
        ways = _ways(re._parser.parse(pattern), False)  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError) as error:
        raise fail(
            "E430", f"the expression {pattern!r:.120} cannot be read: {error}", expected="an expression of Python"
        ) from None
    if ways > MAX_REPEATS:
        raise fail("E430", f"the expression {pattern!r:.120} could take forever to match",
                   expected=f"at most {MAX_REPEATS} repetitions such as `.*`, none within another")  # fmt: skip
    return found


def _ways(parsed: Any, within: bool) -> int:
    """How many unbounded repetitions can be tried against each other; more than are allowed where one lies within
    another."""
    total = 0
    for operation, arguments in parsed:
        name = str(operation)
        if name == "BRANCH":
            total += MAX_REPEATS + 1 if within else max((_ways(branch, within) for branch in arguments[1]), default=0)
        elif name == "SUBPATTERN":
            total += _ways(arguments[-1], within)
        elif name in ("ASSERT", "ASSERT_NOT"):
            total += _ways(arguments[1], within)
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            many = arguments[1] > 1
            total += (MAX_REPEATS + 1 if within and many else int(arguments[1] > MANY)) + _ways(
                arguments[2], within or many
            )
        elif name in ("GROUPREF", "GROUPREF_EXISTS", "ATOMIC_GROUP"):
            total += MAX_REPEATS + 1
    return total


def patterned(patterns: Any, module: str, otherwise: Any) -> Any:
    """The value of the first pattern, in sorted order, that fits a module's name."""
    for pattern in sorted(patterns or {}):
        if compiled(rf"(.*\.)?({pattern})$").match(module):
            return patterns[pattern]
    return otherwise


def disagree(patterns: Any, module: str) -> bool:
    """Whether several patterns with different values fit a module's name."""
    fitting = [value for key, value in (patterns or {}).items() if compiled(rf"(.*\.)?({key})$").match(module)]
    return any(value != fitting[0] for value in fitting)


def overlap(config: Mapping[str, Any], module: str, shapes: Shapes) -> bool:
    """Whether it is left open which alpha a module was trained with; which rank stands in its tensors."""
    return disagree(config.get("alpha_pattern"), module)


OVERLAP = Misread(
    Quirk("overlapping_patterns",
          "where several of `alpha_pattern` fit a module, a folder that is loaded takes the first by the alphabet",
          "", "training took the first in the order of the config, and PEFT sorts the keys when it saves it"),
    overlap,
)  # fmt: skip


def dotted(patterns: Any, module: str, otherwise: Any) -> Any:
    """As `patterned`, by PEFT's older rule: what stands after a dot fits, and a name fits itself."""
    for pattern in sorted(patterns or {}):
        if compiled(rf".*\.{pattern}$").match(module):
            return patterns[pattern]
    return (patterns or {}).get(module, otherwise)


def rank_and_alpha(config: Mapping[str, Any], module: str, alpha: str) -> dict[str, Any]:
    """Rank and alpha at a module, which are 8 where a config says nothing.

    Args:
        alpha: what the method calls the alpha of all modules.
    """
    return {"r": patterned(config.get("rank_pattern"), module, config.get("r", 8)),
            "alpha": patterned(config.get("alpha_pattern"), module, config.get(alpha, 8))}  # fmt: skip


def means(wanted: Any, module: str) -> bool:
    """Whether a text or a list of names means a module."""
    if isinstance(wanted, str):
        return compiled(wanted).fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted or ())


def in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module lies in the layers that a config chooses."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    wanted = config.get("target_modules")
    if layers is None or isinstance(wanted, str) or module in (wanted or ()):
        return True
    names = [pattern] if isinstance(pattern, str) else list(pattern or ())
    forms = [rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\." for name in names] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for form in forms if (match := re.match(form, module))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def targeted(config: Mapping[str, Any], modules: Iterable[str], heads: Iterable[str]) -> list[str]:
    """The modules that a config means.

    Args:
        modules: the model's linear maps by their modules' names.
        heads: those of them that `all-linear` leaves out.
    """
    saved = config.get("modules_to_save") or ()
    apart = set(heads)
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules")

    def chosen(module: str) -> bool:
        if any(module.endswith(name) for name in saved) or (excluded and means(excluded, module)):
            return False
        if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
            return module not in apart
        return means(wanted, module) and in_layers(config, module)

    return [module for module in modules if chosen(module)]
