"""``python -m medssl`` and the ``medssl`` command."""

from __future__ import annotations

from medssl.cli import main

if __name__ == "__main__":
    main()
