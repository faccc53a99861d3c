"""For all tests."""

from __future__ import annotations

import signal

# A background job of a shell ignores Ctrl-C, and so would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
