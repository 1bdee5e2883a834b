"""A slice of `make soak`: every phase and every check of schemathesis on a real process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.security.soak import soak


@pytest.mark.timeout(900)  # a minute on a quiet machine
def test_the_api_is_what_its_description_says(postgres_url: str, tmp_path: Path) -> None:
    status, report = soak(postgres_url, tmp_path, examples=3, seed=1)
    assert status == 0, report
