"""Refines a mask by swaps: a pruned weight comes back and another weight of its row goes, as long as the error of the layer's output falls.

For the row w of a linear with inputs x and the Gram matrix G = E[x xᵀ], pruning loses L = eᵀ G e with e = w ∘ (1 - mask). With c = G e, bringing u back and
pruning p changes L by exactly

    Δ(u, p) = a_u + b_p - 2 w_u w_p G_up,    a_u = w_u² G_uu - 2 w_u c_u,    b_p = w_p² G_pp + 2 w_p c_p.

Rows don't touch each other, and weights keep their values.

Notation: R rows (outputs) and C columns (inputs) of a linear's weight, m inputs of a group, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST_GAIN = 1e-6  # of a row's first loss; float32 can't tell less from rounding
ELEMENTS = 2**21  # of the largest of a handful of intermediate tensors, 8 MiB each
SHORTLIST = 16  # candidates of each side that are tried first
ROWS = 8  # whose remaining candidates are tried at once
INTERVALS = 16  # in which a lower envelope is taken as straight

# A row's best pair: a, inf where the weight stays, b, inf where it doesn't, and w, all (R, C) -> Δ, u and p, all (R,).
BestPairs = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def row_losses(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """L of each row, the mean square over tokens of what its output loses: (R, C), (R, C), (C, C) -> (R,)."""
    lost = weight * ~mask
    return (lost @ gram * lost).sum(dim=1)


def refine(weight: Tensor, mask: Tensor, gram: Tensor, rounds: int, group: int | None = None) -> Tensor:
    """In each row, up to `rounds` times, swap the pair that lowers the row's loss the most: (R, C), (R, C) bool, (C, C) -> the new mask.

    The pair is the best of all of the row or, with `group` = m, of those within m consecutive inputs, so that N:M stays N:M. Rows keep as many weights as
    before. A row whose best swap gains less than a millionth of its first loss is done: no single swap improves it.

    A round takes some 60 passes over R × C and the K × K pairs of each row that bounds on Δ can't rule out, K < 100 as a rule and C / 2 at worst; with
    `group`, R × C × m. One product R × C × C comes first.

    Raises ValueError where C can't be cut into groups of m.
    """
    rows, columns = weight.shape
    if group is not None and columns % group:
        raise ValueError(f"{columns} columns can't be cut into groups of {group}")
    best_pairs = _anywhere(gram) if group is None else _within_groups(gram, group)
    refined = mask.clone()
    at_once = max(1, ELEMENTS // columns // (group or 8))
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        refined[part] = _refine_rows(weight[part], mask[part], gram, rounds, best_pairs)
    return refined


def _refine_rows(weight: Tensor, mask: Tensor, gram: Tensor, rounds: int, best_pairs: BestPairs) -> Tensor:
    refined = mask.clone()
    rows = (mask.any(dim=1) & ~mask.all(dim=1)).nonzero().squeeze(1)  # those with something to swap, later those that still improve
    w, keep = weight[rows], mask[rows]
    lost = w * ~keep
    c = lost @ gram
    least = LEAST_GAIN * (c * lost).sum(dim=1)
    stays, gone = torch.where(keep, torch.inf, 0.0), torch.where(keep, 0.0, torch.inf)
    diagonal = gram.diagonal()
    for _ in range(rounds):
        own, cross = w.square() * diagonal, 2 * w * c
        change, u, p = best_pairs(own - cross + stays, own + cross + gone, w)
        better = change < -least
        if not better.all():
            rows, w, c, least, stays, gone, u, p = (tensor[better] for tensor in (rows, w, c, least, stays, gone, u, p))
        if not len(rows):
            break
        row = torch.arange(len(rows), device=rows.device)
        refined[rows, u], refined[rows, p] = True, False
        stays[row, u], stays[row, p] = torch.inf, 0
        gone[row, u], gone[row, p] = 0, torch.inf
        c += w[row, p, None] * gram[p] - w[row, u, None] * gram[u]
    return refined


def _within_groups(gram: Tensor, m: int) -> BestPairs:
    """All pairs of each group."""
    groups = len(gram) // m
    blocks = gram.view(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (C / m, m, m)

    def best_pairs(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, w = (tensor.unflatten(1, (groups, m)) for tensor in (a, b, w))
        change = a[..., :, None] + b[..., None, :] - 2 * w[..., :, None] * w[..., None, :] * blocks  # (R, C / m, m, m)
        least, pair = change.flatten(1).min(dim=1)
        group, u, p = pair // m**2, pair // m % m, pair % m
        return least, group * m + u, group * m + p

    return best_pairs


def _anywhere(gram: Tensor) -> BestPairs:
    """All pairs of each row that can be the best.

    Where r_j is the largest correlation of input j with another one, |w_u w_p G_up| ≤ t_u t_p with t_j = |w_j| √(G_jj r_j), which bounds Δ below for a
    given u and any p, and the other way round. The best pair of a shortlist tells which u and p are left; their pairs are all tried.
    """
    reach = (gram.diagonal() * _largest_correlations(gram)).sqrt()  # (C,)

    def best_pairs(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = (w * reach).abs()
        low_u, low_p = a + _least_with_any(b, t, a.isfinite()), b + _least_with_any(a, t, b.isfinite())
        short = min(SHORTLIST, w.shape[1])
        change, u, p = _best_of(_lowest(low_u, short), _lowest(low_p, short), a, b, w, gram)
        best = change.clamp_max(0)[:, None]
        count_u, count_p = (low_u < best).sum(dim=1), (low_p < best).sum(dim=1)
        pairs = count_u * count_p
        left = ((pairs > 0) & (torch.maximum(count_u, count_p) > SHORTLIST)).nonzero().squeeze(1)
        if len(left):
            for rows in left[pairs[left].argsort()].split(ROWS):
                of_u, of_p = _lowest(low_u[rows], int(count_u[rows].max())), _lowest(low_p[rows], int(count_p[rows].max()))
                change[rows], u[rows], p[rows] = _best_of(of_u, of_p, a[rows], b[rows], w[rows], gram)
        return change, u, p

    return best_pairs


def _largest_correlations(gram: Tensor) -> Tensor:
    """The largest absolute correlation of each input with another one: (C, C) -> (C,). A dead input's is 0."""
    scale = gram.diagonal().sqrt().clamp_min(torch.finfo(gram.dtype).tiny)
    largest, some = torch.empty_like(scale), max(1, ELEMENTS // len(gram))
    for start in range(0, len(gram), some):
        part = slice(start, start + some)
        correlations = (gram[part] / scale[part, None] / scale).abs_()
        correlations.diagonal(start).zero_()
        largest[part] = correlations.amax(dim=1)
    return largest


def _least_with_any(values: Tensor, t: Tensor, queried: Tensor) -> Tensor:
    """A lower bound of min over j of values_j - 2 t_j t_i for each i in `queried`, by row: all (R, C).

    The minimum of straight lines is concave: between two points it lies above the line that joins them.
    """
    top = (t * queried).amax(dim=1, keepdim=True).clamp_min(1e-30)
    points = top * torch.linspace(0, 1, INTERVALS + 1, dtype=t.dtype, device=t.device).square()  # (R, N + 1), denser where most of t is
    least = torch.stack([torch.addcmul(values, t, point, value=-2).amin(dim=1) for point in points.split(1, dim=1)], dim=1)  # (R, N + 1)
    slopes = least.diff(dim=1) / points.diff(dim=1)
    left = ((t / top).sqrt() * INTERVALS).clamp_max(INTERVALS - 1).long()
    return least.gather(1, left) + (t - points.gather(1, left)) * slopes.gather(1, left)


def _lowest(bounds: Tensor, k: int) -> Tensor:
    """The columns of each row's k lowest: (R, C) -> (R, K)."""
    return bounds.topk(k, dim=1, largest=False, sorted=False).indices


def _best_of(of_u: Tensor, of_p: Tensor, a: Tensor, b: Tensor, w: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best pair of each row among candidates (R, K_u) and (R, K_p)."""
    columns, k = len(gram), of_p.shape[1]
    b_p, w_p = b.gather(1, of_p)[:, None], w.gather(1, of_p)[:, None]
    best = []
    for u in of_u.split(max(1, ELEMENTS // of_p.numel()), dim=1):
        at = u[:, :, None] * columns + of_p[:, None]  # (R, K_u, K_p)
        change = gram.flatten().index_select(0, at.flatten()).view(at.shape)  # many times faster than gram[u, p]
        change *= -2 * w.gather(1, u)[:, :, None]
        change *= w_p
        change += a.gather(1, u)[:, :, None]
        change += b_p
        least, pair = change.flatten(1).min(dim=1, keepdim=True)
        best.append((least, u.gather(1, pair // k), of_p.gather(1, pair % k)))
    changes, us, ps = (torch.cat(tensors, dim=1) for tensors in zip(*best, strict=True))
    first = changes.argmin(dim=1, keepdim=True)
    return changes.gather(1, first).squeeze(1), us.gather(1, first).squeeze(1), ps.gather(1, first).squeeze(1)
