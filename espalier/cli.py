"""The `espalier` command."""

from __future__ import annotations

import sys

from rich.markup import escape

from espalier.commands import admin, catalog, files, jobs, local
from espalier.commands.common import FAILED, UNREACHABLE, new_app
from espalier.display import err
from espalier.errors import ApiError, ClientError, UnreachableError

app = new_app(
    help="Prune a language model over REST. ESPALIER_URL says where the service is, ESPALIER_API_KEY who you are.",
    epilog="Exit codes: 0 done, 1 refused or the job failed, 2 usage, 3 the service does not answer, 4 a bound of `wait` is not met.",
)
for group in (jobs, files, catalog, admin, local):
    app.add_typer(group.app)


def main() -> None:
    """The entry point: what the client raises becomes a sentence on stderr and an exit code."""
    try:
        app()
    except ApiError as error:
        code = f" [{error.code}]" if error.code else ""
        err.print(f"[red]refused[/red] ({error.status}{escape(code)}): {escape(str(error))}", soft_wrap=True)
        sys.exit(FAILED)
    except (ClientError, OSError) as error:
        err.print(f"[red]error[/red]: {escape(str(error))}", soft_wrap=True)
        sys.exit(UNREACHABLE if isinstance(error, UnreachableError) else FAILED)


if __name__ == "__main__":
    main()
