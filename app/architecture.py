"""What a decoder block is, per `model_type`: where its weights lie in the checkpoint, which linears share an input, and what can be removed from it.

A table, not subclasses: a new family is a new row. Free of torch, since the API checks a folder's headers by it. `config` is config.json as a dict; names are
those of the stored tensors, as `save_pretrained` writes them and the hub has them, whatever transformers calls its modules.

Notation: C_in inputs and C_out outputs of a linear, D hidden size, h head size, I FFN channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Config = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mlp:
    """The linears around one set of FFN channels, by their names in the block: a dense FFN, or one expert."""

    outer: tuple[str, ...]  # their outputs are the channels: gate and up, or the one before the activation
    down: str  # its inputs are the channels
    parts: int = 1  # sets of channels stacked in the rows of the one `outer` linear (phi3's gate_up_proj: 2)
    expert: int | None = None  # its number, in a mixture of experts
    width_key: str = "intermediate_size"  # where config.json states the number of channels

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.outer, self.down)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the FFN's place."""

    mlp: Mlp  # of one expert, with {} for its number
    router: str  # its rows are the experts
    count_keys: tuple[str, ...]  # where config.json states how many there are; the first that it has counts
    used_key: str = "num_experts_per_tok"  # where config.json states to how many of them a token is sent

    def mlp_of(self, number: int) -> Mlp:
        return replace(self.mlp, outer=tuple(name.format(number) for name in self.mlp.outer), down=self.mlp.down.format(number), expert=number)


@dataclass(frozen=True)
class Attention:
    """The linears of a block's attention, by their names in the block; one name three times where they are one matrix."""

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    fused: Literal["no", "stacked", "interleaved"] = "no"  # rows of q, then k, then v; or q, k, v head by head

    @property
    def linears(self) -> tuple[str, ...]:
        return (*dict.fromkeys((self.query, self.key, self.value)), self.output)


@dataclass(frozen=True)
class Biases:
    """Biases that a block has all together or not at all."""

    linears: tuple[str, ...]
    switch: str = ""  # of config.json; "": they are always there


@dataclass(frozen=True)
class Positions:
    """A table of learned position embeddings, which bounds the length of a text."""

    name: str
    key: str  # where config.json states the longest text
    offset: int = 0  # rows before the first position


@dataclass(frozen=True)
class Keys:
    """Where config.json states sizes; "" where a family can't state one."""

    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    vocab: str = "vocab_size"
    embedding: str = ""


@dataclass(frozen=True)
class Dimensions:
    """Sizes by config.json, under one name for all families."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    embedding: int  # of a token's stored embedding; another than `hidden` where the model projects it

    @property
    def queries_per_group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Architecture:
    """One family. Names are as in the checkpoint, relative to a block where they belong to one."""

    blocks: str = "model.layers"  # also transformers' path to the list of its blocks
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"  # absent from the checkpoint where it is tied to the embedding
    positions: Positions | None = None
    project_in: str = "model.project_in.weight"  # there where a token's embedding is narrower than the hidden states
    project_out: str = "model.project_out.weight"
    attention: Attention = Attention()
    mlp: Mlp = Mlp(outer=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj")
    experts: Experts | None = None  # of the blocks that have no dense FFN
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: tuple[str, ...] = ()  # over the channels of a head
    biases: tuple[Biases, ...] = ()
    norm_biases: bool = False
    transposed: bool = False  # a block's linears are stored as (C_in, C_out)
    keys: Keys = Keys()
    widening: int = 0  # FFN channels a hidden channel, where config.json may leave the width open
    defaults: Config = field(default_factory=dict)  # what a key means that config.json leaves out; other such keys mean None
    needs: Config = field(default_factory=dict)  # values, or their keys left out, that this table takes for granted
    no_final_norm: Config = field(default_factory=dict)  # values of which any means that there is no final norm
    per_layer: bool = False  # whether espalier.loader builds layers of different sizes
    heads_divide_hidden: bool = False  # whether transformers refuses numbers of heads that don't divide the hidden size
    groups_fixed: str = ""  # why KV groups can't be removed, if they can't
    sees_all: Callable[[Config, int], bool] | None = None  # where config.json has no `layer_types`, whether a block attends to the whole text; None: all do
    place_key: str = ""  # the switch of config.json that makes what a block computes depend on its place

    def block_prefix(self, index: int) -> str:
        return f"{self.blocks}.{index}."

    # ----------------------------------------------------------------- sizes

    def stated(self, config: Config, key: str) -> Any:
        """The value of a key, or what transformers takes where config.json leaves it out."""
        return config.get(key, self.defaults.get(key))

    def dimensions(self, config: Config) -> Dimensions:
        hidden, heads = int(config[self.keys.hidden]), int(config[self.keys.heads])
        return Dimensions(
            layers=int(config[self.keys.layers]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(self.stated(config, self.keys.kv_heads) or heads),
            head_dim=int(self.stated(config, self.keys.head_dim) or hidden // heads),
            vocab=int(config[self.keys.vocab]),
            embedding=int(self.stated(config, self.keys.embedding) or hidden),
        )

    def width_key(self, config: Config, index: int) -> str:
        """Where config.json states the number of FFN channels of a block, or of each of its experts."""
        return next(self._mlps(config, index)).width_key

    def ffn_width(self, config: Config, index: int) -> int:
        """FFN channels of a block, or of each of its experts."""
        of_layer = layer_config(config, index)
        return int(of_layer.get(self.width_key(config, index)) or self.widening * config[self.keys.hidden])

    def tied(self, config: Config) -> bool:
        """Whether the head is the embedding's matrix."""
        return bool(self.stated(config, "tie_word_embeddings"))

    @property
    def size_keys(self) -> tuple[str, ...]:
        """Keys of config.json without which the shapes can't be known."""
        widths = () if self.widening else (self.mlp.width_key, *([self.experts.mlp.width_key] if self.experts else ()))
        return tuple(dict.fromkeys((self.keys.hidden, *widths, self.keys.layers, self.keys.heads, self.keys.vocab)))

    @property
    def optional_size_keys(self) -> tuple[str, ...]:
        """Keys of config.json that state a size, or null, or are left out."""
        experts = (*self.experts.count_keys, self.experts.used_key, "decoder_sparse_step") if self.experts else ()
        found = (self.keys.kv_heads, self.keys.head_dim, self.keys.embedding, self.mlp.width_key, self.positions.key if self.positions else "", *experts)
        return tuple(key for key in found if key)

    # --------------------------------------------------------------- experts

    def expert_count(self, config: Config) -> int:
        """Experts of each block that has any; 0 in a family without."""
        if self.experts is None:
            return 0
        return int(next((config[key] for key in self.experts.count_keys if config.get(key)), 0) or self.stated(config, self.experts.count_keys[0]))

    def experts_per_token(self, config: Config) -> int:
        return 0 if self.experts is None else int(self.stated(config, self.experts.used_key))

    def router(self, config: Config, index: int) -> str | None:
        """The router's name in a block; None where the block has a dense FFN."""
        if self.experts is None or index in (config.get("mlp_only_layers") or ()) or (index + 1) % (config.get("decoder_sparse_step") or 1):
            return None
        return self.experts.router

    # --------------------------------------------------------------- linears

    def mlps(self, config: Config, index: int) -> tuple[Mlp, ...]:
        """The FFNs of a block: one, or one for each expert."""
        return tuple(self._mlps(config, index))

    def _mlps(self, config: Config, index: int) -> Iterator[Mlp]:
        if self.experts is None or self.router(config, index) is None:
            yield self.mlp
        else:
            yield from map(self.experts.mlp_of, range(self.expert_count(config)))

    def inputs(self, config: Config, index: int) -> tuple[tuple[str, ...], ...]:
        """A block's linears by the input that they share, in the order of the computation."""
        *into, out = self.attention.linears
        return (tuple(into), (out,), *(shared for mlp in self.mlps(config, index) for shared in (mlp.outer, (mlp.down,))))

    def linears(self, config: Config, index: int) -> tuple[str, ...]:
        return tuple(name for shared in self.inputs(config, index) for name in shared)

    def linear_shapes(self, config: Config, index: int) -> Iterator[tuple[str, tuple[int, int]]]:
        """A block's linears with their (C_out, C_in), as they are where `transposed` is False."""
        size = self.dimensions(layer_config(config, index))
        query, key = size.heads * size.head_dim, size.kv_heads * size.head_dim
        *into, out = self.attention.linears
        rows = (query, key, key) if self.attention.fused == "no" else (query + 2 * key,)
        yield from ((linear, (extent, size.hidden)) for linear, extent in zip(into, rows, strict=True))
        yield out, (size.hidden, query)
        width = self.ffn_width(config, index)
        for mlp in self._mlps(config, index):
            yield from ((outer, (mlp.parts * width, size.hidden)) for outer in mlp.outer)
            yield mlp.down, (size.hidden, width)

    def slot(self, linear: str) -> Biases | None:
        """The biases among which a linear has or could have its own; None where the family gives it none."""
        return next((biases for biases in self.biases if linear in biases.linears), None)

    def has_bias(self, config: Config, linear: str) -> bool:
        slot = self.slot(linear)
        return slot is not None and (not slot.switch or bool(self.stated(config, slot.switch)))

    def has_biases(self, config: Config) -> bool:
        """Whether a block has any biases, its norms' included."""
        return self.norm_biases or any(self.has_bias(config, linear) for linear in self.linears(config, 0))

    def adds_ffn(self, config: Config, index: int) -> bool:
        """Whether a block ends by adding what the last linear of its one FFN gives: with nothing mixed, and no norm after it."""
        return self.router(config, index) is None and "post_feedforward_layernorm" not in self.norms and bool(config.get("do_layer_norm_before", True))

    # ---------------------------------------------------------------- shapes

    def outer_shapes(self, config: Config) -> Iterator[tuple[str, Shape]]:
        """The stored tensors outside the blocks with their shapes."""
        size = self.dimensions(config)
        yield self.embedding, (size.vocab, size.embedding)
        if self.positions is not None:
            yield self.positions.name, (self.stated(config, self.positions.key) + self.positions.offset, size.hidden)
        if size.embedding != size.hidden:
            yield self.project_in, (size.hidden, size.embedding)
            yield self.project_out, (size.embedding, size.hidden)
        if not any(self.stated(config, key) == value for key, value in self.no_final_norm.items()):
            yield from self._norm(self.final_norm.removesuffix(".weight"), size.hidden)
        if not self.tied(config):
            yield self.head, (size.vocab, size.embedding)

    def block_shapes(self, config: Config, index: int) -> Iterator[tuple[str, Shape]]:
        """A block's stored tensors, by their names in the block, with their shapes."""
        size = self.dimensions(layer_config(config, index))
        router = self.router(config, index)
        if router is not None:
            yield f"{router}.weight", (self.expert_count(config), size.hidden)
        for linear, (rows, columns) in self.linear_shapes(config, index):
            yield f"{linear}.weight", (columns, rows) if self.transposed else (rows, columns)
            if self.has_bias(config, linear):
                yield f"{linear}.bias", (rows,)
        for norm in self.norms:
            yield from self._norm(norm, size.hidden)
        for norm in self.head_norms:
            yield from self._norm(norm, size.head_dim)

    def _norm(self, name: str, extent: int) -> Iterator[tuple[str, Shape]]:
        yield f"{name}.weight", (extent,)
        if self.norm_biases:
            yield f"{name}.bias", (extent,)

    # ---------------------------------------------------------------- blocks

    def layer_types(self, config: Config) -> list[str] | None:
        """Each block's entry in config.json's `layer_types`, or what transformers takes where that is left out; None in a family without layer types."""
        if self.sees_all is None:
            return None
        blocks = range(self.dimensions(config).layers)
        return list(config.get("layer_types") or ("full_attention" if self.sees_all(config, index) else "sliding_attention" for index in blocks))

    def keep_blocks(self, config: Config, kept: Sequence[int]) -> dict[str, Any]:
        """config.json for these blocks alone, in this order: their number and what it says of each of them.

        Raises ValueError where a block would compute something else in another place.
        """
        if config.get(self.place_key):
            raise ValueError(f"with {self.place_key} a block's place changes what it computes")
        changed = {**config, self.keys.layers: len(kept)}
        layer_types = self.layer_types(config)
        if layer_types is not None:
            changed["layer_types"] = [layer_types[index] for index in kept]
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            dense = [place for place, index in enumerate(kept) if self.router(config, index) is None]
            changed |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        return changed


def layer_config(config: Config, index: int) -> Config:
    """What config.json says of one layer: its entry in `per_layer_config` over the rest."""
    return {**config, **_own(config, index)} if config.get("per_layer_config") else config


def _own(config: Config, index: int) -> Config:
    return next((own for layer, own in config["per_layer_config"].items() if int(layer) == index), {})


# ------------------------------------------------------------------ the table


QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ALL_OF_ATTENTION = (*QUERY_KEY_VALUE, "self_attn.o_proj")
NO_HEAD_SIZE = "the head size is the hidden size by the number of heads, and config.json can't state another"
FOUR_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _before_windows(config: Config, index: int) -> bool:
    windows = config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None
    return not windows or index < config.get("max_window_layers", 28)


LLAMA = Architecture(
    heads_divide_hidden=True,
    biases=(Biases(ALL_OF_ATTENTION, switch="attention_bias"), Biases(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), switch="mlp_bias")),
    per_layer=True,
)
MISTRAL = Architecture(defaults={"num_key_value_heads": 8}, per_layer=True)
QWEN3 = Architecture(
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    biases=(Biases(ALL_OF_ATTENTION, switch="attention_bias"),),
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    sees_all=_before_windows,
    per_layer=True,
)
GEMMA2 = Architecture(
    heads_divide_hidden=True,
    norms=FOUR_NORMS,
    biases=(Biases(ALL_OF_ATTENTION, switch="attention_bias"),),
    defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    sees_all=lambda config, index: index % 2 == 1,
    per_layer=True,
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": replace(
        MISTRAL,
        experts=Experts(
            mlp=Mlp(outer=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"), down="block_sparse_moe.experts.{}.w2"),
            router="block_sparse_moe.gate",
            count_keys=("num_local_experts", "num_experts"),
        ),
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
        per_layer=False,
    ),
    "qwen2": Architecture(biases=(Biases(QUERY_KEY_VALUE),), defaults={"num_key_value_heads": 32}, sees_all=_before_windows, per_layer=True),
    "qwen3": QWEN3,
    "qwen3_moe": replace(
        QWEN3,
        experts=Experts(
            mlp=Mlp(outer=("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"), down="mlp.experts.{}.down_proj", width_key="moe_intermediate_size"),
            router="mlp.gate",
            count_keys=("num_local_experts", "num_experts"),
        ),
        defaults={"num_key_value_heads": 4, "num_local_experts": 128, "num_experts_per_tok": 8},
        sees_all=None,
        per_layer=False,
    ),
    "gemma2": GEMMA2,
    "gemma3_text": replace(
        GEMMA2,
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        sees_all=lambda config, index: (index + 1) % config.get("sliding_window_pattern", 6) == 0,
        per_layer=False,
    ),
    "phi3": Architecture(
        attention=Attention(query="self_attn.qkv_proj", key="self_attn.qkv_proj", value="self_attn.qkv_proj", fused="stacked"),
        mlp=Mlp(outer=("mlp.gate_up_proj",), down="mlp.down_proj", parts=2),
    ),
    "opt": Architecture(
        blocks="model.decoder.layers",
        embedding="model.decoder.embed_tokens.weight",
        final_norm="model.decoder.final_layer_norm.weight",
        positions=Positions("model.decoder.embed_positions.weight", key="max_position_embeddings", offset=2),
        project_in="model.decoder.project_in.weight",
        project_out="model.decoder.project_out.weight",
        attention=Attention(output="self_attn.out_proj"),
        mlp=Mlp(outer=("fc1",), down="fc2", width_key="ffn_dim"),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        biases=(Biases((*QUERY_KEY_VALUE, "self_attn.out_proj", "fc1", "fc2"), switch="enable_bias"),),
        norm_biases=True,
        keys=Keys(kv_heads="", head_dim="", embedding="word_embed_proj_dim"),
        defaults={"tie_word_embeddings": True, "enable_bias": True, "max_position_embeddings": 2048},
        needs={"layer_norm_elementwise_affine": True},
        no_final_norm={"do_layer_norm_before": False, "_remove_final_layer_norm": True},
        groups_fixed=NO_HEAD_SIZE,
    ),
    "gpt_neox": Architecture(
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in.weight",
        final_norm="gpt_neox.final_layer_norm.weight",
        head="embed_out.weight",
        attention=Attention(
            query="attention.query_key_value",
            key="attention.query_key_value",
            value="attention.query_key_value",
            output="attention.dense",
            fused="interleaved",
        ),
        mlp=Mlp(outer=("mlp.dense_h_to_4h",), down="mlp.dense_4h_to_h"),
        biases=(Biases(("attention.query_key_value", "attention.dense"), switch="attention_bias"), Biases(("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"))),
        norm_biases=True,
        keys=Keys(kv_heads="", head_dim=""),
        defaults={"attention_bias": True},
        groups_fixed=NO_HEAD_SIZE,
    ),
    "gpt2": Architecture(
        blocks="transformer.h",
        embedding="transformer.wte.weight",
        final_norm="transformer.ln_f.weight",
        positions=Positions("transformer.wpe.weight", key="n_positions"),
        attention=Attention(query="attn.c_attn", key="attn.c_attn", value="attn.c_attn", output="attn.c_proj", fused="stacked"),
        mlp=Mlp(outer=("mlp.c_fc",), down="mlp.c_proj", width_key="n_inner"),
        norms=("ln_1", "ln_2"),
        biases=(Biases(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),),
        norm_biases=True,
        transposed=True,
        keys=Keys(layers="n_layer", hidden="n_embd", heads="n_head", kv_heads="", head_dim=""),
        widening=4,
        defaults={"tie_word_embeddings": True, "n_positions": 1024},
        needs={"add_cross_attention": False},
        place_key="scale_attn_by_inverse_layer_idx",
        groups_fixed=NO_HEAD_SIZE,
    ),
}
