"""What a job holds in memory and on disk, told from its recipe and the checkpoint's headers. All sizes are bytes.

The tensors that the engine has at once are counted, phase by phase; the largest phase is what a job needs. What no header tells is in a few constants, which
were measured with the CPU build of torch 2.13 on Linux. `python -m benchmarks.estimate` compares all of it with what the engine takes.

Notation: C inputs of a linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from app.architecture import ARCHITECTURES
from app.counting import count_parameters, fraction_of
from app.recipe import Bonsai, Budget, Coarse, LeastSquares, Owl, Recipe, Scored, SparseGPT, Structured, Swaps, Wanda, ZScore
from app.recovery import Full, LoRA, Perp, Training
from app.report import Parameters
from app.source import FLOAT_BYTES, TOKENIZER_FILES, Source

LIBRARIES = 270_000_000  # torch, transformers and what they import, in a process that has not computed anything
WARM = 50_000_000  # buffers of threads and kernels, and the heap's holes, once it has
DRIVER = 500_000_000  # CUDA's own on a device
PASSING_BYTES = 128 * 2**20  # hidden states up to this size stay on a device during a pass that nothing goes on from
PER_TOKENIZER_BYTE = 18  # while tokenizer.json is read
PER_TEXT_BYTE, KEPT_PER_TEXT_BYTE = 135, 25  # while a text is tokenised, and afterwards
BUNDLED_TEXT_BYTES = {"c4": 332_173, "wiki": 2_093_275}

# The engine's own numbers; a test compares them.
TOKENS_AT_ONCE = 1024
TOKENS_PER_HEAD = 256
HEAD_ROWS_AT_ONCE = 4096
TOKENS_CHECKED = 128
TOKENS_TAUGHT_AT_ONCE = 1 << 16
BLOCKS_CHECKED = 3
MAPPED_BYTES = 4 << 20  # from which on a tensor goes back to the system when it is freed
PUBLISHED_SHARE = 0.0035  # of all parameters, that PERP trains at most
SWAP_TENSORS = 15 * 4 * 2**21  # a handful of intermediate tensors of a few rows
F32 = 4  # bytes
HEADER_BYTES = 100  # about what a tensor's entry takes in a shard's header


def training_bytes(parameters: int, trained: int) -> int:
    """Float32 weights, and of those that are trained gradients and AdamW's two moments."""
    return F32 * parameters + 3 * F32 * trained


@dataclass(frozen=True)
class Footprint:
    """What a job holds at its peak."""

    host: dict[str, int]  # anonymous memory of the engine and of what it starts, phase by phase, where it computes on the CPU
    device: int  # memory of a GPU, if the worker has one
    disk: int  # work directory and output folder together; finished shards count once, since the output is a second name of them
    output: int  # the checkpoint; at most, where only a bound on the perplexity says what is removed


def footprint(recipe: Recipe, source: Source, text_bytes: Mapping[str, int]) -> Footprint:
    """Raises RecipeError for a target that is more than there is.

    `text_bytes` are the sizes of the texts that the recipe names by a path; one that is left out counts as the larger of the bundled ones. Memory mapped from
    files doesn't count: the system takes it back. The result is tried in a fresh process, here of its first, middle and last block alone; where the whole model
    fits in memory, it is tried whole.
    """
    sizes = sizes_of(source)
    host, on_device = _host_by_phase(recipe, sizes, text_bytes), _tensors_by_phase(recipe, sizes, on_device=True)
    return Footprint(host, DRIVER + max(on_device.values()), _disk_bytes(recipe, sizes), _output_bytes(recipe, sizes))


# ------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Sizes:
    """What memory depends on, in numbers of entries where nothing else is said."""

    block: int  # parameters of the largest block
    groups: list[tuple[int, int, int]]  # of its linears that share an input: C, parameters, those of the largest among them
    ffn: int  # weights around FFN channels, in the largest block
    output: int  # weights of the attention's output
    layers: int
    hidden: int
    width: int  # of the FFN's channels, or of each expert's
    routed: int  # experts that a token passes; 1 where there are none
    heads: int
    vocab: int
    embedding: int
    dense: Parameters
    outer: int  # parameters outside the blocks
    per_rank: int  # of adapters at all linears, for each rank
    item: int  # bytes of a stored entry
    is_f32: bool
    softcapped: bool
    tied: bool
    fused: bool  # whether transformers holds experts in other matrices than are stored
    tensors: int  # in the files
    weight_bytes: int  # of the files
    tokenizer_bytes: int

    @property
    def linears(self) -> int:
        return sum(parameters for _, parameters, _ in self.groups)

    @property
    def head(self) -> int:
        return self.vocab * self.embedding


def sizes_of(source: Source) -> Sizes:
    architecture, config = ARCHITECTURES[source.model_type], source.config
    size = architecture.dimensions(config)
    counts = {name: math.prod(entry.shape) for name, entry in source.tensors.items()}
    blocks = [0] * size.layers
    for name, count in counts.items():
        if name.startswith(f"{architecture.blocks}."):
            blocks[int(name.removeprefix(f"{architecture.blocks}.").partition(".")[0])] += count
    index = blocks.index(max(blocks))
    prefix = architecture.block_prefix(index)
    groups, per_rank = [], 0
    for linears in architecture.inputs(config, index):
        weights = [counts[f"{prefix}{linear}.weight"] for linear in linears]
        shape = source.tensors[f"{prefix}{linears[0]}.weight"].shape
        inputs = shape[0 if architecture.transposed else 1]
        groups.append((inputs, sum(weights), max(weights)))
        per_rank += size.layers * sum(inputs + weight // inputs for weight in weights)
    output = source.tensors[f"{prefix}{architecture.attention.output}.weight"]
    return Sizes(
        block=blocks[index],
        groups=groups,
        ffn=sum(counts[f"{prefix}{linear}.weight"] for mlp in architecture.mlps(config, index) for linear in mlp.linears),
        output=math.prod(output.shape),
        layers=size.layers,
        hidden=size.hidden,
        width=max(architecture.ffn_width(config, layer) for layer in range(size.layers)),
        routed=max(1, architecture.experts_per_token(config)),
        heads=size.heads,
        vocab=size.vocab,
        embedding=size.embedding,
        dense=count_parameters(source, []),
        outer=sum(counts.values()) - sum(blocks),
        per_rank=per_rank,
        item=FLOAT_BYTES[output.dtype],
        is_f32=output.dtype == "F32",
        softcapped=bool(config.get("attn_logit_softcapping")),
        tied=architecture.tied(config),
        fused=architecture.experts is not None,
        tensors=len(source.tensors),
        weight_bytes=source.weight_bytes,
        tokenizer_bytes=sum((source.folder / name).stat().st_size for name in TOKENIZER_FILES if (source.folder / name).is_file()),
    )


# ------------------------------------------------------------------------ memory


def _host_by_phase(recipe: Recipe, sizes: Sizes, text_bytes: Mapping[str, int]) -> dict[str, int]:
    texts = [text_bytes.get(name, BUNDLED_TEXT_BYTES.get(name, max(BUNDLED_TEXT_BYTES.values()))) for name in recipe.texts.values()]
    resting = LIBRARIES + WARM + KEPT_PER_TEXT_BYTE * sum(texts)
    loading = max(PER_TOKENIZER_BYTE * sizes.tokenizer_bytes, WARM + PER_TEXT_BYTE * max(texts, default=0))
    phases = {phase: resting + held for phase, held in _tensors_by_phase(recipe, sizes, on_device=False).items()}
    return {"load": LIBRARIES + loading} | phases | {"verify": phases["verify"] + LIBRARIES + WARM}


def _tensors_by_phase(recipe: Recipe, sizes: Sizes, *, on_device: bool) -> dict[str, int]:
    """What is computed with, on the device or on the host. On the host, float32 weights are used as they lie in the mapped file."""
    cast = F32 if on_device or not sizes.is_f32 else 0
    head = sizes.item * sizes.head if on_device else 0
    own_cast = F32 if on_device or _item_written(recipe, sizes) != F32 else 0

    def passed(windows: int, length: int, cast: int = cast) -> int:
        states = _states(sizes, windows, length, 1) if on_device else 0
        return states + max(cast * sizes.block + _activations(sizes, windows, length), head + _logits(sizes, min(length, TOKENS_PER_HEAD)))

    checked = round(left_of_blocks(recipe, sizes) * min(BLOCKS_CHECKED, sizes.layers) * sizes.block) + sizes.outer
    trial = own_cast * checked + head + 2 * F32 * TOKENS_CHECKED * sizes.vocab
    held = {"prune": _pruning(recipe, sizes, cast, on_device=on_device), "verify": max(trial, passed(1, TOKENS_CHECKED, own_cast))}
    evaluation, recovery = recipe.evaluation, recipe.recovery
    if evaluation is not None:
        held |= {"evaluate_dense": passed(evaluation.windows, evaluation.sequence_length)}
        of_result = passed(evaluation.windows, evaluation.sequence_length, own_cast)
        held |= {"evaluate": of_result} | ({"evaluate_pruned": of_result} if recovery is not None else {})
    if isinstance(recovery, Perp) and recovery.reconstructs:
        held["recover"] = _reconstruction(recipe, recovery, sizes, cast)
    elif recovery is not None:
        held["recover"] = _training(recipe, recovery, sizes, on_device=on_device)
        if recovery.distillation is not None:
            held["teach"] = passed(recovery.windows[0], recovery.sequence_length)
    order = ("evaluate_dense", "prune", "evaluate_pruned", "teach", "recover", "evaluate", "verify")
    return {phase: held[phase] for phase in order if phase in held}


def _activations(sizes: Sizes, windows: int, length: int) -> int:
    """Of the tokens that pass a block at once: three of the FFN's channels, or of an expert that gets them all, and some hidden states."""
    tokens = min(windows * length, max(length, TOKENS_AT_ONCE))
    scores = 2 * tokens * sizes.heads * length if sizes.softcapped else 0  # which nothing fused computes
    return F32 * (tokens * (3 * sizes.width + 4 * sizes.hidden) + scores)


def _states(sizes: Sizes, windows: int, length: int, begun: int) -> int:
    """Hidden states on a device: so many that passes begin with, and two rooms for a pass."""
    room = F32 * windows * length * sizes.hidden
    return (begun + 2) * room if room <= PASSING_BYTES else 0


def _logits(sizes: Sizes, tokens: int) -> int:
    """Logits of some tokens, their probabilities, and the part of the head's matrix that is float32."""
    rows = 0 if sizes.is_f32 else min(HEAD_ROWS_AT_ONCE, sizes.vocab) * sizes.embedding
    return F32 * (2 * tokens * sizes.vocab + rows)


# ----------------------------------------------------------------------- pruning


def _pruning(recipe: Recipe, sizes: Sizes, cast: int, *, on_device: bool) -> int:
    calibration = recipe.calibration
    activations = _activations(sizes, calibration.samples, calibration.sequence_length) if recipe.calibrates else 0
    surveyed = _surveying(recipe, sizes, cast, activations)
    if not recipe.facts.structured:
        masked = _masking(recipe, sizes, cast, activations)
        return max(masked, surveyed) if walks_twice(recipe) else masked
    sliced = round(left_of_blocks(recipe, sizes) * sizes.item * sizes.block)
    if isinstance(recipe.method, Bonsai):
        head = _logits(sizes, min(calibration.sequence_length, TOKENS_PER_HEAD))
        if on_device:  # which holds the blocks from one sub-model to the next
            begun = len(recipe.method.first_blocks(sizes.layers))
            held = sizes.item * (sizes.layers * sizes.block + sizes.head) + _states(sizes, calibration.samples, calibration.sequence_length, begun)
            return held + max(surveyed, head)
        surveyed = sliced + max(surveyed + _choosing(recipe.method, sizes), head)
    in_turn = recipe.restoration is not None or (isinstance(recipe.method, Scored) and recipe.method.inputs == "pruned")
    slicing = _slicing_in_turn(recipe, sizes, cast, activations, sliced) if in_turn else sliced + _written_copy(recipe, sizes)
    return max(surveyed, slicing)


def walks_twice(recipe: Recipe) -> bool:
    """Whether a method that sets zeros measures the dense model first, to allot them."""
    return not recipe.facts.structured and isinstance(recipe.allots, Coarse | Owl | ZScore)


def _surveying(recipe: Recipe, sizes: Sizes, cast: int, activations: int) -> int:
    """The larger of a block that runs and weights that are scored, beside those that were scored of the block before."""
    method, largest = recipe.method, max(linear for _, _, linear in sizes.groups)
    if isinstance(recipe.allots, Owl):  # looks at all linears at once
        return cast * sizes.linears + max(cast * sizes.block + activations, F32 * (sizes.linears + largest))
    units = method.units if isinstance(method, Structured) else "both" if isinstance(recipe.allots, ZScore) else "none"
    scored = {"ffn": sizes.ffn, "attention": sizes.output, "both": sizes.ffn + sizes.output, "none": 0}[units]
    return cast * scored + max(cast * sizes.block + activations, 2 * F32 * min(largest, scored))


def _choosing(method: Bonsai, sizes: Sizes) -> int:
    """Masks over all units, and in float64 the differences of their pairs at the candidates, twice what a round removes, some four times over."""
    units = sizes.layers * sizes.width
    return round(method.masks * units + 4 * 8 * method.masks / 2 * units * min(1.0, 2 * method.prune_fraction))


def _masking(recipe: Recipe, sizes: Sizes, cast: int, activations: int) -> int:
    """The larger of a block that runs and linears that are chosen from; in both, masks and pruned weights of a block are there, and those of a last linear."""
    method = recipe.method
    with_gram = isinstance(method, SparseGPT) or isinstance(recipe.restoration, Swaps)
    grams = F32 * sum(inputs**2 for inputs, _, _ in sizes.groups) if with_gram else 0
    pruned = (sizes.item + 1) * sizes.linears
    copies = (0 if sizes.is_f32 else F32) + (F32 if isinstance(method, SparseGPT) else 0)

    def choosing(inputs: int, weights: int, linear: int) -> int:
        scores = F32 * linear
        if isinstance(method, SparseGPT):
            scores = max(7 * F32 * inputs**2, F32 * inputs**2 + 3 * F32 * weights)
        elif isinstance(method, Wanda):
            scores += (20 if method.variant else 6) * linear  # all sorted and summed, or values and numbers of the half that stays
        else:
            scores += 2 * F32 * linear
        if isinstance(recipe.restoration, Swaps):
            scores = max(scores, 2 * F32 * inputs**2 + SWAP_TENSORS)
        return (cast + copies) * weights + scores

    last = (cast + copies) * sizes.groups[-1][1]
    running = cast * sizes.block + activations + last if recipe.calibrates else 0
    return pruned + grams + max(running, *(choosing(*group) for group in sizes.groups)) + _written_copy(recipe, sizes)


def _slicing_in_turn(recipe: Recipe, sizes: Sizes, cast: int, activations: int, sliced: int) -> int:
    """The larger of a block that runs and linears that are fitted, beside the inputs' Gram matrices and the sliced block before."""
    if not isinstance(recipe.restoration, LeastSquares):
        return _surveying(recipe, sizes, cast, activations) + 2 * sliced
    method, kept = recipe.method, left_of_blocks(recipe, sizes)
    assert isinstance(method, Structured)
    of_attention, of_ffn = sizes.output // sizes.hidden, sizes.groups[-1][0]
    widest = {"ffn": of_ffn, "attention": of_attention, "both": max(of_ffn, of_attention)}[method.units]
    grams, weights = F32 * widest**2, F32 * widest * sizes.hidden
    drift = 2 * weights if recipe.restoration.drift else 0
    measured = 1 if recipe.restoration.ridge else 2  # halves of the text, to choose the ridge by
    running = cast * sizes.block + activations + (1 + measured) * grams + kept * weights
    fitting = grams * (1 + measured + kept + 2 * kept**2) + weights * (1 + 2 * kept)
    choosing = grams * (3 + measured) + 2 * weights if isinstance(method, Scored) and recipe.restoration.reselect else 0
    return round(sliced + drift + max(running, fitting, choosing))


# ---------------------------------------------------------------------- training


def _training(recipe: Recipe, config: Training, sizes: Sizes, *, on_device: bool) -> int:
    """A model in float32, and the largest of a step, what the optimizer takes besides, and a merge, at which the heap still holds what small tensors left.

    On the host, weights that are stored in float32 are used as they lie in the file until they are written to, but for fused experts. Tensors are trained whole, masks or not.
    """
    parameters = _parameters_written(recipe, sizes)
    trained = trained_parameters(config, parameters, sizes)
    mapped = not on_device and _item_written(recipe, sizes) == F32 and not sizes.fused
    held = training_bytes(0 if mapped else parameters, trained) + (F32 * trained if mapped or not isinstance(config, Full) else 0)
    held += sizes.layers * sizes.linears if not recipe.facts.structured else 0  # masks
    held += 2 * trained if on_device else 0  # autocast's copies
    tokens = config.micro_batch * config.sequence_length
    logits, states = F32 * 4 * tokens * sizes.vocab, F32 * sizes.layers * tokens * sizes.hidden
    inside = F32 * tokens * (8 * sizes.routed * sizes.width + 16 * sizes.hidden)
    if _has_products(recipe, config):
        inside += 2 * F32 * sizes.linears  # the products beside the weights, and their gradients
    step = states + max(inside, logits) if config.gradient_checkpointing else sizes.layers * inside + logits
    optimizing = 2 * F32 * max(sizes.head, *(largest for _, _, largest in sizes.groups)) if isinstance(config, Full) or recipe.trains_head else 0
    merging = round(left_of_blocks(recipe, sizes) * F32 * sizes.layers * sizes.linears) + states + inside if mapped and not isinstance(config, Full) else 0
    holes = 0 if on_device or not _has_products(recipe, config) else _holes(sizes)
    loading = 0 if mapped or on_device else (F32 + _item_written(recipe, sizes)) * parameters  # as it is stored and as it is to be
    return max(loading, held + holes + max(step, optimizing, merging))


def _has_products(recipe: Recipe, config: Training) -> bool:
    """Whether products of adapters are computed whole beside the weights."""
    return (isinstance(config, Perp) and "adapters" in config.train) or (isinstance(config, LoRA) and not recipe.facts.structured)


def _holes(sizes: Sizes) -> int:
    """What the heap keeps of products that were beside the weights and are too small for mappings of their own."""
    small = sum(weights for _, weights, largest in sizes.groups if F32 * largest < MAPPED_BYTES)
    return 3 * F32 * sizes.layers * small // 2


def trained_parameters(config: Training, parameters: int, sizes: Sizes) -> int:
    """Those that a recovery trains of a model with so many."""
    if isinstance(config, LoRA):
        return config.rank * sizes.per_rank + (sizes.head if config.head else 0)
    if isinstance(config, Perp):
        adapters = max(sizes.per_rank, round(PUBLISHED_SHARE * parameters)) if config.rank is None else config.rank * sizes.per_rank
        return 2 * sizes.layers * sizes.hidden + (adapters if "adapters" in config.train else 0)
    return parameters


def _reconstruction(recipe: Recipe, config: Perp, sizes: Sizes, cast: int) -> int:
    """A block that trains, and what becomes of it when it is done."""
    tokens = config.micro_batch * config.sequence_length
    inside = F32 * tokens * (8 * sizes.routed * sizes.width + 16 * sizes.hidden)
    passed = _activations(sizes, config.samples, config.sequence_length)
    masks = 0 if recipe.facts.structured else sizes.linears
    return (F32 + cast + sizes.item) * sizes.block + masks + max(inside + 2 * F32 * sizes.linears, passed)


# -------------------------------------------------------------------------- disk


def _output_bytes(recipe: Recipe, sizes: Sizes) -> int:
    """Weights, masks and tokenizer, and the padded copy."""
    padded = _item_written(recipe, sizes) * sizes.dense.all + sizes.tokenizer_bytes if recipe.output.padded else 0
    return _weight_bytes(recipe, sizes) + _mask_bytes(recipe, sizes) + sizes.tokenizer_bytes + padded


def _disk_bytes(recipe: Recipe, sizes: Sizes) -> int:
    calibration, recovery = recipe.calibration, recipe.recovery
    weights = _weight_bytes(recipe, sizes)
    calibrated = _hidden_bytes(sizes, calibration.samples, calibration.sequence_length) if recipe.calibrates else 0
    evaluation = 2 * _hidden_bytes(sizes, recipe.evaluation.windows, recipe.evaluation.sequence_length) if recipe.evaluation else 0
    pruning = 2 * calibrated
    if isinstance(recipe.restoration, LeastSquares) and recipe.restoration.drift:
        pruning += 3 * calibrated
    sub_models = 0  # gone before blocks are written
    if isinstance(recipe.method, Bonsai) and recipe.method.masks:
        sub_models = (2 + len(recipe.method.first_blocks(sizes.layers))) * calibrated
    done, checked = pruning + _output_bytes(recipe, sizes), F32 * TOKENS_CHECKED * sizes.vocab
    if recovery is None:
        return max(done + max(evaluation, checked), pruning + sub_models)
    trained = trained_parameters(recovery, _parameters_written(recipe, sizes), sizes)
    windows, length = recovery.windows[0], recovery.sequence_length
    if isinstance(recovery, Perp) and recovery.reconstructs:
        training = 2 * _hidden_bytes(sizes, windows, length) + 2 * weights  # blocks gather beside the checkpoint, and then are written into it
    else:
        # The parameters with AdamW's moments, written beside what was saved before, and the best parameters; in the end the shards are written again.
        state, best = 3 * F32 * trained, F32 * trained if recovery.held_out else 0
        training = best + max(state * (2 if recovery.total_steps > recovery.checkpoint_every else 1), state + weights)
    taught = 0
    if recovery.distillation is not None:
        of_token = 2 * min(recovery.distillation.top_k, sizes.vocab) + 1 + (sizes.layers * sizes.hidden if recovery.distillation.hidden else 0)
        taught = F32 * windows * length * of_token
    earlier = weights if recipe.rounds > 1 else 0  # the checkpoint of the round before
    return done + max(evaluation, checked, training + taught) + earlier


def _hidden_bytes(sizes: Sizes, windows: int, length: int) -> int:
    """The hidden states of all windows between two blocks."""
    return F32 * windows * length * sizes.hidden


def _weight_bytes(recipe: Recipe, sizes: Sizes) -> int:
    """The result's weight files."""
    if isinstance(recipe.sparsity, Budget) and recipe.sparsity.target_bytes is not None:
        return min(recipe.sparsity.target_bytes, sizes.weight_bytes)
    return _item_written(recipe, sizes) * _parameters_written(recipe, sizes) + HEADER_BYTES * sizes.tensors


def _mask_bytes(recipe: Recipe, sizes: Sizes) -> int:
    return 0 if recipe.facts.structured else sizes.layers * sizes.linears // 8


def _item_written(recipe: Recipe, sizes: Sizes) -> int:
    """Bytes of an entry of the result."""
    return {"source": sizes.item, "float32": 4}.get(recipe.output.dtype, 2)


def _written_copy(recipe: Recipe, sizes: Sizes) -> int:
    """A block in the type that it is written in, where that is another one."""
    return 0 if recipe.output.dtype == "source" else _item_written(recipe, sizes) * sizes.block


# ------------------------------------------------------------------- what stays


def parameters_left(recipe: Recipe, sizes: Sizes) -> int:
    """Parameters that the pruned checkpoint stores; at most, where a bound on the perplexity says how many."""
    dense = sizes.dense
    if not recipe.facts.structured:
        return dense.all
    if isinstance(recipe.sparsity, Budget):
        if recipe.sparsity.target_bytes is not None:
            return min(dense.all, recipe.sparsity.target_bytes // sizes.item)
        return min(dense.all, recipe.sparsity.target_parameters or dense.all)
    of = {"ffn": dense.ffn, "experts": dense.ffn, "attention": dense.decoder - dense.ffn, "decoder": dense.decoder}.get(recipe.denominator, dense.non_embedding)
    return dense.all - round(fraction_of(recipe, dense) * of)


def _parameters_written(recipe: Recipe, sizes: Sizes) -> int:
    """Those of the result: a head that is trained by itself is stored by itself."""
    return parameters_left(recipe, sizes) + (sizes.head if recipe.trains_head and sizes.tied else 0)


def left_of_blocks(recipe: Recipe, sizes: Sizes) -> float:
    """The share of a block that stays, on average."""
    return 1 - (sizes.dense.all - parameters_left(recipe, sizes)) / sizes.dense.non_embedding
