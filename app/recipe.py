"""The contract of a job: what to prune, how, on which text, and what to write. Free of torch, so that the API validates it and OpenAPI documents it.

The body of `POST /v1/jobs`, the file that `python -m worker.pipeline` reads, and the recipe in a model card are all a `Recipe`.
Short forms are accepted and expanded: `"method": "cfsp"`, `"sparsity": 0.3`, `"sparsity": "2:4"`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

BUNDLED_TEXTS = ("c4", "wiki")

# A hub id ("owner/name" or "name") by the hub's own rules; a path is accepted where the caller allows one.
MODEL_ID = re.compile(r"(?!.*(?:\.\.|--))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    is_pattern = isinstance(value, Pattern) or (isinstance(value, dict) and not value.keys().isdisjoint({"n", "m"}))
    return "Pattern" if is_pattern else "Fraction"


SparsityShort = float | Annotated[str, Field(pattern=r"^\d{1,2}:\d{1,2}$")]
Sparsity = Annotated[
    Annotated[Fraction, Tag("Fraction")] | Annotated[Pattern, Tag("Pattern")],
    Discriminator(_sparsity_kind),
    BeforeValidator(_expand_sparsity, json_schema_input_type=SparsityShort | Fraction | Pattern),
]


# ------------------------------------------------------------------- methods


class Magnitude(Strict):
    """Remove the weights of smallest absolute value (Han et al. 2015). Needs no calibration text."""

    name: Literal["magnitude"] = "magnitude"
    compare: Literal["matrix", "row"] = Field("matrix", description="Weights compete within their matrix (as published) or within their output row.")


class Wanda(Strict):
    """Remove the weights of smallest |weight| × input norm, compared within each output row (Sun et al., arXiv 2306.11695)."""

    name: Literal["wanda"] = "wanda"
    variant: bool = Field(
        False,
        description="The authors' `use_variant`: each row drops its lowest scores up to one share of the row's score sum, found by bisection so that the matrix meets the target.",
    )


class CFSP(Strict):
    """Remove FFN channels, coarse to fine, from one forward pass (Wang et al., arXiv 2409.13199)."""

    name: Literal["cfsp"] = "cfsp"
    mode: Literal["combined", "paper", "code"] = Field(
        "combined",
        description="How a channel is scored: by the paper's three terms times its activation norm (`combined`, which measures best), by the paper's Eq. 8, "
        "or as the released code does, whose normalisation cancels and leaves the activation norm.",
    )
    coarse: Literal["angular", "cosine", "mse", "mae", "uniform"] = Field(
        "angular",
        description="Distance between a block's input and output that allots width to blocks. Without effect in the `uniform` layout, where all blocks get the same width.",
    )
    allocation_strength: float = Field(1.0, ge=0, le=100, description="Slope of the sigmoid that turns coarse importance into width; 0 allots equal widths.")
    max_layer_width: float = Field(1.0, gt=0, le=1, description="Upper bound of a layer's width, as a fraction of its original width.")
    multiple_of: int = Field(1, ge=1, le=1024, description="Widths are rounded to a multiple of this; the achieved sparsity is in the report.")


MethodConfig = Annotated[Magnitude | Wanda | CFSP, Field(discriminator="name")]
MethodName = Literal["magnitude", "wanda", "cfsp"]


def _expand_method(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Method = Annotated[MethodConfig, BeforeValidator(_expand_method, json_schema_input_type=MethodName | MethodConfig)]


class MethodFacts(Strict):
    """What `/v1/methods` tells of a method besides its parameters."""

    paper: str = Field(description="Where the method was published.")
    prunes: str = Field(description="What it removes.")
    denominator: Literal["ffn", "decoder"] = Field(description="What a plain `sparsity` number is a fraction of.")
    patterns: bool = Field(description="Whether N:M patterns are possible.")
    calibrates: bool = Field(description="Whether it reads calibration text.")
    structured: bool = Field(description="Whether the checkpoint gets smaller (true) or holds zeros (false).")
    streams: bool = Field(description="Whether memory depends on one block and not on the model.")
    model_types: tuple[str, ...] = Field(MODEL_TYPES, description="Values of `model_type` in config.json that it supports.")


METHODS: dict[str, tuple[type[Strict], MethodFacts]] = {
    "magnitude": (
        Magnitude,
        MethodFacts(
            paper="Han et al. 2015, arXiv 1506.02626",
            prunes="weights of decoder linears",
            denominator="decoder",
            patterns=True,
            calibrates=False,
            structured=False,
            streams=True,
        ),
    ),
    "wanda": (
        Wanda,
        MethodFacts(
            paper="Sun et al. 2023, arXiv 2306.11695",
            prunes="weights of decoder linears",
            denominator="decoder",
            patterns=True,
            calibrates=True,
            structured=False,
            streams=True,
        ),
    ),
    "cfsp": (
        CFSP,
        MethodFacts(
            paper="Wang et al. 2024, arXiv 2409.13199", prunes="FFN channels", denominator="ffn", patterns=False, calibrates=True, structured=True, streams=True
        ),
    ),
}


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
    max_runtime: int = Field(24 * 3600, ge=1, le=30 * 24 * 3600, description="Seconds that one attempt may run.")


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
    calibration: Calibration = Field(Calibration(), description="The text that the method measures activations on.")
    evaluation: Evaluation | None = Field(Evaluation(), description="What is measured before and after; `null` skips it.")
    output: Output = Field(Output(), description="Layout and dtype of the checkpoint.")
    limits: Limits = Field(Limits(), description="Bounds on the job.")

    @model_validator(mode="after")
    def _method_can_do_it(self) -> Recipe:
        facts = METHODS[self.method.name][1]
        if isinstance(self.sparsity, Pattern) and not facts.patterns:
            raise ValueError(f"{self.method.name} removes {facts.prunes}, so the pattern {self.sparsity} is not possible; give a fraction")
        if not facts.structured and self.output.layout == "per_layer":
            raise ValueError(f"{self.method.name} keeps all shapes, so there is no per_layer layout; leave output.layout out")
        if self.output.padded and self.output.layout != "per_layer":
            raise ValueError("output.padded adds a copy to the per_layer layout; set output.layout to 'per_layer'")
        return self
