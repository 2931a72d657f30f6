"""The command line: commands only. Everything heavy is imported inside the command that needs it.

Exit codes: 0 ok, 2 usage or config, 3 data, 4 environment, 5 diverged, 130/143 signals.
"""

from __future__ import annotations

from medssl.cli.entry import main
from medssl.cli.group import cli

__all__ = ["cli", "main"]
