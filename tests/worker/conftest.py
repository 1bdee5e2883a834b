"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest

from app.report import LoadCheck


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the fresh process that loads a result."""
    check = LoadCheck(layout="uniform", loader="none", max_logit_difference=0.0, checked="logits")
    monkeypatch.setattr("worker.pipeline._verify", lambda *_: [check])
