"""What a client fetches and brings: results, and checkpoints to prune. Each file goes on where it was cut off and is checked against its sha256."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from pathlib import Path

import httpx

from espalier import uploading
from espalier.answers import ArtifactFile, Checkpoint, CheckpointFile, CheckpointSummary
from espalier.both import Iteration, Operation
from espalier.calling import POLL_SECONDS, Calls, given, items, nothing, once, url_path
from espalier.downloading import Downloaded, DownloadedTar, Target, targets
from espalier.errors import ApiError, UnreachableError, UploadError
from espalier.sending import MAY_PASS, Call, Outage, retry_after
from espalier.tar import TarTarget
from espalier.uploading import DeclaredFile


class Transfers(Calls):
    """Downloads and uploads."""

    # ------------------------------------------------------------- artifacts

    @Operation
    async def artifacts(self, job_id: str) -> list[ArtifactFile]:
        """The manifest of a succeeded job."""
        return await self._send(_manifest(job_id))

    @Operation
    async def download(
        self,
        job_id: str,
        folder: Path,
        *,
        roles: Collection[str] = (),
        resume: bool = True,
        on_bytes: Callable[[ArtifactFile, int], None] | None = None,
        patience: float = 60,
    ) -> list[Downloaded]:
        """Fetch the files of a job below `folder`, all or those of some roles, and check each against its sha256.

        What an earlier call left unfinished is continued, unless `resume` is False; what is there already and right is kept. `on_bytes` is told how far each
        file is. Outages of up to `patience` seconds are survived. Raises DownloadError for a file whose bytes are not those of the manifest.
        """
        wanted = targets(folder, await self._send(_manifest(job_id)), roles)
        files = []
        for target in wanted:
            path = url_path("jobs", job_id, "artifacts", target.artifact["path"])
            files.append(Downloaded(target.path, target.artifact, await self._bring(job_id, path, target, resume, on_bytes or _ignore, patience)))
        return files

    @Operation
    async def download_tar(
        self, job_id: str, path: Path, *, resume: bool = True, on_bytes: Callable[[ArtifactFile, int], None] | None = None, patience: float = 60
    ) -> DownloadedTar:
        """Fetch the checkpoint of a job as one tar, and check each file in it against its sha256 while it comes; for the rest as `download`."""
        target = TarTarget(path, job_id, await self._send(_manifest(job_id)))
        resumed_at = await self._bring(job_id, url_path("jobs", job_id, "checkpoint"), target, resume, on_bytes or _ignore, patience)
        return DownloadedTar(path, target.artifacts, resumed_at)

    async def _bring(
        self, job_id: str, path: str, target: Target | TarTarget, resume: bool, on_bytes: Callable[[ArtifactFile, int], None], patience: float
    ) -> int:
        """Fetch what is missing of a target and put it into its place; the byte from which this call went on."""
        if await self._wire.offload(lambda: target.is_there):
            resumed_at = target.path.stat().st_size
        else:
            resumed_at = await self._wire.offload(target.begin, resume=resume)
            outage = Outage(patience)
            while not target.is_whole:
                have = target.have
                try:
                    await self._fetch(path, target, on_bytes)
                    break
                except (UnreachableError, ApiError) as error:
                    if isinstance(error, ApiError) and error.status not in MAY_PASS:
                        raise
                    if target.have > have:
                        outage = Outage(patience)
                    await self._wire.sleep(outage.pause(error))
            await self._wire.offload(target.finish, job_id)
        for artifact in target.artifacts:
            on_bytes(artifact, artifact["bytes"])
        return resumed_at

    async def _fetch(self, path: str, target: Target | TarTarget, on_bytes: Callable[[ArtifactFile, int], None]) -> None:
        """Append to the part what comes in one answer, from the service or from the object store that it redirects to."""
        span = {"Range": f"bytes={target.have}-"} if target.have else {}
        condition = {"If-Range": target.etag} if span and target.etag else {}
        http = self._wire.http
        try:
            response = await self._wire.send(http.build_request("GET", path, headers=self._authorization | span | condition), stream=True)
            if response.status_code == 307:
                await self._wire.release(response)
                # An object store has an ETag of its own, so the condition stays behind; the hash of the whole file is checked in any case.
                location = response.url.join(response.headers["Location"])
                response = await self._wire.send(http.build_request("GET", location, headers=span), stream=True)
            try:
                if response.status_code not in (200, 206):
                    await self._wire.read(response)
                    raise ApiError.of(response)
                if response.status_code == 200:
                    target.begin(resume=False)
                with target.part.open("ab") as file:
                    async for chunk in self._wire.chunks(response):
                        for artifact, have in await self._wire.offload(target.add, file, chunk):
                            on_bytes(artifact, have)
            finally:
                await self._wire.release(response)
        except httpx.TransportError as error:
            raise UnreachableError(f"{target.name} stopped coming from {self.url}: {error or type(error).__name__}") from error

    # ----------------------------------------------------------- checkpoints

    @Iteration
    async def checkpoints(self, *, name: str | None = None, states: Sequence[str] = (), page_size: int = 50) -> AsyncIterator[CheckpointSummary]:
        """All uploaded checkpoints, newest first, page by page."""
        async for checkpoint in self._pages("/v1/checkpoints", given(name=name, state=list(states)), page_size):
            yield checkpoint

    @Operation
    async def checkpoint(self, checkpoint_id: str) -> Checkpoint:
        return await self._send(Call[Checkpoint]("GET", url_path("checkpoints", checkpoint_id)))

    @Operation
    async def delete_checkpoint(self, checkpoint_id: str) -> None:
        await self._send(Call("DELETE", url_path("checkpoints", checkpoint_id), nothing))

    @Operation
    async def upload(
        self, folder: Path, *, name: str | None = None, on_bytes: Callable[[CheckpointFile, int], None] | None = None, patience: float = 60
    ) -> Checkpoint:
        """Upload the checkpoint in a folder and wait until it is ready; its id is a job's `model`. Files that no job reads stay behind.

        What an earlier call, or another client, began to upload under this name with the same bytes is continued; where it is ready already, nothing is sent.
        `on_bytes` is told how much of each file has come. Outages of up to `patience` seconds are survived. Raises UploadError where the checkpoint can't be used.
        """
        files, name = await self._wire.offload(uploading.declare, folder), name or uploading.name_of(folder)
        declaration = Call[Checkpoint]("POST", "/v1/checkpoints", json={"name": name, "files": files}, headers=once(None))
        begun = await self._begun(name, files, patience)
        checkpoint = await self._send(declaration, patience) if begun is None else begun
        if checkpoint["state"] == "uploading":
            for file in checkpoint["files"]:
                await self._upload_file(checkpoint, file, folder, on_bytes or _ignore, patience)
            await self._send(Call("POST", url_path("checkpoints", checkpoint["id"], "complete"), repeats=True), patience)
        return await self._wait_until_ready(checkpoint["id"], patience)

    async def _begun(self, name: str, files: Sequence[DeclaredFile], patience: float) -> Checkpoint | None:
        states = ("uploading", "verifying", "ready")
        async for summary in self._pages("/v1/checkpoints", {"name": name, "state": states}, 50):
            if summary["bytes"] == sum(file["bytes"] for file in files):
                checkpoint = await self._send(Call[Checkpoint]("GET", url_path("checkpoints", summary["id"])), patience)
                if uploading.is_same(checkpoint, files):
                    return checkpoint
        return None

    async def _upload_file(
        self, checkpoint: Checkpoint, file: CheckpointFile, folder: Path, on_bytes: Callable[[CheckpointFile, int], None], patience: float
    ) -> None:
        parts = uploading.missing_parts(checkpoint, file, folder)
        have = file["bytes"] - sum(part.size for part in parts)
        on_bytes(file, have)
        for part in parts:
            path = url_path("checkpoints", checkpoint["id"], "files", file["path"], "parts", str(part.number))
            await self._send(Call("PUT", path, body=part.read, headers=await self._wire.offload(part.headers)), patience)
            have += part.size
            on_bytes(file, have)

    async def _wait_until_ready(self, checkpoint_id: str, patience: float) -> Checkpoint:
        while True:
            answer = await self._answer(Call("GET", url_path("checkpoints", checkpoint_id)), patience)
            checkpoint: Checkpoint = answer.json()
            if checkpoint["error"] is not None:
                raise UploadError(f"{checkpoint_id} can't be used: {checkpoint['error']['message']} {checkpoint['error']['hint']}")
            if checkpoint["state"] == "ready":
                return checkpoint
            await self._wire.sleep(retry_after(answer) or POLL_SECONDS)


def _manifest(job_id: str) -> Call[list[ArtifactFile]]:
    return Call("GET", url_path("jobs", job_id, "artifacts"), items)


def _ignore(file: ArtifactFile | CheckpointFile, have: int) -> None:
    pass
