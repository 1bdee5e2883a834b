"""What a decoder block is, per `model_type`: where its weights lie in the checkpoint, which linears share an input, and which form the MLP.

A table, not subclasses: a new family is a new row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Names relative to a block, as in the checkpoint and in transformers' modules."""

    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"  # absent from the checkpoint where it is tied to the embedding
    # Linears by the input that they share, in the order of the computation.
    inputs: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    # The MLP's channels are the outputs of these and the inputs of `down`.
    channel_outputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for shared in self.inputs for name in shared)

    @property
    def mlp(self) -> tuple[str, ...]:
        return (*self.channel_outputs, self.down)

    def block_prefix(self, index: int) -> str:
        return f"{self.blocks}.{index}."


GATED_DECODER = Architecture()

ARCHITECTURES: dict[str, Architecture] = {
    "llama": GATED_DECODER,
    "mistral": GATED_DECODER,
    "qwen2": GATED_DECODER,
    "qwen3": GATED_DECODER,
}
