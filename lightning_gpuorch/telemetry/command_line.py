"""Command lines as they are recorded: what looks like a secret is not in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

HIDDEN = "***"
_SECRET = re.compile(
    r"token(?!s|iz)|secret|passw(or)?d|passphrase|api[-_]?key|(access|private)[-_]?key|credential", re.IGNORECASE
)
_PASSWORD_IN_URL = re.compile(r"(?<=://)([^/@:\s]*):[^/@\s]+@")


def command_line(arguments: Sequence[str]) -> str:
    """Join arguments for a record. Values of options and variables whose name looks like that of a secret are left out.

    Args:
        arguments: As in ``sys.argv``.
    """
    shown, is_secret = [], False
    for argument in arguments:
        if is_secret and not argument.startswith("-"):
            shown.append(HIDDEN)
            is_secret = False
            continue
        name, equals, _ = argument.partition("=")
        looks_secret = bool(_SECRET.search(name))
        if looks_secret and equals:
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(_PASSWORD_IN_URL.sub(rf"\1:{HIDDEN}@", argument))
        is_secret = looks_secret and not equals and argument.startswith("-")
    return shlex.join(shown)
