"""What may leave the run folder: settings and labels that name no place and no account."""

from __future__ import annotations

import getpass
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# Values that name a place on this machine are not sent on.
_PLACE_KEYS = {"path", "folder", "file", "root", "uri", "directory"}
_PLACE = re.compile(r"""(?:^|[\s='"(\[,:])(?:~?/|\.{1,2}/|\\\\|[A-Za-z]:[\\/])\S""")
_SERVICE_ACCOUNTS = {"root", "medssl", "user", "app"}  # accounts that name nobody


def public(key: str, value: Any) -> str:
    """Return a value as text that names no place on this machine and no account.

    Args:
        key: name of the setting; ``…path``, ``…folder`` and the like hold places.
        value: plain JSON content.
    """
    text = value if isinstance(value, str) else json.dumps(value)
    words = re.split(r"[._]", key.lower())
    if isinstance(value, str) and (words[-1] in _PLACE_KEYS or _PLACE.search(text)):
        return "(a path)"
    if isinstance(value, list | dict) and _PLACE.search(text):
        return "(a path)"
    for account in _accounts():
        text = re.sub(rf"(?<!\w){re.escape(account)}(?!\w)", "(a name)", text, flags=re.IGNORECASE)
    return text


def _accounts() -> Iterator[str]:
    names = {Path.home().name}
    try:
        names.add(getpass.getuser())
    except (KeyError, OSError):
        log.debug("This account has no name.")
    yield from (name for name in names if len(name) > 1 and name not in _SERVICE_ACCOUNTS)
