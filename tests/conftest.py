"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# The first example of a property pays for imports, and machines of a CI are shared: no deadline.
settings.register_profile("medssl", deadline=None)
settings.load_profile("medssl")
