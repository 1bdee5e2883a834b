"""The service's own fixtures, for the tests of this folder too."""

from __future__ import annotations

from tests.app.conftest import api, migrated_url, roots, shared_api, sqlite_template
from tests.app.test_logging import logged

__all__ = ["api", "logged", "migrated_url", "roots", "shared_api", "sqlite_template"]
