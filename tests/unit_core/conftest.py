from __future__ import annotations

from hypothesis import settings

# Same examples on every run and machine, however slow; nothing written beside the tests.
settings.register_profile("conceptkit", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("conceptkit")
