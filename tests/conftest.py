"""Before any test: one thread a process, and hypothesis without deadlines. Warnings are errors: see pyproject.toml."""

import os

# Before torch is imported, here and, inherited, in the fork server: rank processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# No deadline: a shared machine pauses. No database: a test run leaves nothing behind in the checkout.
settings.register_profile("tests", deadline=None, database=None, max_examples=50)
settings.load_profile("tests")
