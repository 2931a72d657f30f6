"""Settings of all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# The first example of a property pays for imports, and machines of a CI are shared: no deadline.
settings.register_profile("medssl", deadline=None)
settings.load_profile("medssl")

# A shell makes what it starts behind it, or under nohup, ignore these, and with it every program
# that a test starts and then ends by one of them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
