"""How far each layer goes along its own step: the curvature between the steps of layers, averaged and minimised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from diagnostics.ranks.collectives import Ranks
from hessopt.averages.blocks import Block
from hessopt.averages.gathering import Batch
from hessopt.averages.recorder import Call
from hessopt.network.cliques import Bandwidth

ALIKE = 3.0
"""Lengths within this factor of their median are taken for equal."""
TAIL = 0.05
"""Share of the curvature between layers that an automatic bandwidth may leave out."""
SHORTEST = 1e-3
"""Least length of a layer, in units of the longest, before that: of one that has no slope at present."""
USUAL = 0.02
"""Length of layers of which nothing is known, and where no layer's step meets curvature."""
PATIENCE = 300
"""Steps that :data:`USUAL` counts for among the lengths so far."""
AGREEMENT, DOUBT = 0.9, 0.2
"""Weight of the past in how far momentum and gradients agree, and the mean of ``‖M‖²/‖G‖²`` that none is worth."""
OUTLIER, SETTLED = 10.0, 5
"""A batch of more than so many times the average curvature counts for that, after so many updates."""


def changes_along(blocks: Sequence[Block], numbers: Sequence[int], batch: Batch, steps: Sequence[Tensor]) -> Tensor:
    r"""``z_{bv} = Σ ĵ_vᵀ D_v x_v``: how the columns of the batch change along the step of each layer.

    ``Σ_b z_{bv} z_{bw}`` is the Gauss-Newton curvature ``D_vᵀ F D_w`` between the steps of two layers, as far as the
    columns are those of its output curvature; no Kronecker product is assumed in it. Rows are the samples, or if some
    layers see more rows (positions) the fewest of these that divide all; where no such number does, one row for all.

    Args:
        blocks: All blocks of the gathering.
        numbers: Of the blocks in question.
        batch: What was gathered.
        steps: D of each of them, ``(g, o, a)``.

    Returns:
        ``(K · rows, len(numbers))``.
    """
    place = {number: i for i, number in enumerate(numbers)}
    pairs = [
        (place[call.block], call, j)
        for call, j in zip(batch.calls, batch.cotangents, strict=True)
        if call.block in place and j is not None
    ]
    lengths = {j.shape[1] if _batched(blocks[call.block], call) else 1 for _, call, j in pairs} | {batch.samples}
    rows = min(lengths)
    rows = rows if all(n % rows == 0 for n in lengths) else 1
    columns = max((len(j) for *_, j in pairs), default=1)
    found = steps[0].new_zeros(columns, rows, len(numbers))
    for i, call, j in pairs:
        moved = _moved(blocks[call.block], call, steps[i])
        found[:, :, i] += (j.to(moved.dtype) * moved).reshape(len(j), rows, -1).sum(2)
    return found.flatten(0, 1)


def _batched(block: Block, call: Call) -> bool:
    assert block.weight is not None
    return call.input.ndim >= (2 if block.kind == "linear" else block.weight.ndim)


def _moved(block: Block, call: Call, step: Tensor) -> Tensor:
    """The output of the call with the step in place of the weights."""
    x = call.input.to(step.dtype)
    views = block.views(step)
    weight, bias = views[0], views[1] if len(views) > 1 else None
    if block.kind == "convolution":
        result: Tensor = call.module._conv_forward(x, weight, bias)  # type: ignore[operator]
        return result
    return functional.linear(x, weight.mT if block.transposed else weight, bias)


class CoarseCurvature:
    r"""Step lengths s of L layers, from averages of ``C_vw = D_vᵀ F D_w`` and of the slopes ``g_v = ⟨M_v, D_v⟩``.

    .. math::
       |C|^\circ_{vw} = \max\big(0, |C_{vw}| - 2 \sqrt{C_{vv} C_{ww} / n}\big) \;\; (v \ne w), \qquad
       r_v = \frac{\max(0, g_v)}{\sum_w |C|^\circ_{vw}}, \qquad
       q_v = \frac{r_v}{\tilde r} \Big/ \mathrm{clamp}\Big(\frac{r_v}{\tilde r}, \frac{1}{\tau}, \tau\Big), \qquad
       s = q \, \max\Big(0, \frac{g^\top q}{q^\top C q}\Big)

    The sums run over pairs at most ``bandwidth`` apart; with ``"auto"`` that is the interaction radius, at every update
    anew: the smallest distance beyond which there is at most :data:`TAIL` of all ``|C|°``. As ``diag(Σ_w |C_vw|) ⪰ C``,
    r does not go beyond the minimum of the model ``½ sᵀCs − gᵀs``; what is subtracted is sampling noise, n the rows
    that an average is made of.
    Layers share one length unless r differs from its median r̃ by more than τ = :data:`ALIKE` times, and then only by
    what is beyond that: lengths of single layers are noisier than a common one, and worth it only where layers are
    unlike (the code of an autoencoder). Along q, s is the model's minimiser. A layer along whose step there is no
    curvature at all, ``C_vv = 0``, has the median, and its slope does not count; s is :data:`USUAL` if that is true of
    every layer.

    The model is of one step, and its curvature has heavy tails. Where gradients are much the same from step to step
    lengths are s; where they are not, only a part ρ of it on a scale of logarithms, and for the rest the past P of s:

    .. math::
       \ell = s^{\rho'} \, \min(u, P)^{1 - \rho'}, \qquad
       \rho' = \rho + (1 - \rho) \, \mathrm{clamp}(2 \varphi, 0, 1), \qquad
       \log P \leftarrow \log P + \frac{\Delta}{t + T} (\log s - \log P), \qquad
       \varphi = \frac{\mathrm{mean}\; \langle M, G \rangle / \lVert G \rVert^2}
                    {\mathrm{mean}\; \lVert M \rVert^2 / \lVert G \rVert^2},

    M the momentum before the gradient G of a step gets into it, the means over steps with :data:`AGREEMENT`, from 0 and
    :data:`DOUBT`; u = :data:`USUAL`, at which P begins; t the step, Δ of these since the update before,
    T = :data:`PATIENCE`. A batch whose trace of C is more than :data:`OUTLIER` times that of the average is scaled down
    to it, from the update after the first :data:`SETTLED` on. Source: docs/spectral.md.

    Args:
        distances: Of layers, ``(L, L)``, infinite where they are not connected.
        bandwidth: Of the pairs that count; ``"auto"`` or ``"full"``.
        decay: Weight of the past in the averages.
        response: ρ, in (0, 1]; with 1, ``ℓ = s``.
        dtype: Of these.

    Attributes:
        curvature: The average of C, ``(L, L)``.
        slopes: The average of g, ``(L,)``.
        lengths: ℓ, ``(L,)``; zero before the first update.
        reference: log P, ``(L,)``.
        agreement: The two means in φ, ``(2,)``.
        steps: t of the last update, on the device.
        updates: Updates, on the device.
        radius: Distance of the furthest layers whose pairs count, on the device.
    """

    def __init__(
        self,
        distances: Tensor,
        bandwidth: Bandwidth | Literal["auto"],
        decay: float,
        response: float,
        dtype: torch.dtype,
    ) -> None:
        self.decay, self.bandwidth, self.response = decay, bandwidth, response
        self._apart, self._place = distances.unique(return_inverse=True)
        self.curvature = torch.zeros_like(distances, dtype=dtype)
        self.slopes = self.curvature.new_zeros(len(distances))
        self.lengths = torch.zeros_like(self.slopes)
        self.reference = torch.full_like(self.slopes, math.log(USUAL))
        self.agreement = self.slopes.new_tensor([0.0, DOUBT])
        self.updates, self.steps, self.radius = (self.slopes.new_zeros(()) for _ in range(3))

    @property
    def tensors(self) -> list[Tensor]:
        """All that the next update depends on."""
        return [
            self.curvature, self.slopes, self.lengths, self.reference, self.agreement, self.updates, self.steps,
            self.radius,
        ]  # fmt: skip

    @torch.no_grad()
    def compare(self, momentum: Tensor, gradient: Tensor, sound: Tensor) -> None:
        """Take in how far the momentum and the gradient of a step agree, flat tensors both, unless it is not sound."""
        if self.response == 1:
            return  # φ is not asked for
        size = gradient @ gradient
        found = torch.stack([momentum @ gradient, momentum @ momentum]) / size
        moving = (sound > 0) & size.isfinite() & found.isfinite().all()
        self.agreement.lerp_(torch.where(moving, found, self.agreement), 1 - AGREEMENT)

    @torch.no_grad()
    def update(
        self,
        changes: Tensor,
        slopes: Tensor,
        step: int,
        sound: Tensor,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    ) -> None:
        """Average in ``Σ z zᵀ`` and g of the batch of a step, unless it is not sound; then find ℓ.

        Args:
            changes: z of this process's samples, ``(rows, L)``.
            slopes: g.
            step: From 1 on.
            sound: Whether the batch counts, on the device.
            ranks: The processes that have samples.
        """
        fresh = changes.mT @ changes
        rows: Tensor | int = len(changes)
        if ranks.size > 1:
            rows = fresh.new_full((), len(changes))
            ranks.sum_([fresh, rows])
        sound = sound & fresh.sum().isfinite() & slopes.sum().isfinite()
        usual, found = OUTLIER * self.curvature.trace(), fresh.trace()
        beyond = (self.updates >= SETTLED) & (usual > 0) & (found > usual)
        fresh = fresh * torch.where(beyond, usual / found, 1.0)
        self.updates += sound
        weight = self.updates.clamp_min(1).reciprocal().clamp_min(1 - self.decay)
        self.curvature.lerp_(torch.where(sound, fresh, self.curvature), weight)
        self.slopes.lerp_(torch.where(sound, slopes, self.slopes), weight)
        asked = self.minimised(rows)
        moving = sound & (asked > 0)
        gone = (step - self.steps) / (step + PATIENCE) * moving
        self.reference.lerp_(torch.where(moving, asked, 1.0).log(), gone)
        self.steps.copy_(torch.where(sound, step, self.steps))
        held = self.reference.exp().clamp_max(USUAL)
        same = 2 * self.agreement[0] / self.agreement[1].clamp_min(torch.finfo(held.dtype).tiny)
        part = self.response + (1 - self.response) * same.clamp(0, 1)
        self.lengths.copy_(torch.where(sound, asked**part * held ** (1 - part), self.lengths))

    def minimised(self, rows: Tensor | int) -> Tensor:
        """Minimiser s of the model of the present averages, of batches of so many rows."""
        c, g = self.curvature, self.slopes
        tiny = torch.finfo(c.dtype).tiny
        known = c.diagonal() > tiny
        own = torch.where(known, c.diagonal(), 1.0)
        independent = rows * (1 + self.decay) / (1 - self.decay)
        noise = 2 * (own[:, None] / independent * own).sqrt()
        apart = ~torch.eye(len(c), dtype=torch.bool, device=c.device)
        coupling = torch.where(apart, (c.abs() - noise).clamp_min(0), own)
        near = self._near(coupling)
        coupling = coupling * near
        bound = g.clamp_min(0) / coupling.sum(1) * known
        wanted = bound.clamp_min(SHORTEST * bound.max()).clamp_min(tiny)
        ratio = torch.where(known, wanted / torch.where(known, wanted, torch.nan).nanmedian(), 1.0)
        shape = ratio / ratio.clamp(1 / ALIKE, ALIKE)
        curved = (shape @ (c * near) @ shape).clamp_min(tiny)
        length = torch.where(known.any(), (g * known) @ shape / curved, USUAL * (g.sum() > 0))
        return shape * length.clamp_min(0)

    def _near(self, coupling: Tensor) -> Tensor:
        """Of pairs whether they count, ``(L, L)``."""
        if self.bandwidth == "auto":
            at = torch.zeros_like(self._apart, dtype=coupling.dtype).index_add_(
                0, self._place.flatten(), coupling.flatten()
            )
            beyond = at.flip(0).cumsum(0).flip(0)  # and at the distance itself
            inside = beyond > TAIL * beyond[0]
        else:
            inside = self._apart <= (torch.inf if self.bandwidth == "full" else self.bandwidth)
        inside[0] = True  # layers with themselves
        self.radius.copy_(torch.where(inside, self._apart, 0.0).max())
        return inside[self._place]
