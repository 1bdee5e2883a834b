"""`python -m worker.health`: whether the worker of this container lives, by its row in the database; exit code 0 or 1.

A database that does not answer says nothing about the worker, which goes on for the length of a lease: that is 0 too, or an outage would end every worker at once.
"""

from __future__ import annotations

import socket
import sys

from sqlalchemy.exc import SQLAlchemyError

from app.database import Database
from app.queues.repository import live_workers
from app.settings import get_settings
from worker.announce import id_prefix


def main() -> int:
    settings = get_settings()
    database = Database(settings.database_url.get_secret_value())
    try:
        with database.reading() as session:
            alive = any(worker.id.startswith(id_prefix()) for worker in live_workers(session, settings.lease_seconds))
    except SQLAlchemyError as error:
        sys.stderr.write(f"The database can't be asked: {str(error).splitlines()[0]}\n")
        return 0
    finally:
        database.dispose()
    if not alive:
        sys.stderr.write(f"No worker on {socket.gethostname()} was heard of within {settings.lease_seconds:g} s.\n")
    return 0 if alive else 1


if __name__ == "__main__":
    sys.exit(main())
