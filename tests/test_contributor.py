"""docs/contributor.md is followed to the letter: its changes, made to a copy of the code, add a pruning method that works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.models import make_checkpoint

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "contributor.md").read_text(encoding="utf-8")
CHECKLIST = PAGE.partition("## Add a pruning method")[2].partition("\n## ")[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", CHECKLIST, re.DOTALL)


def run(*command: str | Path, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_checklist_adds_a_method(tmp_path: Path) -> None:
    for name in ("app", "worker", "espalier"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (written,) = blocks("python")
    place = re.search(r"The method\*\*, one file .*`(worker/pruners/\w+\.py)`", CHECKLIST)
    assert place is not None
    (tmp_path / place[1]).write_text(written, encoding="utf-8")
    for number, change in enumerate(blocks("diff")):
        (tmp_path / f"{number}.diff").write_text(change, encoding="utf-8")
        run("git", "apply", f"{number}.diff", folder=tmp_path)

    make_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "recipe.json").write_text(json.dumps({"method": {"name": "random", "seed": 7}, "sparsity": 0.25, "evaluation": None}))
    run(sys.executable, "-m", "worker.pipeline", "recipe.json", "model", "out", folder=tmp_path)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sparsity"]["decoder"] == 0.25
    listed = run(sys.executable, "-c", "from app.methods import METHOD_LIST; print(METHOD_LIST.model_dump_json())", folder=tmp_path)
    (method,) = [method for method in json.loads(listed)["items"] if method["name"] == "random"]
    assert method["parameters"]["properties"]["seed"]["default"] == 0


def test_every_path_on_the_page_is_there() -> None:
    made = set(re.findall(r"`(worker/pruners/random\.py)`", PAGE))
    named = set(re.findall(r"`((?:app|worker|tests|benchmarks|migrations|docs|espalier)/[\w/.]*)`", PAGE)) - made
    assert len(named) > 20
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]
