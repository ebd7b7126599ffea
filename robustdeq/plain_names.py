"""Names that strangers give: fit for a file, for a label, for a plugin.

A name that becomes a file's or a folder's must mean that file alone, on every system: it can lead
nowhere else, and cannot be mistaken for a device, an option or a hidden file.
"""

from __future__ import annotations

import re
import unicodedata

from robustdeq.errors import UsageError

LONGEST_FILE = 200
"""Bytes of a file's name: file systems hold 255, and a suffix and a temporary name come on top."""
LONGEST_LABEL = 300
"""Characters of a row's ID and the like."""
LONGEST_PATH = 1000
_SEPARATORS = frozenset('/\\:*?"<>|')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_PLUGIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def check_file_name(name: str, what: str) -> str:
    """The name, if it can be that of a file or folder and of nothing else.

    Args:
        what: whose name it is, as in "suite mine.toml: name".

    Raises:
        UsageError: saying what is wrong with it.
    """
    wrong = _wrong_in_file(name)
    if wrong:
        raise UsageError(
            f"{what} is {_shown(name)}, which {wrong}; give letters, digits, dots, dashes and "
            "underscores, as in digits-2."
        )
    return name


def is_file_name(name: str) -> bool:
    """Whether `check_file_name` would take it."""
    return not _wrong_in_file(name)


def check_label(text: str, what: str, longest: int = LONGEST_LABEL) -> str:
    """The text, if it is one line of printable characters and not too long.

    Raises:
        UsageError: saying what is wrong with it.
    """
    wrong = "is empty" if not text.strip() else ""
    if not text.isprintable():
        wrong = "has characters that cannot be printed"
    if len(text) > longest:
        wrong = f"has more than {longest} characters"
    if wrong:
        raise UsageError(f"{what} is {_shown(text)}, which {wrong}; give a short line of text.")
    return text


def is_plugin_name(name: str) -> bool:
    """Whether an entry point's name can be typed, stand in a table, and be taken for no file."""
    return _PLUGIN.fullmatch(name) is not None and not name.endswith(".py")


def _wrong_in_file(name: str) -> str:
    """What keeps a name from being a file's; empty where nothing does."""
    if not name or name.strip(". ") == "":
        return "names no file"
    if not name.isprintable() or _SEPARATORS & set(name):
        return "has characters that a file's name cannot have"
    if name != unicodedata.normalize("NFC", name):
        return "is not in Unicode's composed form (NFC)"
    if name[0] in ".-~ " or name[-1] in ". ":
        return "begins or ends with a mark that has a meaning of its own"
    if _RESERVED.fullmatch(name):
        return "is reserved for a device on some systems"
    return f"has more than {LONGEST_FILE} bytes" if len(name.encode()) > LONGEST_FILE else ""


def _shown(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
