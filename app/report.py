"""What a finished job says: everything that was measured, by every denominator, with where the text came from. Free of torch, like the recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.recipe import Recipe


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Parameters(Part):
    """Counts of stored parameters, a tied embedding counted once; a zero counts as stored."""

    all: int = Field(description="All parameters.")
    non_embedding: int = Field(description="All but the token embedding and the head.")
    decoder: int = Field(description="Weights of the decoder blocks' linear layers.")
    ffn: int = Field(description="Of these, the weights of the MLPs.")
    ffn_channels: int = Field(description="FFN channels, summed over blocks.")
    decoder_zeros: int = Field(description="Of the decoder's linear weights, those that are exactly zero.")


class TextUsed(Part):
    """Which text was read, so that a figure can be had again."""

    source: str = Field(description="As the recipe names it.")
    sha256: str = Field(description="Of the text's UTF-8 bytes.")
    tokens: int = Field(description="Tokens of the whole text.")
    used_tokens: int = Field(description="Tokens that were read.")
    bos_added: bool = Field(description="Whether the tokenizer put a begin-of-sequence token before the text.")


class Perplexity(Part):
    value: float = Field(description="exp of the mean negative log-likelihood a token (the first of a window has none).")
    text: TextUsed
    windows: int
    sequence_length: int
    dtype: str = Field(description="Type in which it was computed.")


class Speed(Part):
    """Of plain transformers on the worker's device, a median over repetitions."""

    device: str
    threads: int
    prefill_tokens: int
    prefill_tokens_per_second: float
    decode_tokens: int
    decode_tokens_per_second: float


class Measured(Part):
    """One model, dense or pruned."""

    parameters: Parameters
    checkpoint_bytes: int = Field(description="Bytes of the weight files.")
    macs_per_token: int = Field(
        description="Multiply-accumulates a token in the linear layers and the head, at an empty context; zeros count, since they are multiplied."
    )
    perplexity: Perplexity | None
    speed: Speed | None
    peak_memory_bytes: int | None = Field(description="Highest anonymous resident memory while this model was evaluated.")


class LayerReport(Part):
    """One decoder block after pruning."""

    index: int
    ffn_channels: int
    ffn_channels_before: int
    weights: int = Field(description="Stored weights of its linear layers.")
    zeros: int
    importance: float | None = Field(description="Coarse importance, for methods that measure it.")


class Sparsities(Part):
    """Fraction removed (structured) or zeroed (unstructured), by every denominator."""

    ffn: float
    decoder: float
    non_embedding: float
    all: float


class LoadCheck(Part):
    """One way to load the result that was tried in a fresh process."""

    layout: Literal["uniform", "per_layer", "padded"]
    loader: str = Field(description="What loaded it, e.g. 'transformers 5.23.0' or 'transformers 5.23.0 + espalier.loader'.")
    max_logit_difference: float = Field(description="Largest absolute difference from the worker's own logits on the same tokens.")
    checked: Literal["logits"]


class Report(Part):
    """The result of a job."""

    recipe: Recipe
    model_type: str
    model_fingerprint: str = Field(description="sha256 over the source's config and weight files' headers and sizes.")
    before: Measured | None = Field(description="The dense model; null where the recipe skips evaluation.")
    after: Measured | None
    parameters_before: Parameters
    parameters_after: Parameters
    sparsity: Sparsities
    layers: list[LayerReport]
    calibration: TextUsed | None
    loads_with: list[LoadCheck]
    seconds: dict[str, float] = Field(description="Seconds a phase.")
    resumed_at_block: int | None = Field(description="Where this run went on from an earlier attempt's verified blocks.")
    peak_memory_bytes: int = Field(description="Highest anonymous resident memory of the engine process.")
    notes: list[str] = Field(description="What the method left out or changed, in sentences.")
    versions: dict[str, str] = Field(description="Versions of espalier, torch, transformers and Python.")
