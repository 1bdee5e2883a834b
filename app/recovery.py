"""The part of a recipe that says how what pruning lost is trained back: one class a recovery. Free of torch, like the recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from app.strict import Strict, expand_name


class Distillation(Strict):
    """Learn from the dense model besides the text: loss = cross-entropy + kl · KL(dense ‖ pruned) + hidden · Σ over blocks of MSE(hidden states).

    KL is a mean over tokens. Code that sums it over a sequence, as Bonsai's does, has weights that are smaller by the length: its 0.01 at 512 tokens is 5.12 here.
    """

    kl: float = Field(1.0, ge=0, le=1000, description="Weight of the divergence from the dense model's next-token probabilities, a mean over tokens.")
    hidden: float = Field(0.0, ge=0, le=1000, description="Weight of the squared distance of each block's outputs, a mean over tokens and channels.")
    top_k: int = Field(64, ge=1, le=65536, description="Probabilities kept of each token's distribution; the rest of the vocabulary counts as one.")
    temperature: float = Field(1.0, gt=0, le=100, description="Divides both models' logits in the divergence, whose weight grows by its square.")

    @model_validator(mode="after")
    def _weighs_something(self) -> Distillation:
        if not self.kl and not self.hidden:
            raise ValueError("distillation without kl and hidden teaches nothing; give one a weight, or leave distillation out")
        return self


class Training(Strict):
    """How a recovery trains: AdamW with a linear warm-up and a linear decay to zero, on windows at random offsets of a text."""

    source: str | None = Field(
        None, min_length=1, max_length=1024, description="The text to train on, as for calibration; null: the calibration text. Never the evaluation text."
    )
    sequence_length: int = Field(512, ge=8, le=131072, description="Tokens a sequence.")
    steps: int | None = Field(
        None, ge=1, le=1_000_000, description="Steps of the optimizer, of each round where a method has several; null: as many as `tokens` asks for, else 200."
    )
    tokens: int | None = Field(None, ge=1, description="Instead of `steps`: tokens to train on, of each round likewise, rounded up to whole steps.")
    batch: int = Field(8, ge=1, le=65536, description="Sequences a step.")
    micro_batch: int = Field(2, ge=1, le=65536, description="Sequences computed at once; gradients of a step's parts are added up.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="The highest, reached after the warm-up.")
    warmup: float = Field(0.1, ge=0, le=1, description="Share of the steps over which the learning rate rises from zero; it then falls to zero.")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's, of matrices only.")
    clip: float | None = Field(1.0, gt=0, description="Largest norm of a step's gradient; null: any.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the offsets, of new parameters and of dropout.")
    held_out: int | None = Field(
        8, ge=1, le=65536, description="Windows at the end of the text that are not trained on: what predicts them best is kept. Null: the last step's is."
    )
    patience: int = Field(5, ge=1, le=1_000_000, description="Measurements of the held-out loss in a row without a better one after which training ends.")
    checkpoint_every: int = Field(50, ge=1, le=1_000_000, description="Steps between two measurements of the held-out loss; the state is saved then too.")
    gradient_checkpointing: bool = Field(True, description="Compute a block's activations again for its gradient instead of keeping them.")
    distillation: Distillation | None = Field(None, description="What is learned from the dense model; null: nothing, only from the text.")

    @model_validator(mode="after")
    def _has_one_length(self) -> Training:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("steps and tokens both say how long to train; give one")
        return self

    @property
    def total_steps(self) -> int:
        """Steps of the optimizer, where it does not end early."""
        if self.tokens is not None:
            return -(-self.tokens // (self.batch * self.sequence_length))
        return self.steps or 200

    @property
    def windows(self) -> tuple[int, int]:
        """Sequences that are drawn from the text to train on, and those at its end that are held out."""
        return self.total_steps * self.batch, self.held_out or 0


class Full(Training):
    """Train every weight that was not pruned, embeddings included; zeros of a mask stay zero."""

    name: Literal["full"] = "full"


class LoRA(Training):
    """Train a product of two small matrices beside each linear of the decoder blocks, and add it to the weight in the end (Hu et al., arXiv 2106.09685).

    Where pruning set weights to zero, the product has the same zeros, in training as in the end.
    """

    name: Literal["lora"] = "lora"
    learning_rate: float = Field(2e-4, gt=0, le=1, description="The highest, reached after the warm-up.")
    rank: int = Field(16, ge=1, le=4096, description="Rank of the products; with `ranks` by importance, what their parameters amount to on average.")
    alpha: float = Field(32.0, gt=0, description="The product is scaled by alpha / rank, in every block alike.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of a product's inputs that are left out in a step, or of its entries where pruning set weights to zero."
    )
    targets: Literal["all", "attention", "ffn"] = Field("all", description="Which linears of the decoder blocks.")
    ranks: Literal["equal", "importance"] = Field(
        "equal",
        description="One rank for all blocks, or ranks in proportion to a block's coarse importance at the same number of parameters (the idea of CFSP; the rule is ours).",
    )
    head: bool = Field(
        False, description="Train the head too, whole. One that is tied to the embedding becomes a matrix of its own, and the model grows by it."
    )


PerpPart = Literal["biases", "norms", "head", "adapters"]
PERP_PRESETS: dict[str, tuple[PerpPart, ...]] = {
    "biases": ("biases",),
    "norms": ("norms",),
    "biases+norms": ("biases", "norms"),
    "head": ("head",),
    "adapters": ("adapters",),
    "published": ("biases", "norms", "adapters"),
    "all": ("biases", "norms", "head", "adapters"),
}
PerpPreset = Literal["biases", "norms", "biases+norms", "head", "adapters", "published", "all"]


def _expand_parts(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in PERP_PRESETS:
        raise ValueError(f"'{value[:50]}' is none of {', '.join(PERP_PRESETS)}; give one of them, or a list of biases, norms, head, adapters")
    return PERP_PRESETS[value]


class Perp(Training):
    """Train a small part of the parameters, and keep every zero (PERP; Zimmer et al., arXiv 2312.15230).

    PERP's `lora`, which fills zeros and so is never merged, is the recovery of that name, which keeps them.
    """

    name: Literal["perp"] = "perp"
    train: Annotated[tuple[PerpPart, ...], BeforeValidator(_expand_parts, json_schema_input_type=PerpPreset | list[PerpPart])] = Field(
        PERP_PRESETS["published"],
        min_length=1,
        strict=False,
        description="What is trained: any of `biases` (where the model has them), `norms`, `head` (by an adapter; one that is tied to the embedding becomes a matrix of "
        "its own) and `adapters` of all linears of the decoder blocks; or a preset. `published` is all but the head.",
    )
    adapter: Literal["mask_lora", "scale_lora", "lora_prune"] = Field(
        "mask_lora",
        description="Of a weight W, its mask M and matrices B and A of low rank: `mask_lora` trains W + s · BA ⊙ M, `scale_lora` W ⊙ BA; both merge exactly. `lora_prune` trains "
        "W + s · BA and merges BA ⊙ M, so what the model computes jumps at the merge, and the report tells the loss before and after.",
    )
    rank: int | None = Field(
        None, ge=1, le=4096, description="Rank of the adapters; null: the largest with which at most 0.35 % of all parameters are trained, and at least 1."
    )
    alpha: float | None = Field(None, gt=0, description="s is alpha / rank; null: s is 2.")
    mode: Literal["retrain", "reconstruct"] = Field(
        "retrain",
        description="`retrain`: the whole model learns to predict the text. `reconstruct`: block by block, in the memory of one, learns to give what the dense block gives for "
        "the same input, the output of the blocks before it; `steps` are then of each block, and nothing is held out.",
    )
    parts: Literal["block", "attention_ffn"] = Field(
        "block", description="With `reconstruct`: whether a block is fitted as a whole, or its attention first and then its FFN, `steps` each."
    )
    samples: int = Field(128, ge=1, le=65536, description="With `reconstruct`: sequences of the text, which the steps go through again and again.")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="The highest, reached after the warm-up; few parameters bear a higher one than whole models.")

    @property
    def reconstructs(self) -> bool:
        return self.mode == "reconstruct"

    @property
    def windows(self) -> tuple[int, int]:
        return (self.samples, 0) if self.reconstructs else super().windows

    @model_validator(mode="after")
    def _names_what_it_does(self) -> Perp:
        if len(set(self.train)) < len(self.train):
            raise ValueError("train names a part twice; give each once")
        if self.parts != "block" and not self.reconstructs:
            raise ValueError("parts are fitted one by one only in reconstruction; set mode to 'reconstruct', or leave parts out")
        if self.reconstructs and set(self.train) == {"head"}:
            raise ValueError("reconstruction fits blocks, and the head lies outside of them; train something else, or set mode to 'retrain'")
        if self.reconstructs and self.distillation is not None:
            raise ValueError("reconstruction learns from the dense model's blocks by itself; leave distillation out, or set mode to 'retrain'")
        return self


RecoveryConfig = Annotated[Full | LoRA | Perp, Field(discriminator="name")]
RecoveryName = Literal["full", "lora", "perp"]

# Whole settings by one name. Bonsai's: its README's command line, with KL a mean over tokens, and 5 of its 118 steps to warm up.
RECOVERY_PRESETS: dict[str, Full | LoRA | Perp] = {
    "bonsai": LoRA(
        rank=128,
        alpha=512,
        dropout=0.05,
        head=True,
        learning_rate=1e-4,
        sequence_length=512,
        tokens=15_000 * 512,
        batch=128,
        micro_batch=1,
        warmup=5 / 118,
        distillation=Distillation(kl=0.01 * 512, hidden=0.0),
    ),
}
RecoveryPreset = Literal["bonsai"]


def _expand_recovery(value: Any) -> Any:
    return RECOVERY_PRESETS[value] if isinstance(value, str) and value in RECOVERY_PRESETS else expand_name(value)


Recovery = Annotated[RecoveryConfig, BeforeValidator(_expand_recovery, json_schema_input_type=RecoveryName | RecoveryPreset | RecoveryConfig)]
