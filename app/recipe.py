"""The contract of a job: what to prune, how, on which text, and what to write. Free of torch, so that the API validates it and OpenAPI documents it.

The body of `POST /v1/jobs`, the file that `python -m worker.pipeline` reads, and the recipe in a model card are all a `Recipe`.
Short forms are accepted and expanded: `"method": "cfsp"`, `"sparsity": 0.3`, `"sparsity": "2:4"`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from app.architecture import ARCHITECTURES
from app.recovery import LoRA, Perp, Recovery
from app.strict import Strict, expand_name

MODEL_TYPES = tuple(ARCHITECTURES)

BUNDLED_TEXTS = ("c4", "wiki")
PARTS = 4  # of a model, in one of which each of Bonsai's sub-models lacks units

# A hub id ("owner/name" or "name") by the hub's own rules; a path is accepted where the caller allows one.
MODEL_ID = re.compile(r"(?!.*(?:\.\.|--))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


# ------------------------------------------------------------------ sparsity


class Fraction(Strict):
    """Remove this fraction of a denominator."""

    fraction: float = Field(gt=0, lt=1, description="Fraction to remove, between 0 and 1 exclusive.", examples=[0.3])
    of: Literal["method", "ffn", "decoder", "non_embedding", "all"] = Field(
        "method",
        description="What the fraction is of: the method's published denominator (`method`), FFN channels (`ffn`), the weights of the decoder's linear layers "
        "(`decoder`), all parameters but embeddings and head (`non_embedding`), or all parameters, tied ones counted once (`all`).",
    )


class Pattern(Strict):
    """N:M sparsity: of each `m` consecutive inputs of an output row, at most `n` weights stay."""

    n: int = Field(ge=1, description="Weights kept in each group.")
    m: int = Field(ge=2, le=64, description="Group length along the input dimension.")

    @model_validator(mode="after")
    def _keeps_less_than_all(self) -> Pattern:
        if self.n >= self.m:
            raise ValueError(f"{self.n}:{self.m} removes nothing; n must be smaller than m")
        return self

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


class Budget(Strict):
    """A bound on the result, met by the least pruning that keeps it. For structured methods: all tries share one walk over the calibration text."""

    target_parameters: int | None = Field(None, ge=1, description="At most this many parameters are stored, tied ones counted once.")
    target_bytes: int | None = Field(None, ge=1, description="The weight files have at most this many bytes.")
    max_perplexity_increase: float | None = Field(
        None, gt=0, le=100, description="Perplexity on the evaluation text rises by at most this share (0.1: ten per cent); as much is removed as that allows."
    )

    @model_validator(mode="after")
    def _is_one_bound(self) -> Budget:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(f"a budget is one bound, not {len(given)}; give target_parameters, target_bytes or max_perplexity_increase")
        return self


def _expand_sparsity(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("sparsity must be a number between 0 and 1, a pattern such as '2:4', or an object")
    if isinstance(value, int | float):
        return {"fraction": value}
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,2}):(\d{1,2})", value)
        if match is None:
            raise ValueError(f"'{value}' is not a sparsity: give a number between 0 and 1, or a pattern such as '2:4'")
        return {"n": int(match[1]), "m": int(match[2])}
    return value


def _sparsity_kind(value: Any) -> str:
    for kind in (Pattern, Budget):
        if isinstance(value, kind) or (isinstance(value, dict) and not value.keys().isdisjoint(kind.model_fields)):
            return kind.__name__
    return "Fraction"


SparsityShort = float | Annotated[str, Field(pattern=r"^\d{1,2}:\d{1,2}$")]
Sparsity = Annotated[
    Annotated[Fraction, Tag("Fraction")] | Annotated[Pattern, Tag("Pattern")] | Annotated[Budget, Tag("Budget")],
    Discriminator(_sparsity_kind),
    BeforeValidator(_expand_sparsity, json_schema_input_type=SparsityShort | Fraction | Pattern | Budget),
]


# ------------------------------------------------------------------- methods


class Magnitude(Strict):
    """Remove the weights of smallest absolute value (Han et al. 2015). Needs no calibration text."""

    name: Literal["magnitude"] = "magnitude"
    compare: Literal["matrix", "row"] = Field("matrix", description="Weights compete within their matrix (as published) or within their output row.")
    rounds: int = Field(
        1,
        ge=1,
        le=100,
        description="Rounds of pruning, each of which removes the same share of the weights that are left and is followed by the whole recovery (iterative magnitude "
        "pruning; the schedule of Frankle & Carbin, arXiv 1803.03635, and the learning-rate rewinding of Renda et al., arXiv 2003.02389). 1: all at once.",
    )


class Wanda(Strict):
    """Remove the weights of smallest |weight| × input norm, compared within each output row (Sun et al., arXiv 2306.11695)."""

    name: Literal["wanda"] = "wanda"
    variant: bool = Field(
        False,
        description="The authors' `use_variant`: each row drops its lowest scores up to one share of the row's score sum, found by bisection so that the matrix meets the target.",
    )


class SparseGPT(Strict):
    """Remove weights column by column and let the rest of their row make up for each, by the inverse Hessian (Frantar & Alistarh, arXiv 2301.00774)."""

    name: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(0.01, gt=0, le=1, description="Added to the Hessian's diagonal, as a share of its mean; raised by itself where it does not suffice.")
    block_size: int = Field(128, ge=8, le=4096, description="Columns whose weights compete with each other.")


class Structured(Strict):
    """What the methods that remove FFN channels and attention heads have in common."""

    units: Literal["ffn", "attention", "both"] = Field(
        "ffn", description="What is removed: FFN channels, whole KV groups of attention (a key-value head with its query heads), or both."
    )


class Scored(Structured):
    """What the methods have in common that score every part once."""

    inputs: Literal["dense", "pruned"] = Field(
        "dense",
        description="Whether a block's parts are scored on what reaches it in the dense model, in one walk, or in the model whose earlier blocks are pruned, as Wanda does.",
    )
    multiple_of: int = Field(1, ge=1, le=1024, description="FFN widths are rounded to a multiple of this; the achieved sparsity is in the report.")


class CFSP(Scored):
    """Remove FFN channels, coarse to fine, from one forward pass (Wang et al., arXiv 2409.13199); here also KV groups, by the same scores."""

    name: Literal["cfsp"] = "cfsp"
    mode: Literal["combined", "paper", "code"] = Field(
        "combined",
        description="How a channel is scored: by the paper's three terms times its activation norm (`combined`, which measures best), by the paper's Eq. 8, "
        "or as the released code does, whose normalisation cancels and leaves the activation norm.",
    )


class FLAP(Scored):
    """Remove the FFN channels and KV groups whose inputs fluctuate least, ranked across the whole model (An et al., arXiv 2312.11983)."""

    name: Literal["flap"] = "flap"
    units: Literal["ffn", "attention", "both"] = Field(
        "both", description="What is removed: FFN channels, whole KV groups of attention, or both (as published)."
    )
    metric: Literal["wifv", "ifv", "wifn"] = Field(
        "wifv",
        description="A channel's score: fluctuation of its input times its weights' squared norm (`wifv`, as published), fluctuation alone, or Wanda's |weight| × input norm.",
    )
    mode: Literal["variance", "code"] = Field(
        "variance",
        description="Fluctuation as the sample variance (the paper), or as the released code computes it, where an alias lets the first sequence count nothing.",
    )
    compensate: bool = Field(True, description="Put what the removed inputs gave on average into biases, where the architecture has places for them.")


class Bonsai(Structured):
    """Remove FFN channels and KV groups in rounds, by what random sub-models without them lose; forward passes only (Dery et al., arXiv 2402.05406)."""

    name: Literal["bonsai"] = "bonsai"
    units: Literal["ffn", "attention", "both"] = Field(
        "both", description="What is removed: FFN channels, whole KV groups of attention, or both (as published)."
    )
    prior: Literal["wanda", "activation", "magnitude", "random"] = Field(
        "wanda",
        description="Which units may go in a round, and which of them sub-models lose more often: those of small |weight| × input norm (as published), small activation "
        "(the authors' `magnitude`), small weights, or any.",
    )
    prune_fraction: float = Field(0.05, gt=0, le=0.5, description="Removed in each round, as a share of the first model's parameters.")
    masks: int = Field(
        100, ge=0, le=10_000, multiple_of=2, description="Sub-models evaluated in each round (200 as published); 0: none, and the prior alone decides."
    )
    scope: Literal["global", "local"] = Field(
        "global",
        description="Whether all units are fitted and ranked together (as published), or each kind of each layer by itself, which then lose equal shares.",
    )
    mode: Literal["bayesian", "code"] = Field(
        "bayesian",
        description="`bayesian`: a fit that shrinks towards the prior as far as the sub-models don't speak against it; units ranked by worth per parameter, and a round ends early once its choice is stable. "
        "`code`: masks, regression, choice and tolerance of the released code.",
    )
    time_budget: float | None = Field(
        None, gt=0, description="Seconds that all sub-models together may take; a round that runs out of its share goes on with those that it has."
    )

    @model_validator(mode="after")
    def _has_masks_to_fit(self) -> Bonsai:
        if 0 < self.masks < 8:
            raise ValueError(f"{self.masks} masks are too few to fit a model to; give 8 or more, or 0 for the prior alone")
        return self

    def first_blocks(self, layers: int) -> list[int]:
        """The first block of each part of the model: a sub-model lacks units of one part, so what the blocks before it give is computed once a round.

        As released there is one part, and where each module is fitted by itself, which wants to be touched by all sub-models.
        """
        parts = 1 if self.mode == "code" or self.scope == "local" else min(PARTS, layers)
        return [-(-part * layers // parts) for part in range(parts)]


class Depth(Strict):
    """Remove whole decoder blocks: those that turn the hidden states least (block influence; Men et al., arXiv 2403.03853)."""

    name: Literal["depth"] = "depth"
    distance: Literal["angular", "cosine"] = Field("angular", description="Distance between a block's input and output, as a mean over tokens.")


class Experts(Strict):
    """Remove whole experts of a mixture: those whose outputs, weighted by the router, are smallest (Lasby et al., arXiv 2510.13999)."""

    name: Literal["experts"] = "experts"


MethodConfig = Annotated[Magnitude | Wanda | SparseGPT | CFSP | FLAP | Bonsai | Depth | Experts, Field(discriminator="name")]
MethodName = Literal["magnitude", "wanda", "sparsegpt", "cfsp", "flap", "bonsai", "depth", "experts"]


Method = Annotated[MethodConfig, BeforeValidator(expand_name, json_schema_input_type=MethodName | MethodConfig)]


# ---------------------------------------------------------------- allocation


class Uniform(Strict):
    """Every layer loses the same share."""

    name: Literal["uniform"] = "uniform"


class Coarse(Strict):
    """A layer keeps the more, the farther it moves the hidden states (CFSP's coarse importance)."""

    name: Literal["coarse"] = "coarse"
    distance: Literal["angular", "cosine", "mse", "mae"] = Field("angular", description="How far a layer moves a token.")
    strength: float = Field(1.0, ge=0, le=100, description="Slope of the sigmoid that turns importance into shares; 0 allots equal ones.")
    max_layer_share: float = Field(1.0, gt=0, le=1, description="The most of a layer that may stay.")


class Owl(Strict):
    """A layer keeps the more, the more outliers its Wanda scores hold (Yin et al., arXiv 2310.05175)."""

    name: Literal["owl"] = "owl"
    threshold: float = Field(5.0, gt=1, le=100, description="A score that exceeds the layer's mean by this factor is an outlier.")
    bound: float = Field(0.08, ge=0, le=0.5, description="The farthest that a layer's sparsity may lie from the average.")


class ZScore(Strict):
    """Channels and KV groups of all layers are ranked together, by scores standardised within each layer (FLAP)."""

    name: Literal["zscore"] = "zscore"


class Given(Strict):
    """The sparsity of every layer, given."""

    name: Literal["given"] = "given"
    sparsities: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        min_length=1, max_length=1000, description="Fraction to remove, layer by layer; their mean is the recipe's sparsity."
    )


ALLOCATIONS: dict[str, type[Uniform | Coarse | Owl | ZScore]] = {"uniform": Uniform, "coarse": Coarse, "owl": Owl, "zscore": ZScore}

AllocationConfig = Annotated[Uniform | Coarse | Owl | ZScore | Given, Field(discriminator="name")]
AllocationName = Literal["uniform", "coarse", "owl", "zscore"]
Allocation = Annotated[AllocationConfig, BeforeValidator(expand_name, json_schema_input_type=AllocationName | AllocationConfig)]


# --------------------------------------------------------------- restoration


class LeastSquares(Strict):
    """Fit the matrices behind what was removed anew, to give what the dense block gives on the pruned model's own inputs.

    Where an FFN's output is added to the hidden states as it is, the FFN also takes back a share of what the pruned model has drifted from the dense one so far.
    A share, since much of the drift is noise that the fit would learn by heart: in SmolLM2-135M a half takes the perplexity from 40.6 to 40.0.
    """

    name: Literal["least_squares"] = "least_squares"
    ridge: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Strength of the penalty on changes, relative to the noise of an estimate from so many tokens; chosen for each linear by cross-validation if left out.",
    )
    drift: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the pruned model's distance from the dense one, before an FFN, that the FFN is fitted to take back; 0 saves a pass.",
    )
    reselect: bool = Field(
        False,
        description="Whether methods that score channels give up, of those with the lowest scores, half as many again as go, the ones that the others can make up for best. "
        "On SmolLM2-135M without 20% of its FFNs that takes the perplexity from 40.6 to 40.2, from 41.9 to 41.6 with layers alike; the time it takes grows with the cube of an FFN's width.",
    )


class Swaps(Strict):
    """Exchange kept and removed weights within a row, one pair at a time, wherever that lowers the layer's output error."""

    name: Literal["swaps"] = "swaps"
    rounds: int = Field(10, ge=1, le=1000, description="Exchanges a row at most.")


RestorationConfig = Annotated[LeastSquares | Swaps, Field(discriminator="name")]
RestorationName = Literal["least_squares", "swaps"]
Restoration = Annotated[RestorationConfig, BeforeValidator(expand_name, json_schema_input_type=RestorationName | RestorationConfig)]


# --------------------------------------------------------------------- facts


class MethodFacts(Strict):
    """What `/v1/methods` tells of a method besides its parameters."""

    paper: str = Field(description="Where the method was published.")
    prunes: str = Field(description="What it removes.")
    denominator: Literal["ffn", "attention", "decoder", "non_embedding", "blocks", "experts"] = Field(
        description="What a plain `sparsity` number is a fraction of."
    )
    patterns: bool = Field(description="Whether N:M patterns are possible.")
    calibrates: bool = Field(description="Whether it reads calibration text.")
    structured: bool = Field(description="Whether the checkpoint gets smaller (true) or holds zeros (false).")
    streams: bool = Field(description="Whether memory depends on one block and not on the model.")
    allocation: AllocationName | None = Field(
        description="How layers share the sparsity where the recipe doesn't say and the layout lets them differ; null where the method leaves no choice."
    )
    restorations: tuple[RestorationName, ...] = Field(description="What can follow it without training.")
    model_types: tuple[str, ...] = Field(MODEL_TYPES, description="Values of `model_type` in config.json that it supports.")


_WEIGHTS = "weights of decoder linears"

METHODS: dict[str, tuple[type[Strict], MethodFacts]] = {
    "magnitude": (
        Magnitude,
        MethodFacts(
            paper="Han et al. 2015, arXiv 1506.02626",
            prunes=_WEIGHTS,
            denominator="decoder",
            patterns=True,
            calibrates=False,
            structured=False,
            streams=True,
            allocation="uniform",
            restorations=("swaps",),
        ),
    ),
    "wanda": (
        Wanda,
        MethodFacts(
            paper="Sun et al. 2023, arXiv 2306.11695",
            prunes=_WEIGHTS,
            denominator="decoder",
            patterns=True,
            calibrates=True,
            structured=False,
            streams=True,
            allocation="uniform",
            restorations=("swaps",),
        ),
    ),
    "sparsegpt": (
        SparseGPT,
        MethodFacts(
            paper="Frantar & Alistarh 2023, arXiv 2301.00774",
            prunes=_WEIGHTS,
            denominator="decoder",
            patterns=True,
            calibrates=True,
            structured=False,
            streams=True,
            allocation="uniform",
            restorations=(),
        ),
    ),
    "cfsp": (
        CFSP,
        MethodFacts(
            paper="Wang et al. 2024, arXiv 2409.13199",
            prunes="FFN channels",
            denominator="ffn",
            patterns=False,
            calibrates=True,
            structured=True,
            streams=True,
            allocation="coarse",
            restorations=("least_squares",),
        ),
    ),
    "flap": (
        FLAP,
        MethodFacts(
            paper="An et al. 2023, arXiv 2312.11983",
            prunes="FFN channels and KV groups",
            denominator="decoder",
            patterns=False,
            calibrates=True,
            structured=True,
            streams=True,
            allocation="zscore",
            restorations=("least_squares",),
        ),
    ),
    "bonsai": (
        Bonsai,
        MethodFacts(
            paper="Dery et al. 2024, arXiv 2402.05406",
            prunes="FFN channels and KV groups",
            denominator="non_embedding",
            patterns=False,
            calibrates=True,
            structured=True,
            streams=True,
            allocation=None,
            restorations=("least_squares",),
            model_types=tuple(name for name, architecture in ARCHITECTURES.items() if architecture.experts is None),
        ),
    ),
    "depth": (
        Depth,
        MethodFacts(
            paper="Men et al. 2024, arXiv 2403.03853",
            prunes="decoder blocks",
            denominator="blocks",
            patterns=False,
            calibrates=True,
            structured=True,
            streams=True,
            allocation=None,
            restorations=(),
        ),
    ),
    "experts": (
        Experts,
        MethodFacts(
            paper="Lasby et al. 2025, arXiv 2510.13999",
            prunes="experts",
            denominator="experts",
            patterns=False,
            calibrates=True,
            structured=True,
            streams=True,
            allocation=None,
            restorations=(),
            model_types=("mixtral", "qwen3_moe"),
        ),
    ),
}

# What a plain number is a fraction of, where a structured method can be told what to remove.
UNIT_DENOMINATORS: dict[str, Literal["ffn", "attention", "decoder"]] = {"ffn": "ffn", "attention": "attention", "both": "decoder"}


# ---------------------------------------------------------------- everything else


class Calibration(Strict):
    """The text that a method measures activations on."""

    source: str = Field(
        "c4",
        min_length=1,
        max_length=1024,
        description="A bundled text (`c4`, `wiki`) or the path of a .txt or .jsonl file below a root that the operator allows.",
    )
    samples: int = Field(32, ge=1, le=65536, description="Sequences drawn at random offsets.")
    sequence_length: int = Field(512, ge=8, le=131072, description="Tokens a sequence.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the offsets.")


class Evaluation(Strict):
    """What is measured before and after: perplexity and speed."""

    source: str = Field("wiki", min_length=1, max_length=1024, description="Text for perplexity: a bundled name or an allowed path, as for calibration.")
    windows: int = Field(24, ge=1, le=65536, description="Consecutive windows from the start of the text.")
    sequence_length: int = Field(512, ge=8, le=131072, description="Tokens a window.")
    speed: bool = Field(True, description="Measure prefill and decode tokens/s.")


class Output(Strict):
    """How the checkpoint is written."""

    layout: Literal["uniform", "per_layer"] = Field(
        "uniform",
        description="`uniform`: every layer has the same width and any loader takes it. `per_layer`: widths differ by layer, as the methods were published; needs `import espalier.loader`.",
    )
    padded: bool = Field(False, description="With `per_layer`: also write a copy zero-padded to the widest layer, which any loader takes.")
    dtype: Literal["source", "float32", "bfloat16", "float16"] = Field("source", description="Type of the stored weights; computation is in float32 on CPU.")


class Limits(Strict):
    """Bounds on a job."""

    max_attempts: int = Field(3, ge=1, le=20, description="Times that the job may be started when its worker dies.")
    max_runtime: int = Field(24 * 3600, ge=1, le=30 * 24 * 3600, description="Seconds that the job may run, all attempts together.")
    max_pending: int | None = Field(
        None, ge=1, le=30 * 24 * 3600, description="Seconds within which its first attempt must begin, or the job fails; null: no bound."
    )
    resume: Literal["local", "durable"] = Field(
        "local",
        description="Where an attempt leaves what the next one goes on from. `local`: on its worker's disk. `durable`: in the object store too, so that any worker goes on.",
    )


class Recipe(Strict):
    """A pruning job. `model`, `method` and `sparsity` suffice; everything else has a default."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        json_schema_extra={"examples": [{"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "method": "cfsp", "sparsity": 0.3}]},
    )

    model: str | None = Field(
        None,
        min_length=1,
        max_length=1024,
        description="A hub id, or the path of a local checkpoint below a root that the operator allows.",
        examples=["HuggingFaceTB/SmolLM2-135M"],
    )
    method: Method = Field(description="A method's name, or an object with its own parameters.", examples=["cfsp", {"name": "wanda", "variant": True}])
    sparsity: Sparsity = Field(description="How much to remove: a fraction, an N:M pattern, or an object that names its denominator.", examples=[0.3, "2:4"])
    allocation: Allocation | None = Field(
        None, description="How layers share the sparsity; null: as the method was published, or evenly where the layout wants layers alike.", examples=["owl"]
    )
    restoration: Restoration | None = Field(None, description="What makes up for the loss without training.", examples=["least_squares"])
    recovery: Recovery | None = Field(None, description="How what pruning lost is trained back; null: not at all.", examples=["lora"])
    calibration: Calibration = Field(Calibration(), description="The text that the method measures activations on.")
    evaluation: Evaluation | None = Field(Evaluation(), description="What is measured before and after; `null` skips it.")
    output: Output = Field(Output(), description="Layout and dtype of the checkpoint.")
    limits: Limits = Field(Limits(), description="Bounds on the job.")

    @property
    def facts(self) -> MethodFacts:
        """What is known of the recipe's method."""
        return METHODS[self.method.name][1]

    @property
    def denominator(self) -> str:
        """What a plain sparsity is a fraction of."""
        return UNIT_DENOMINATORS[self.method.units] if isinstance(self.method, Scored) else self.facts.denominator

    @property
    def calibrates(self) -> bool:
        """Whether anything is measured on the calibration text."""
        return self.facts.calibrates or self.restoration is not None or not isinstance(self.allots, Uniform | Given)

    @property
    def rounds(self) -> int:
        """How often the model is pruned and recovered."""
        return self.method.rounds if isinstance(self.method, Magnitude) else 1

    @property
    def allots(self) -> AllocationConfig:
        """How layers share the sparsity: as asked, else as the method was published and the layout allows."""
        if self.allocation is not None:
            return self.allocation
        if self.facts.allocation is None or (self.facts.structured and self.output.layout == "uniform"):
            return Uniform()
        return ALLOCATIONS[self.facts.allocation]()

    @property
    def texts(self) -> dict[str, str]:
        """Every text that the job reads, by the pointer to the field that names it."""
        named = {"/calibration": self.calibration, "/evaluation": self.evaluation, "/recovery": self.recovery}
        return {f"{pointer}/source": part.source for pointer, part in named.items() if part is not None and part.source is not None}

    @property
    def trains_on(self) -> str | None:
        """The text of the recovery; null where nothing is trained."""
        return None if self.recovery is None else self.recovery.source or self.calibration.source

    @property
    def trains_head(self) -> bool:
        """Whether the recovery changes the head, which is then stored apart from the embedding."""
        recovery = self.recovery
        return (isinstance(recovery, LoRA) and recovery.head) or (isinstance(recovery, Perp) and "head" in recovery.train and not recovery.reconstructs)

    @model_validator(mode="after")
    def _method_can_do_it(self) -> Recipe:
        facts, name = self.facts, self.method.name
        if isinstance(self.sparsity, Pattern) and not facts.patterns:
            raise ValueError(f"{name} removes {facts.prunes}, so the pattern {self.sparsity} is not possible; give a fraction")
        if isinstance(self.sparsity, Budget):
            if not facts.structured:
                raise ValueError(f"{name} keeps all shapes, so no budget bounds its result; give a fraction")
            if self.sparsity.max_perplexity_increase is not None and self.evaluation is None:
                raise ValueError("max_perplexity_increase is measured on the evaluation text; leave evaluation in")
        if not facts.structured and self.output.layout == "per_layer":
            raise ValueError(f"{name} keeps all shapes, so there is no per_layer layout; leave output.layout out")
        if facts.allocation is None and self.output.layout == "per_layer" and not isinstance(self.method, Bonsai):
            raise ValueError(f"{name} removes whole {facts.prunes}, so all layers stay alike and there is no per_layer layout; leave output.layout out")
        if self.output.padded and self.output.layout != "per_layer":
            raise ValueError("output.padded adds a copy to the per_layer layout; set output.layout to 'per_layer'")
        return self

    @model_validator(mode="after")
    def _rounds_fit(self) -> Recipe:
        if isinstance(self.method, Bonsai):
            if isinstance(self.sparsity, Budget):
                raise ValueError("bonsai measures anew in every round towards a fraction, so no bound can be tried out; give a fraction")
            if self.method.mode == "code" and self.output.layout == "uniform":
                raise ValueError("the released code takes different numbers from each layer; set output.layout to 'per_layer', or method.mode to 'bayesian'")
        if self.rounds > 1:
            if self.recovery is None:
                raise ValueError("without training between them, rounds remove what one would; give recovery, or set method.rounds to 1")
            if isinstance(self.sparsity, Pattern):
                raise ValueError(f"rounds go step by step, and no steps lead to the pattern {self.sparsity}; give a fraction, or set method.rounds to 1")
            if not isinstance(self.allots, Uniform):
                raise ValueError("shares allotted anew in each round could give back what an earlier one took; leave allocation out, or set method.rounds to 1")
            if self.restoration is not None:
                raise ValueError("a restoration could give back weights that an earlier round took; leave restoration out, or set method.rounds to 1")
        return self

    @model_validator(mode="after")
    def _allocation_fits(self) -> Recipe:
        allocation = self.allocation
        if allocation is None or isinstance(allocation, Uniform):
            return self
        if self.facts.allocation is None:
            raise ValueError(f"{self.method.name} leaves nothing to allot; leave allocation out")
        if isinstance(self.sparsity, Pattern):
            raise ValueError(f"the pattern {self.sparsity} is the same in every layer; leave allocation out")
        if self.facts.structured and self.output.layout == "uniform":
            raise ValueError("the uniform layout gives every layer the same width; set output.layout to 'per_layer', or leave allocation out")
        if isinstance(allocation, Given):
            if not isinstance(self.sparsity, Fraction) or self.sparsity.of != "method":
                raise ValueError("a given allocation says all sparsities itself; give sparsity as the plain number that is their mean")
            mean = sum(allocation.sparsities) / len(allocation.sparsities)
            if abs(mean - self.sparsity.fraction) > 0.005:
                raise ValueError(f"the mean of allocation.sparsities is {mean:.4f}, but sparsity is {self.sparsity.fraction}; make them equal")
        return self

    @model_validator(mode="after")
    def _restoration_fits(self) -> Recipe:
        if self.restoration is not None and self.restoration.name not in self.facts.restorations:
            possible = " or ".join(self.facts.restorations) or "none"
            raise ValueError(f"restoration '{self.restoration.name}' can't follow {self.method.name}; possible: {possible}")
        return self

    @model_validator(mode="after")
    def _recovery_fits(self) -> Recipe:
        recovery = self.recovery
        if isinstance(recovery, Perp) and recovery.reconstructs and isinstance(self.method, Depth):
            raise ValueError("the blocks that depth keeps stay as they are, so there is nothing to reconstruct; set recovery.mode to 'retrain'")
        if self.evaluation is not None and self.trains_on == self.evaluation.source:
            raise ValueError(f"'{self.trains_on}' is what the result is evaluated on, so it can't be trained on; give recovery another source")
        bounded = isinstance(self.sparsity, Budget) and self.sparsity.max_perplexity_increase is None
        if self.trains_head and bounded:
            raise ValueError(
                "a trained head is stored apart from the embedding, so the budget on size would not hold; set recovery.head to false, or leave head out of perp's train"
            )
        return self
