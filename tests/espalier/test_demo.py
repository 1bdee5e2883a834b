"""`espalier demo`, on the real model with less text than by default, and what it does when a step does not hold."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from espalier import demo

CACHE = Path(__file__).parents[2] / "var/cache"
LITTLE = {"calibration": {"samples": 4}, "evaluation": {"windows": 3, "speed": False}}


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def test_the_real_model_end_to_end(tmp_path: Path) -> None:
    assert demo.run(tmp_path, CACHE, **LITTLE) == 0
    summary = summary_of(tmp_path)
    assert summary["held"]
    assert [step["step"] for step in summary["steps"]] == [
        *("model", "service", "job", "resume", "download", "loads", "generates", "parameters", "sparsity", "perplexity"),
    ]
    table = {row["measure"]: (row["dense"], row["pruned"]) for row in summary["table"]}
    assert table["parameters, all"] == (134_515_008, summary["generated"]["pruned"]["parameters"])
    assert table["parameters, MLPs"][1] == pytest.approx(0.8 * table["parameters, MLPs"][0], rel=0.001)
    assert (tmp_path / "download/checkpoint/model.safetensors.index.json").exists() or (tmp_path / "download/checkpoint/model.safetensors").exists()
    assert not (tmp_path / "service").exists()


def test_a_job_that_fails_fails_the_demo(tmp_path: Path) -> None:
    assert demo.run(tmp_path, CACHE, calibration={"samples": 1, "sequence_length": 131072}) == 1
    summary = summary_of(tmp_path)
    assert not summary["held"]
    assert summary["steps"][-1]["step"] == "job"
    assert "calibration_text_too_short" in summary["steps"][-1]["detail"]


def test_callers_at_the_same_time_share_one_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions = []

    def convert(command: list[str], what: str) -> str:
        conversions.append(what)
        time.sleep(0.3)
        folder = Path(command[-1])
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        return ""

    monkeypatch.setattr(demo, "_run", convert)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(demo.converted_model, [tmp_path] * 4))
    assert len(conversions) == 1
    assert [path.name for folder in folders for path in folder.iterdir()] == ["config.json"]


def test_a_conversion_that_fails_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], what: str) -> str:
        Path(command[-1]).mkdir()
        raise demo.DemoError(f"{what} failed")

    with monkeypatch.context() as broken:
        broken.setattr(demo, "_run", fail)
        with pytest.raises(demo.DemoError, match="the conversion of the model failed"):
            demo.converted_model(tmp_path)
    assert not (tmp_path / demo.MODEL_NAME).exists()
