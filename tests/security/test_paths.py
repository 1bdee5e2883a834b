"""No name leads out of the place that it names something in: over the wire, where no client tidies the path, and in the functions behind."""

from __future__ import annotations

import http.client
import re
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.exceptions import RecipeError
from app.recipe import MODEL_ID
from app.source import find_local
from app.storage import is_key
from tests.app.conftest import Api
from tests.app.serving import Server, serving

UP = (
    "..",
    "%2e%2e",
    ".%2e",
    "%252e%252e",
    "%c0%ae%c0%ae",
    "%uff0e%uff0e",
    "．．",
    "‥",
    "..%00",
    "..;",
    "%2e%2e%5c",
    "..\\",
    "....//",
    "%00",
    "..%0d%0aX-Evil:1",
    "C:",
    "~",
)
SLASHES = ("/", "%2f", "%5c", "%252f", "%c0%af", "//", "∕")
JOB = "/v1/jobs/job_" + "0" * 32
CHECKPOINT = "/v1/checkpoints/ckpt_" + "0" * 32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    (home / "objects").mkdir()
    (home / "secret.json").write_text("a secret of the operator")
    with serving(f"sqlite:///{home}/espalier.db", home) as made:
        yield made


@pytest.mark.parametrize("slash", SLASHES)
@pytest.mark.parametrize("up", UP)
def test_paths_over_the_wire(server: Server, up: str, slash: str) -> None:
    climbed = slash.join([up] * 3)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection._encode_request = lambda request: request.encode()  # type: ignore[attr-defined]  # it refuses what is not ASCII
    connection._validate_path = lambda path: None  # type: ignore[attr-defined]  # it refuses control characters
    for method, path in [
        ("GET", f"{JOB}/artifacts/{climbed}{slash}secret.json"),
        ("GET", f"{JOB}/artifacts/checkpoint{slash}{climbed}"),
        ("GET", f"/v1/jobs/{climbed}"),
        ("PUT", f"{CHECKPOINT}/files/{climbed}{slash}config.json/parts/0"),
        ("GET", f"{CHECKPOINT}{slash}{climbed}"),
        ("GET", f"/{climbed}{slash}secret.json"),
        ("GET", f"/docs{slash}{climbed}{slash}etc{slash}passwd"),
    ]:
        connection.request(method, path, headers={"Authorization": f"Bearer {server.key}", "Content-Length": "0"})
        answer = connection.getresponse()
        body = answer.read().decode()
        assert answer.status in (400, 404, 405, 422), (method, path, body)
        assert "a secret" not in body
        assert "root:" not in body
        assert answer.getheader("X-Evil") is None
    connection.close()


@given(st.text() | st.from_regex(r"[A-Za-z0-9./_~-]{0,40}", fullmatch=True) | st.from_regex(MODEL_ID, fullmatch=True))
def test_a_model_id_is_what_the_hub_takes(text: str) -> None:
    parts = text.split("/")
    right = (
        text.isascii()
        and len(parts) <= 2
        and all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}", part) for part in parts)
        and ".." not in text
        and "--" not in text
        and "\n" not in text
    )
    assert bool(MODEL_ID.fullmatch(text)) == bool(right)


NAMES = st.lists(st.sampled_from(["..", ".", "", "inside", "out", "loop", "secret", "/", "~", "etc", "passwd"]) | st.text(max_size=3), max_size=6).map("/".join)


@given(NAMES)
def test_a_local_model_lies_below_a_root(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    base = tmp_path_factory.getbasetemp() / "local"
    root = base / "root"
    if not root.exists():
        (root / "inside").mkdir(parents=True)
        (base / "secret").mkdir()
        (root / "out").symlink_to(base / "secret")
        (root / "loop").symlink_to(root / "loop")
    with suppress(RecipeError):
        found = find_local(name, [root])
        assert found is None or (found.is_relative_to(root) and found != root and found == found.resolve())


@given(st.text() | st.from_regex(r"[A-Za-z0-9./_-]{1,30}", fullmatch=True))
def test_a_key_of_the_store_climbs_nowhere(key: str) -> None:
    if is_key(key):
        assert not {"", ".", ".."} & set(key.split("/"))
        assert key.isascii()
        assert key.isprintable()


def test_the_tar_unpacks_below_its_job(api: Api, tmp_path: Path) -> None:
    content = {"config.json": b"{}", "model-00001-of-00002.safetensors": b"x" * 3000, "nested/tokenizer.json": b"{}"}
    job_id = api.succeed(tmp_path, {f"checkpoint/{name}": data for name, data in content.items()})
    archive = tmp_path / "checkpoint.tar"
    archive.write_bytes(api.get(f"/v1/jobs/{job_id}/checkpoint").content)
    for place in ("python", "tar"):
        (tmp_path / place).mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            assert member.isreg() or member.isdir()
            assert member.mode & 0o7022 == 0  # neither setuid nor writable for others
            assert (member.uid, member.gid) == (0, 0)
            assert member.name.split("/")[0] == job_id
            tarfile.data_filter(member, str(tmp_path / "python"))  # raises where it would climb
        tar.extractall(tmp_path / "python", filter="data")
    subprocess.run(["tar", "-xf", archive, "-C", tmp_path / "tar", "--no-same-owner"], check=True)
    for place in ("python", "tar"):
        found = {str(file.relative_to(tmp_path / place / job_id)): file.read_bytes() for file in (tmp_path / place).rglob("*") if file.is_file()}
        assert found == content
