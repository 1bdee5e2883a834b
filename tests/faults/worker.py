"""A Celery worker whose engine is the stand-in: `celery -A tests.faults.worker worker`."""

from __future__ import annotations

import sys

from app.settings import get_settings
from worker.celery import make_worker

app = make_worker(get_settings(), engine=(sys.executable, "-m", "tests.faults.engine"))
