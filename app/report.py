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
    ffn_zeros: int = Field(description="Of the MLPs' weights, those that are exactly zero.")


class TextUsed(Part):
    """Which text was read, so that a figure can be had again."""

    source: str = Field(description="As the recipe names it.")
    sha256: str = Field(description="Of the text's UTF-8 bytes.")
    tokens: int = Field(description="Tokens of the whole text.")
    used_tokens: int = Field(description="Tokens that were read.")
    bos_added: bool = Field(description="Whether the tokenizer put a begin-of-sequence token before the text.")


class Perplexity(Part):
    """How well a model predicts a text; lower is better."""

    value: float = Field(description="exp of the mean negative log-likelihood a token (the first of a window has none).")
    text: TextUsed = Field(description="What it was measured on.")
    windows: int = Field(description="Windows read.")
    sequence_length: int = Field(description="Tokens a window.")
    dtype: str = Field(description="Type in which it was computed.")


class Speed(Part):
    """Of plain transformers on the worker's device, a median over repetitions."""

    device: str = Field(description="What it ran on.")
    threads: int = Field(description="CPU threads.")
    prefill_tokens: int = Field(description="Tokens of the prompt.")
    prefill_tokens_per_second: float = Field(description="Prompt tokens a second.")
    decode_tokens: int = Field(description="Tokens generated, one by one.")
    decode_tokens_per_second: float = Field(description="Generated tokens a second.")


class Measured(Part):
    """One model, dense or pruned."""

    parameters: Parameters = Field(description="What it stores.")
    checkpoint_bytes: int = Field(description="Bytes of the weight files.")
    macs_per_token: int = Field(
        description="Multiply-accumulates a token in the linear layers and the head, at an empty context; zeros count, since they are multiplied."
    )
    perplexity: Perplexity | None = Field(description="How well it predicts text.")
    speed: Speed | None = Field(description="How fast it is; null where the recipe does not ask for it or the model doesn't fit in memory.")
    peak_memory_bytes: int | None = Field(
        description="Highest resident memory of a fresh process that loads this model with plain transformers and generates; its mapped weights included."
    )


class LayerReport(Part):
    """One decoder block after pruning."""

    index: int = Field(description="Its place, from 0.")
    dropped: bool = Field(description="Whether the whole block was removed.")
    ffn_channels: int = Field(description="FFN channels kept, in each expert of a mixture.")
    ffn_channels_before: int = Field(description="FFN channels of the dense model.")
    kv_groups: int = Field(description="KV groups kept: key-value heads with their query heads.")
    kv_groups_before: int = Field(description="KV groups of the dense model.")
    experts: int | None = Field(description="Experts kept; null in a block without.")
    experts_before: int | None = Field(description="Experts of the dense model.")
    weights: int = Field(description="Stored weights of its linear layers.")
    zeros: int = Field(description="Of these, exact zeros.")
    importance: float | None = Field(description="Coarse importance, for methods that measure it.")


class Sparsities(Part):
    """Fraction removed (structured) or zeroed (unstructured), by every denominator."""

    ffn: float = Field(description="Of the MLPs' weights.")
    decoder: float = Field(description="Of the decoder's linear weights.")
    non_embedding: float = Field(description="Of all parameters but embedding and head.")
    all: float = Field(description="Of all parameters.")


class LoadCheck(Part):
    """One way to load the result that was tried in a fresh process."""

    layout: Literal["uniform", "per_layer", "padded"] = Field(description="Which of the written layouts.")
    loader: str = Field(description="What loaded it, e.g. 'transformers 5.23.0' or 'transformers 5.23.0 + espalier.loader'.")
    max_logit_difference: float = Field(description="Largest absolute difference from the worker's own logits on the same tokens.")
    checked: Literal["logits", "blocks"] = Field(
        description="What was compared: the `logits` of the whole model; or, where it doesn't fit in memory, names and shapes of all weights, and the logits of a model "
        "of some of its `blocks` and all that lies outside of them."
    )
    blocks: list[int] | None = Field(None, description="The blocks that were compared; null: all.")


class BlockError(Part):
    """How far a block, or one half of it, is from the dense one."""

    index: int = Field(description="The block's place in the result, from 0.")
    part: Literal["block", "attention", "ffn"] = Field(description="What was fitted.")
    before: float = Field(description="Mean squared difference of its outputs from those of the dense one on the same inputs, pruned.")
    after: float = Field(description="The same for what was kept: the pruned part where training made it no better.")


class Recovered(Part):
    """What training brought back after pruning."""

    trained_parameters: int = Field(description="Parameters that were trained, adapters included; weights that a mask keeps at zero don't count.")
    trained_share: float = Field(description="Of all parameters of the model in training, adapters included, tied ones counted once.")
    steps: int = Field(description="Steps of the optimizer; of each block, or half of it, in a reconstruction.")
    tokens: int = Field(description="Tokens of the text that were trained on.")
    text: TextUsed = Field(description="What it was trained on, the held-out windows included.")
    held_out_loss_before: float | None = Field(description="Mean negative log-likelihood a token on the held-out windows before training; null without any.")
    held_out_loss_after: float | None = Field(description="The same for what was kept, before adapters were merged.")
    held_out_loss_merged: float | None = Field(None, description="The same after a merge that changes what the model computes; null where it does not.")
    blocks: list[BlockError] | None = Field(None, description="What a reconstruction did to each block; null where the whole model was trained.")
    seconds: float = Field(description="Seconds of training, over all attempts.")
    peak_memory_bytes: int = Field(description="Highest anonymous resident memory of the engine process while it trained.")


class Round(Part):
    """One of several rounds of pruning and recovery."""

    sparsity: float = Field(description="Of the decoder's linear weights, those that are zero after it.")
    recovery: Recovered = Field(description="What training brought back.")


class Report(Part):
    """The result of a job."""

    recipe: Recipe = Field(description="What was run.")
    model_type: str = Field(description="`model_type` of the source.")
    model_fingerprint: str = Field(description="sha256 over the source's config.json and weight files.")
    before: Measured | None = Field(description="The dense model; null where the recipe skips evaluation.")
    pruned: Measured | None = Field(
        None, description="The pruned model before its recovery, in the last round, but for speed; null where nothing was recovered, or likewise."
    )
    after: Measured | None = Field(description="The result: the pruned model, after its recovery where there was one; null likewise.")
    parameters_before: Parameters = Field(description="What the dense model stores.")
    parameters_after: Parameters = Field(description="What the pruned model stores.")
    sparsity: Sparsities = Field(description="What was removed.")
    layers: list[LayerReport] = Field(description="Block by block.")
    calibration: TextUsed | None = Field(description="What the method measured activations on; null where it needs no text.")
    recovery: Recovered | None = Field(None, description="What training brought back, in the last round; null where the recipe asks for none.")
    rounds: list[Round] | None = Field(None, description="Every round, where the method prunes and recovers in several.")
    loads_with: list[LoadCheck] = Field(description="What the result was loaded with.")
    seconds: dict[str, float] = Field(description="Seconds a phase.")
    resumed_at_block: int | None = Field(description="Where this run went on from an earlier attempt's verified blocks.")
    resumed_at_round: int | None = Field(None, description="Likewise, of a method in rounds: how many of them were finished.")
    peak_memory_bytes: int = Field(description="Highest anonymous resident memory of the engine process.")
    peak_device_bytes: int | None = Field(None, description="Highest memory that the engine process held on the GPU; null on the CPU.")
    notes: list[str] = Field(description="What the method left out or changed, in sentences.")
    versions: dict[str, str] = Field(description="Versions of espalier, torch, transformers and Python.")
