"""What the checkpoint endpoints take and give."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, Self

from pydantic import Field

from app import models
from app.checkpoints.repository import StoredFile
from app.queues.schemas import Out
from app.strict import Strict

State = Literal["uploading", "verifying", "ready", "failed"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
FILE_PATH = r"^([A-Za-z0-9_][A-Za-z0-9_.-]*/)?[A-Za-z0-9_][A-Za-z0-9_.-]*$"
SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


class DeclaredFile(Strict):
    """A file that is to be uploaded."""

    path: str = Field(
        max_length=200,
        pattern=FILE_PATH,
        description="Its name, or folder and name: letters, digits, `_`, `-` and `.`. Taken are `.safetensors`, `.json`, `.txt`, `.model` and `.jinja`.",
        examples=["model.safetensors"],
    )
    bytes: int = Field(ge=1, le=2**50, description="Its size.", examples=[269060552])
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of its bytes, in hex.", examples=[SHA256])


class Declaration(Strict):
    """A checkpoint that is to be uploaded."""

    name: str = Field(pattern=NAME, description="For people; several checkpoints may have the same.", examples=["my-llama"])
    files: list[DeclaredFile] = Field(
        min_length=1, max_length=1000, description="All its files: at least config.json, a tokenizer and one safetensors file, none in a folder."
    )


class CheckpointFile(Out):
    """A file of an uploaded checkpoint."""

    path: str = Field(description="As declared.", examples=["model.safetensors"])
    bytes: int = Field(description="Its size.", examples=[269060552])
    sha256: str = Field(description="Of its bytes, in hex.", examples=[SHA256])
    missing: list[int] = Field(description="Numbers of the parts that have not come. Part n begins at byte n · `part_bytes`.", examples=[[0, 1, 4]])


class CheckpointError(Out):
    """Why an upload failed."""

    code: str = Field(description="A stable name for programs.", examples=["checkpoint_damaged"])
    message: str = Field(description="What was wrong.", examples=["model.safetensors is not what was declared."])
    hint: str = Field("", description="What to do about it.", examples=["Upload it again."])


class CheckpointSummary(Out):
    """An uploaded checkpoint, without its files."""

    id: str = Field(description="Its id; a job names it as its `model` once it is ready.", examples=["ckpt_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])
    name: str = Field(description="As declared.", examples=["my-llama"])
    state: State = Field(description="`uploading` → `verifying` → `ready` or `failed`.")
    bytes: int = Field(description="Of all its files.", examples=[271163392])
    part_bytes: int = Field(description="Size of every part of a file but its last, which is as long as what is left.", examples=[67108864])
    sha256: str | None = Field(description="Of the list of its files with their sizes and hashes; null until it is ready.", examples=[SHA256])
    error: CheckpointError | None = Field(description="Why it failed; null otherwise.")
    created_at: datetime = Field(description="When it was declared (UTC).", examples=["2026-11-22T01:02:03.456Z"])
    updated_at: datetime = Field(
        description="When anything of it last changed (UTC); an upload that rests too long is given up.", examples=["2026-11-22T01:03:03.456Z"]
    )
    completed_at: datetime | None = Field(description="When it was ready, or failed (UTC).", examples=[None])


class Checkpoint(CheckpointSummary):
    """An uploaded checkpoint."""

    files: list[CheckpointFile] = Field(description="Its files, by path.")

    @classmethod
    def of(cls, checkpoint: models.Checkpoint, files: list[StoredFile]) -> Self:
        summary = CheckpointSummary.model_validate(checkpoint)
        return cls.model_validate({**dict(summary), "files": [CheckpointFile.model_validate(file) for file in files]})


class CheckpointPage(Out):
    """Checkpoints, newest first."""

    items: list[CheckpointSummary] = Field(description="The checkpoints of this page.")
    next: str | None = Field(description="Give it as `cursor` for the next page; null on the last one.", examples=[None])


class Part(Out):
    """A part that has come."""

    number: int = Field(description="0, 1, … within the file.", examples=[0])
    bytes: int = Field(description="Its size.", examples=[67108864])
    sha256: str = Field(description="Of its bytes, in hex.", examples=[SHA256])
