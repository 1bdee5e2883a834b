"""A weight file that the service takes is one that safetensors takes too, with the same tensors in it; what can run code is never fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from app.exceptions import RecipeError
from app.source import read_header, read_source
from tests.app.conftest import Api
from tests.app.test_checkpoints import declare, problem, put
from tests.models import make_checkpoint

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
SECOND = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
TWICE = f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'
CRAFTED: dict[str, tuple[bytes, int]] = {
    "a name twice": (TWICE.encode(), 4),
    "a name twice, with other bytes": (TWICE.replace("[0, 4]", "[4, 8]", 1).encode(), 8),
    "a field twice": (b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 4),
    "utf-16": (json.dumps({"a": ENTRY}).encode("utf-16"), 4),
    "utf-32": (json.dumps({"a": ENTRY}).encode("utf-32"), 4),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps({"a": ENTRY}).encode(), 4),
    "not utf-8": (b'{"a\xff": ' + json.dumps(ENTRY).encode() + b"}", 4),
    "half a character": (json.dumps({"a\ud800": ENTRY}).encode(), 4),
    "a null byte in a name": (json.dumps({"a\0": ENTRY}).encode(), 4),
    "a line in a name": (json.dumps({"a\nforged": ENTRY}).encode(), 4),
    "deep": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, 4),
    "deep metadata": (b'{"__metadata__": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 0),
    "a huge number": (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 4]}}', 4),
    "a hole": (json.dumps({"a": ENTRY, "b": SECOND | {"data_offsets": [8, 12]}}).encode(), 12),
    "an overlap": (json.dumps({"a": ENTRY, "b": SECOND | {"data_offsets": [2, 6]}}).encode(), 6),
}


def weights(header: bytes, data: int) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("whole"), "llama", layers=1)


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_header_is_refused_by_the_worker_and_on_upload(api: Api, whole: Path, tmp_path: Path, case: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    content = weights(*CRAFTED[case])
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(RecipeError) as refused:
        read_source(folder)
    assert refused.value.code == "checkpoint_truncated"
    assert refused.value.message.isprintable()
    problem(put(api, declare(api, folder), "model.safetensors", 0, content), 422, "checkpoint_truncated")


scalars = st.none() | st.booleans() | st.integers(-9, 2**65) | st.text(max_size=4)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I8", "BOOL", "F64", "F4", "f32"]) | scalars,
        "shape": st.lists(st.integers(0, 4), max_size=3) | scalars,
        "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)) | st.lists(st.integers(-1, 8), max_size=3) | scalars,
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "model.norm.weight"]) | st.text(max_size=3), entries | scalars, max_size=3).map(json.dumps)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=headers.map(str.encode) | st.binary(max_size=40), data=st.sampled_from([0, 1, 4, 8, 16]), fill=st.booleans())
def test_what_is_taken_is_what_safetensors_takes(tmp_path: Path, header: bytes, data: int, fill: bool) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(weights(header, data))
    try:
        taken: dict[str, Any] = {name: list(entry.shape) for name, entry in read_header(file).items()}
    except RecipeError:
        return
    try:
        with safe_open(file, framework="np") as opened:
            assert taken == {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118  it is no dict
    except SafetensorError as error:
        raise AssertionError(f"safetensors does not take {header!r}") from error
