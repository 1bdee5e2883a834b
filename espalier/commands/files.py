"""Commands that move checkpoints: download, upload, and what was uploaded; and one that writes GGUF."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.progress import TaskID

from espalier.answers import ArtifactFile, CheckpointFile
from espalier.client import Client
from espalier.commands.common import AsJson, JobId, connect, new_app
from espalier.display import byte_bars, moment, number, out, print_json, state, table
from espalier.errors import ClientError

app = new_app()


@app.command()
def download(
    job_id: JobId,
    to: Annotated[Path, typer.Option("--to", "-o", help="Folder for the files.", file_okay=False)] = Path(),
    role: Annotated[list[str] | None, typer.Option(help="Only files of this role: checkpoint, padded, report. May be repeated.")] = None,
    tar: Annotated[Path | None, typer.Option(help="The whole checkpoint as this one file, instead.", metavar="FILE", dir_okay=False)] = None,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted download stopped.")] = True,
    as_json: AsJson = False,
) -> None:
    """Download the files of a job and check their sha256. An interrupted download goes on where it stopped."""
    if tar is not None:
        if role or to != Path():
            raise ClientError("--tar fetches the checkpoint as a whole, into one file; leave out --role and --to")
        _download_tar(job_id, tar, resume, as_json)
        return
    with connect() as client:
        files = fetch(client, job_id, to, roles=role or (), resume=resume, quiet=as_json)
    print_json(files) if as_json else out.print(f"{len(files)} files in {escape(str(to))}, sha256 of each as in the manifest", soft_wrap=True)


def fetch(client: Client, job_id: str, to: Path, *, roles: list[str] | tuple[str, ...] = (), resume: bool = True, quiet: bool) -> list[dict[str, Any]]:
    """Download with bars on stderr; what came, for JSON."""
    with _bars(quiet) as on_bytes:
        files = client.download(job_id, to, roles=roles, resume=resume, on_bytes=on_bytes)
    return [{"file": str(file.path), **file.artifact, "resumed_at": file.resumed_at} for file in files]


def _download_tar(job_id: str, path: Path, resume: bool, as_json: bool) -> None:
    with connect() as client, _bars(as_json) as on_bytes:
        fetched = client.download_tar(job_id, path, resume=resume, on_bytes=on_bytes)
    if as_json:
        print_json({"file": str(path), "files": fetched.artifacts, "resumed_at": fetched.resumed_at})
    else:
        out.print(f"{len(fetched.artifacts)} files in {escape(str(path))}, sha256 of each as in the manifest", soft_wrap=True)


@app.command()
def upload(
    folder: Annotated[Path, typer.Argument(help="A checkpoint as save_pretrained writes it, with its tokenizer.", exists=True, file_okay=False)],
    name: Annotated[str | None, typer.Option(help="Its name; the folder's otherwise.")] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint and print its id, which `submit` takes as a model. An interrupted upload goes on where it stopped."""
    with connect() as client, _bars(as_json) as on_bytes:
        checkpoint = client.upload(folder, name=name, on_bytes=on_bytes)
    print_json(checkpoint) if as_json else out.print(checkpoint["id"])


@app.command()
def checkpoints(
    name: Annotated[str | None, typer.Option(help="Only checkpoints of this name.")] = None,
    state_name: Annotated[list[str] | None, typer.Option("--state", help="Only checkpoints in this state. May be repeated.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List uploaded checkpoints, newest first."""
    with connect() as client:
        found = list(islice(client.checkpoints(name=name, states=state_name or ()), limit))
    if as_json:
        print_json(found)
        return
    rows = table("checkpoint", "name", "state", "bytes", "declared", wide=0)
    for checkpoint in found:
        rows.add_row(checkpoint["id"], checkpoint["name"], state(checkpoint["state"]), number(checkpoint["bytes"]), moment(checkpoint["created_at"]))
    out.print(rows)


@app.command(name="gguf")
def export_gguf(
    folder: Annotated[Path, typer.Argument(help="A llama or mistral checkpoint, layers of different sizes too.", exists=True, file_okay=False)],
    file: Annotated[Path, typer.Argument(help="The GGUF file to write.", metavar="OUT.gguf", dir_okay=False)],
    dtype: Annotated[
        Literal["source", "F32", "F16", "BF16"], typer.Option(help="How matrices are stored; source: as in the checkpoint.", case_sensitive=False)
    ] = "source",
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint folder as one GGUF file for llama.cpp."""
    if find_spec("gguf") is None:
        raise ClientError("this command needs the gguf package: pip install 'espalier[gguf]'")
    from espalier.gguf import export

    exported = export(folder, file, dtype)
    if as_json:
        print_json(exported._asdict())
    else:
        sizes = f"{exported.tensors} tensors, {exported.bytes:,} bytes"
        out.print(f"{escape(str(file))}: architecture {exported.architecture}, pre-tokenizer {exported.pre_tokenizer}, {sizes}", soft_wrap=True)


@contextmanager
def _bars(quiet: bool) -> Iterator[Callable[[ArtifactFile | CheckpointFile, int], None]]:
    """A bar for each file; what it yields takes the file and how many of its bytes are there."""
    tasks: dict[str, TaskID] = {}
    with byte_bars(quiet=quiet) as bars:

        def on_bytes(file: ArtifactFile | CheckpointFile, have: int) -> None:
            path = file["path"]
            if path not in tasks:
                tasks[path] = bars.add_task(escape(path), total=file["bytes"])
            bars.update(tasks[path], completed=have)

        yield on_bytes
