"""The service over each database, with a tenant of its own for every test."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.auth import SCOPES, create_key
from app.database import Database, db_now
from app.jobs import repository
from app.jobs.lease import Lease, StoredFile, claim, finish
from app.main import create_app
from app.models import Job, Tenant
from app.recipe import Recipe
from app.settings import Settings
from app.storage import Store, open_store
from migrations import migrate
from tests.servers import fresh_database

RECIPE: dict[str, Any] = {"model": "owner/model", "method": "cfsp", "sparsity": 0.3}
_tenants = itertools.count(1)


@dataclass
class Api:
    """One tenant's view of the service, and the rows and objects behind it."""

    client: TestClient
    database: Database
    store: Store
    settings: Settings
    tenant: str = field(default_factory=lambda: f"tenant {next(_tenants)}")

    def __post_init__(self) -> None:
        self.key = self.new_key()

    def new_key(self, scopes: Sequence[str] = SCOPES) -> str:
        with self.database.writing() as session:
            return create_key(session, self.tenant, scopes)

    def other_tenant(self) -> Api:
        return Api(self.client, self.database, self.store, self.settings)

    def request(self, method: str, path: str, *, key: str | None = None, headers: dict[str, str] | None = None, **options: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {key or self.key}"} | (headers or {})
        return self.client.request(method, path, headers=headers, follow_redirects=False, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx2.Response:
        return self.request("POST", path, **options)

    def submit(self, **changes: Any) -> str:
        answer = self.post("/v1/jobs", json=RECIPE | changes)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def start(self, job_id: str) -> Lease:
        with self.database.writing() as session:
            lease = claim(session, job_id, "test", 45)
        assert lease is not None
        return lease

    def succeed(self, folder: Path, files: dict[str, bytes], report: dict[str, Any] | None = None) -> str:
        """A job that has run, with these files."""
        job_id = self.submit()
        lease = self.start(job_id)
        stored = []
        for name, content in files.items():
            (folder / "file").write_bytes(content)
            size, sha256 = self.store.put_file(f"{lease.artifact_prefix}{name}", folder / "file")
            stored.append(StoredFile(name, name.partition("/")[0].removesuffix(".json"), size, sha256))
        with self.database.writing() as session:
            finish(session, lease, "succeeded", report=report or {}, files=stored)
        return job_id

    def fail(self, job_id: str) -> None:
        with self.database.writing() as session:
            finish(session, self.start(job_id), "failed", error={"code": "disk_full", "message": "The disk is full.", "hint": "Free space."})


def insert_jobs(database: Database, tenant: str, count: int, **values: Any) -> list[str]:
    """Queued jobs that were all made at the same moment, which is the hard case for a cursor; newest first."""
    recipe = Recipe.model_validate(RECIPE)
    with database.writing() as session:
        tenant_id = session.query(Tenant.id).filter(Tenant.name == tenant).scalar()
        ids = [repository.insert_job(session, tenant_id, recipe).id for _ in range(count)]
        session.execute(update(Job).where(Job.id.in_(ids)).values({"created_at": db_now()} | values))
        moments = session.query(Job.created_at, Job.id).filter(Job.id.in_(ids)).all()
    return [job_id for _, job_id in sorted(((moment, job_id) for moment, job_id in moments), reverse=True)]


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "migrated.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def migrated_url(request: pytest.FixtureRequest, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a migrated database that all tests of the service share."""
    if request.param == "sqlite":
        yield f"sqlite:///{shutil.copy(sqlite_template, tmp_path_factory.mktemp('service') / 'espalier.db')}"
    else:
        with fresh_database(request.getfixturevalue("postgres_url")) as url:
            migrate(url)
            yield url


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `models` and `texts`, the allowed roots of the service."""
    folder = tmp_path_factory.mktemp("roots")
    (folder / "models").mkdir()
    (folder / "texts").mkdir()
    return folder


def make_settings(home: Path, database_url: str, roots: Path, **values: Any) -> Settings:
    return Settings.model_validate(
        {"home": home, "database_url": database_url, "model_roots": (roots / "models",), "text_roots": (roots / "texts",), "sweep_seconds": 3600} | values
    )


@contextmanager
def serving(home: Path, database_url: str, roots: Path, **values: Any) -> Iterator[Api]:
    """A service with these settings, on a migrated database."""
    settings = make_settings(home, database_url, roots, **values)
    database = Database(database_url)
    with TestClient(create_app(settings)) as client:
        yield Api(client, database, open_store(settings), settings)
    database.dispose()


@pytest.fixture(scope="module")  # so that no dispatcher of its runs beside those that other modules test
def shared_api(migrated_url: str, roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home"), migrated_url, roots) as made:
        yield made


@pytest.fixture
def api(shared_api: Api) -> Api:
    return shared_api.other_tenant()
