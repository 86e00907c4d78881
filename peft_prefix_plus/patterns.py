"""Regular expressions of a configuration, which may come from a file that somebody else wrote."""

import re
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

# Where an expression goes into a larger one.
PLACE = "@"
# Names of modules are rarely longer.
MAX_NAME_LENGTH = 64
# Four wildcards of any length: less than a second for a name.
MAX_MATCH_PATHS = (MAX_NAME_LENGTH + 1) ** 4


def check_pattern(name: str, pattern: object, frame: str = PLACE) -> None:
    """Raise a `ValueError` if something is not a regular expression, or one that could take forever to match.

    Args:
        name (`str`): the field that it is from, for the message.
        pattern (`object`): what should be a regular expression.
        frame (`str`): the expression that it becomes a part of, with `PLACE` in its stead.
    """
    try:
        re.compile(pattern)  # type: ignore[call-overload]
        num_paths = _count_paths(_parser.parse(pattern))
        re.compile(frame.replace(PLACE, pattern))  # type: ignore[arg-type]
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"`{name}` has {pattern!r:.200}, which is not a regular expression: {error}.") from error
    if num_paths > MAX_MATCH_PATHS:
        raise ValueError(
            f"`{name}` has {pattern!r:.200}, which could take very long to match: it repeats parts that match in many "
            "ways. Use fewer wildcards and no repeats inside of repeats, or name the modules."
        )


def _count_paths(parsed: Any) -> int:
    """Bound the number of ways in which a backtracking matcher may try an expression on a name, up to a limit."""
    paths: int = 1
    for code, argument in parsed:
        paths = min(paths * _count_choices(code, argument), MAX_MATCH_PATHS + 1)
    return paths


def _count_choices(code: Any, argument: Any) -> int:
    if code in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
        least, most, body = argument
        most = min(int(most), MAX_NAME_LENGTH)
        ways = _count_paths(body)
        return min(int(ways**most), MAX_MATCH_PATHS + 1) * max(most - int(least) + 1, 1)
    if code is _constants.BRANCH:
        return sum(_count_paths(branch) for branch in argument[1])
    if code is _constants.GROUPREF_EXISTS:
        return sum(_count_paths(branch) for branch in argument[1:] if branch is not None)
    if code in (_constants.ASSERT, _constants.ASSERT_NOT):
        return _count_paths(argument[1])
    if code is _constants.SUBPATTERN:
        return _count_paths(argument[-1])
    if code is _constants.ATOMIC_GROUP:
        return _count_paths(argument)
    return 1
