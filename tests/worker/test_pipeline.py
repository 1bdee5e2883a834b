"""The engine as its own process: `python -m worker.pipeline`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.report import Report
from tests.models import make_checkpoint, make_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"), words=3000)


def write_recipe(folder: Path, method: Any = "cfsp", sparsity: Any = 0.25, **more: Any) -> Path:
    body = {"method": method, "sparsity": sparsity, "calibration": {"source": "mine", "samples": 4, "sequence_length": 32}, "evaluation": None} | more
    path = folder / "recipe.json"
    path.write_text(json.dumps(body))
    return path


def engine(recipe: Path, source: Path, out: Path, text: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "worker.pipeline", str(recipe), str(source), str(out), "--text", "mine", str(text), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]], str]:
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, [json.loads(line) for line in stdout.splitlines()], stderr


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir()) if file.name != "README.md"}


def test_a_recipe_runs_to_a_report_and_checkpoints_that_were_tried(text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "dense", "llama", tied=True)
    recipe = write_recipe(
        tmp_path,
        sparsity=0.5,
        evaluation={"source": "mine", "windows": 3, "sequence_length": 32, "speed": False},
        output={"layout": "per_layer", "padded": True, "dtype": "bfloat16"},
    )
    code, events, stderr = finished(engine(recipe, source, tmp_path / "out", text))
    assert code == 0, stderr
    assert [event["phase"] for event in events if event["event"] == "phase"] == ["load", "evaluate_dense", "prune", "write", "evaluate", "verify"]
    fractions = [event["fraction"] for event in events if event["event"] == "progress"]
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < fractions[-1] <= 1

    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_bytes())
    assert report.recipe.calibration.source == "mine"  # as it was asked for, wherever it lay
    assert report.sparsity.ffn == pytest.approx(0.5)
    assert report.parameters_after.all < report.parameters_before.all
    assert report.before is not None
    assert report.after is not None
    assert report.before.perplexity is not None
    assert report.after.perplexity is not None
    assert report.after.checkpoint_bytes < report.before.checkpoint_bytes / 2 * 1.05  # half the width of the type, and fewer weights
    assert [(check.layout, "espalier.loader" in check.loader) for check in report.loads_with] == [("per_layer", True), ("padded", False)]
    assert report.calibration is not None
    assert report.calibration.used_tokens == 4 * 32
    assert (tmp_path / "out" / "padded" / "README.md").is_file()
    card = (tmp_path / "out" / "checkpoint" / "README.md").read_text()
    assert str(tmp_path) not in card  # nothing of this machine
    assert not (tmp_path / "out" / ".work").exists()


def test_a_result_that_does_not_fit_in_memory_is_tried_by_shapes_and_a_few_blocks(text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "dense", "llama", layers=6)
    evaluation = {"source": "mine", "windows": 2, "sequence_length": 32}
    recipe = write_recipe(tmp_path, evaluation=evaluation, output={"layout": "per_layer", "padded": True})
    code, _, stderr = finished(engine(recipe, source, tmp_path / "out", text, "--memory", "1000000"))
    assert code == 0, stderr
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_bytes())
    assert [(check.layout, check.checked, check.blocks) for check in report.loads_with] == [("per_layer", "blocks", [0, 2, 5]), ("padded", "blocks", [0, 2, 5])]
    assert all(check.max_logit_difference < 1e-3 for check in report.loads_with)
    assert report.after is not None
    assert report.after.perplexity is not None
    assert report.after.speed is None
    assert [note for note in report.notes if "Speed was not measured" in note]
    assert [note for note in report.notes if "its blocks 0, 2, 5 were compared" in note]
    assert "its blocks 0, 2, 5 were compared" in (tmp_path / "out" / "checkpoint" / "README.md").read_text()


@pytest.mark.parametrize(("method", "sparsity"), [("cfsp", 0.25), ("wanda", "2:4")])
def test_the_same_recipe_gives_the_same_bytes_also_after_a_kill(method: str, sparsity: Any, text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "dense", "qwen3", layers=6)
    recipe = write_recipe(tmp_path, method, sparsity)
    assert finished(engine(recipe, source, tmp_path / "one", text))[0] == 0

    killed = engine(recipe, source, tmp_path / "two", text)
    assert killed.stdout is not None
    for line in killed.stdout:
        event = json.loads(line)
        if event["event"] == "progress" and event["phase"] == "prune" and event["done"] == 3:
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate()
    code, _, stderr = finished(engine(recipe, source, tmp_path / "two", text))
    assert code == 0, stderr
    resumed = json.loads((tmp_path / "two" / "report.json").read_text())["resumed_at_block"]
    assert resumed is not None
    assert resumed >= 3
    assert hashes(tmp_path / "two" / "checkpoint") == hashes(tmp_path / "one" / "checkpoint")


def test_what_cannot_be_run_ends_with_code_and_hint_and_leaves_nothing(text: Path, tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path / "good", "llama")
    truncated = shutil.copytree(good, tmp_path / "truncated")
    with (truncated / "model.safetensors").open("r+b") as weights:
        weights.truncate(weights.seek(0, os.SEEK_END) - 100)
    broken_tokenizer = shutil.copytree(good, tmp_path / "broken_tokenizer")
    (broken_tokenizer / "tokenizer.json").write_text("{}")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    invalid = tmp_path / "invalid.json"
    invalid.write_text('{"method": "cfsp", "sparsity": 2}')
    recipe = write_recipe(tmp_path)
    cases = {
        "recipe_invalid": engine(invalid, good, tmp_path / "a", text),
        "checkpoint_truncated": engine(recipe, truncated, tmp_path / "b", text),
        "tokenizer_invalid": engine(recipe, broken_tokenizer, tmp_path / "c", text),
        "calibration_text_too_short": engine(recipe, good, tmp_path / "d", short),
        "text_not_found": engine(recipe, good, tmp_path / "e", tmp_path / "nowhere.txt"),
        "model_not_found": engine(recipe, tmp_path / "nothing", tmp_path / "f", text),
    }
    for expected, process in cases.items():
        code, events, stderr = finished(process)
        assert code == 2, stderr
        error = events[-1]
        assert error["event"] == "error"
        assert error["code"] == expected
        assert error["message"]
        assert error["hint"]
    assert not [path for path in tmp_path.glob("[a-f]/*") if path.name != ".work"]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount the small disk that this fills")
def test_a_full_disk_is_said_and_can_be_gone_on_from(text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "dense", "llama", hidden=64, ffn=256, layers=6)
    recipe = write_recipe(tmp_path, "magnitude", 0.5)
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)], check=False, capture_output=True).returncode != 0:
        pytest.skip("this container may not mount a file system")
    try:
        code, events, stderr = finished(engine(recipe, source, tmp_path / "out", text, "--work", str(small / "work")))
        assert code == 2, stderr
        assert events[-1]["code"] == "disk_full"
        assert not (tmp_path / "out" / "checkpoint").exists()
        subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
        code, events, stderr = finished(engine(recipe, source, tmp_path / "out", text, "--work", str(small / "work")))
        assert code == 0, stderr
        assert any("Goes on after" in event.get("message", "") for event in events)
    finally:
        subprocess.run(["umount", str(small)], check=True)
