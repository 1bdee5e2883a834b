"""What the service answers, as types: of each answer the fields that its OpenAPI schema states. Times are RFC 3339 in UTC; what has no stated fields is a dict."""

from __future__ import annotations

from typing import Any, TypedDict


class Progress(TypedDict):
    """How far a job is."""

    fraction: float
    blocks_done: int | None
    blocks_total: int | None
    round: int | None
    rounds: int | None
    masks_done: int | None
    masks_total: int | None
    steps_done: int | None
    steps_total: int | None
    loss: float | None
    tokens_per_second: float | None
    bytes_done: int | None
    bytes_total: int | None
    eta_seconds: float | None


class JobError(TypedDict):
    """Why a job failed."""

    code: str
    message: str
    hint: str


class SinkError(TypedDict):
    """Why the latest try failed."""

    code: str
    message: str
    hint: str


class SinkRun(TypedDict):
    """What becomes of a sink."""

    number: int
    name: str
    target: dict[str, Any]
    state: str
    tries: int
    result: dict[str, Any] | None
    error: SinkError | None
    updated_at: str


class Links(TypedDict):
    """Where the parts of a job are; null where there is nothing."""

    self: str
    events: str
    cancel: str | None
    retry: str | None
    report: str | None
    artifacts: str | None
    checkpoint: str | None


class Job(TypedDict):
    """A pruning job."""

    id: str
    state: str
    phase: str | None
    progress: Progress
    attempt: int
    max_attempts: int
    model: str
    method: str
    queue: str
    priority: int
    metadata: dict[str, str]
    recipe: dict[str, Any]
    error: JobError | None
    webhook: str | None
    sinks: list[SinkRun]
    links: Links
    created_at: str
    started_at: str | None
    updated_at: str
    finished_at: str | None


class Estimate(TypedDict):
    """What a job will cost."""

    forward_tokens: int
    phases: dict[str, int]
    rounds: int | None
    sub_models: int | None
    multiply_accumulates: int
    seconds_on_two_cores: float
    seconds_least: float
    seconds_most: float
    passes: int
    source_bytes: int
    host_bytes: int
    phase_host_bytes: dict[str, int]
    peak_phase: str
    device_bytes: int
    disk_bytes: int
    output_bytes: int


class Placement(TypedDict):
    """Where a job would run."""

    queue: str
    live_workers: int
    fits: bool | None


class Validation(TypedDict):
    """What is known of a job before it is submitted."""

    recipe: dict[str, Any]
    estimate: Estimate | None
    placement: Placement


class Event(TypedDict):
    """Something that happened to a job."""

    sequence: int
    kind: str
    message: str
    data: dict[str, Any]
    created_at: str


class EventPage(TypedDict):
    """Events in their order."""

    items: list[Event]
    next: int
    finished: bool


class ArtifactFile(TypedDict):
    """A file of a finished job."""

    path: str
    role: str
    bytes: int
    sha256: str


class Manifest(TypedDict):
    """All files of a finished job."""

    items: list[ArtifactFile]


class Method(TypedDict):
    """A pruning method."""

    paper: str
    prunes: str
    denominator: str
    patterns: bool
    calibrates: bool
    structured: bool
    streams: bool
    allocation: str | None
    restorations: list[str]
    model_types: list[str]
    name: str
    summary: str
    parameters: dict[str, Any]


class Recovery(TypedDict):
    """A way to train back what pruning lost."""

    name: str
    summary: str
    parameters: dict[str, Any]
    presets: dict[str, dict[str, Any]]


class Device(TypedDict):
    """A GPU of a worker."""

    name: str
    memory_bytes: int


class QueueWorker(TypedDict):
    """A live worker. It runs one job at a time."""

    devices: list[Device]
    host_bytes: int
    disk_bytes: int
    draining: bool
    version: str
    seen_at: str


class Queue(TypedDict):
    """A class of workers, e.g. all that have the same GPU, and how busy it is."""

    name: str
    workers: list[QueueWorker]
    queued: int
    running: int
    oldest_queued_at: str | None


class Share(TypedDict):
    """What there is of something."""

    used: int
    cap: int | None


class Usage(TypedDict):
    """What a tenant has."""

    queued: Share
    running: Share
    stored_bytes: Share
    checkpoint_bytes: Share


class Key(TypedDict):
    """An API key, without its secret."""

    id: str
    name: str
    scopes: list[str]
    created_at: str
    expires_at: str | None
    last_used_at: str | None


class NewKey(Key):
    """A key that was just made."""

    key: str


class Webhook(TypedDict):
    """An address that hears of jobs."""

    id: str
    url: str
    description: str
    kinds: list[str]
    every_job: bool
    disabled_at: str | None
    disabled_reason: str | None
    failing_since: str | None
    created_at: str


class WebhookWithSecret(Webhook):
    """A webhook with its secret, which is shown this once."""

    secret: str


class Delivery(TypedDict):
    """A message to a webhook. Receivers verify its signature, answer with a 2xx status, then GET what it names."""

    id: str
    job_id: str | None
    kind: str
    payload: dict[str, Any]
    state: str
    tries: int
    next_at: str | None
    last_status: int | None
    last_error: str | None
    created_at: str
    delivered_at: str | None


class Entry(TypedDict):
    """A call that changed something."""

    id: int
    action: str
    target: str
    key_id: str
    request_id: str
    data: dict[str, Any]
    created_at: str


class CheckpointError(TypedDict):
    """Why an upload failed."""

    code: str
    message: str
    hint: str


class CheckpointFile(TypedDict):
    """A file of an uploaded checkpoint."""

    path: str
    bytes: int
    sha256: str
    missing: list[int]


class CheckpointSummary(TypedDict):
    """An uploaded checkpoint, without its files."""

    id: str
    name: str
    state: str
    bytes: int
    part_bytes: int
    sha256: str | None
    error: CheckpointError | None
    created_at: str
    updated_at: str
    completed_at: str | None


class Checkpoint(CheckpointSummary):
    """An uploaded checkpoint."""

    files: list[CheckpointFile]


class Parameters(TypedDict):
    """Counts of stored parameters, a tied embedding counted once; a zero counts as stored."""

    all: int
    non_embedding: int
    decoder: int
    ffn: int
    ffn_channels: int
    decoder_zeros: int
    ffn_zeros: int


class TextUsed(TypedDict):
    """Which text was read, so that a figure can be had again."""

    source: str
    sha256: str
    tokens: int
    used_tokens: int
    bos_added: bool


class Perplexity(TypedDict):
    """How well a model predicts a text; lower is better."""

    value: float
    text: TextUsed
    windows: int
    sequence_length: int
    dtype: str


class Speed(TypedDict):
    """Of plain transformers on the worker's device, a median over repetitions."""

    device: str
    threads: int
    prefill_tokens: int
    prefill_tokens_per_second: float
    decode_tokens: int
    decode_tokens_per_second: float


class Measured(TypedDict):
    """One model, dense or pruned."""

    parameters: Parameters
    checkpoint_bytes: int
    macs_per_token: int
    perplexity: Perplexity | None
    speed: Speed | None
    peak_memory_bytes: int | None


class Sparsities(TypedDict):
    """Fraction removed (structured) or zeroed (unstructured), by every denominator."""

    ffn: float
    decoder: float
    non_embedding: float
    all: float


class LayerReport(TypedDict):
    """One decoder block after pruning."""

    index: int
    dropped: bool
    ffn_channels: int
    ffn_channels_before: int
    kv_groups: int
    kv_groups_before: int
    experts: int | None
    experts_before: int | None
    weights: int
    zeros: int
    importance: float | None


class BlockError(TypedDict):
    """How far a block, or one half of it, is from the dense one."""

    index: int
    part: str
    before: float
    after: float


class Recovered(TypedDict):
    """What training brought back after pruning."""

    trained_parameters: int
    trained_share: float
    steps: int
    tokens: int
    text: TextUsed
    held_out_loss_before: float | None
    held_out_loss_after: float | None
    held_out_loss_merged: float | None
    blocks: list[BlockError] | None
    seconds: float
    peak_memory_bytes: int


class Round(TypedDict):
    """One of several rounds of pruning and recovery."""

    sparsity: float
    recovery: Recovered


class LoadCheck(TypedDict):
    """One way to load the result that was tried in a fresh process."""

    layout: str
    loader: str
    max_logit_difference: float
    checked: str
    blocks: list[int] | None


class Report(TypedDict):
    """The result of a job."""

    recipe: dict[str, Any]
    model_type: str
    model_fingerprint: str
    before: Measured | None
    pruned: Measured | None
    after: Measured | None
    parameters_before: Parameters
    parameters_after: Parameters
    sparsity: Sparsities
    layers: list[LayerReport]
    calibration: TextUsed | None
    recovery: Recovered | None
    rounds: list[Round] | None
    loads_with: list[LoadCheck]
    seconds: dict[str, float]
    resumed_at_block: int | None
    resumed_at_round: int | None
    peak_memory_bytes: int
    peak_device_bytes: int | None
    notes: list[str]
    versions: dict[str, str]
