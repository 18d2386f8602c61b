"""SpectralNewton, in whatever coordinates: the face, and what all kinds share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from hessopt.averages.options import Loss
from hessopt.closure.protocol import Closure
from hessopt.network.arguments import Params
from hessopt.network.saved_state import SavedState
from hessopt.spectral.options import AdamWPart, CurvatureLengths, KroneckerCoordinates, Momentum, PowerLaw


class SpectralNewton(SavedState):
    r"""Spectral steps in the coordinates of the curvature, as long as the curvature between layers allows.

    .. math::
       \begin{aligned}
            &M \leftarrow \mu M + (1 - \mu) G, \qquad Z = B^{-p} (\mu M + (1 - \mu) G) A^{-p}, \qquad
                D = B^{-p} (Z Z^\top)^{-1/2} Z A^{-p}                                                     \\
            &\hat D = 0.2 \sqrt{oa} \, D / \lVert D \rVert_F, \qquad
                W_v \leftarrow W_v - \gamma \eta s_v (\hat D_v + \lambda W_v)                             \\
            &\bar W \leftarrow \bar W + \min(1, k/t) (W - \bar W)
       \end{aligned}

    for the weight matrices of linear and convolution layers, each with its bias as a further column, with running
    averages A of the layer's inputs and B of back-propagated columns of the loss's output curvature. **No learning rate
    is needed, nor a schedule**: the lengths s of all layers are those of the minimum of a model in which
    ``C_vw = D̂_vᵀ F D̂_w`` is the curvature between the steps of two layers
    (:class:`hessopt.spectral.coarse_curvature.CoarseCurvature`), and what is evaluated and shipped is the average
    W̄ of the iterates: call ``optimizer.eval()`` before evaluating or saving the network, and ``optimizer.train()``
    before training goes on (both do nothing where that is so already). Parameters of other layers, norms and embeddings
    go along AdamW's direction, by the median of the lengths; :meth:`report` names them. A weight that an output layer
    shares with an embedding has the factors of the output layer.

    **Where the loss comes from.** Declare it, ``loss=criterion`` or ``loss="cross_entropy"``, and
    ``loss.backward(); optimizer.step()`` is enough; or pass a closure that returns the loss, or ``(loss, output)``, or
    an object with ``loss`` and ``logits``, as networks of Hugging Face do. A loss declared by name is that of what the
    network returns, or of the ``logits`` in it; so it may be computed inside of the network. With neither declaration
    nor closure the factors of the inputs alone are used, and lengths are fixed at 0.01; that is logged. (Unless
    ``coordinates=KroneckerCoordinates(curvature="empirical")`` takes the gradients of the samples for the curvature.)

    **Gradient accumulation.** With ``accumulate=n``, call ``backward()`` n times before each step, on losses scaled so
    that they add up to that of one large batch: ``(loss / n).backward()`` for a mean loss of micro-batches of equal
    size. Factors, curvature between layers, gradient and step are then those of the large batch, up to the draw of
    random columns, unless a layer mixes samples, as batch normalisation does. Gradients add up in ``.grad`` with your
    factors; curvature is that of the loss as it is declared, so for a mean loss it is averaged over the micro-batches,
    and for a summed one added up. A declared loss *module* is seen with its factor ``c``, and the average has the
    weights ``|c| / Σ|c|``, so ``(loss * (len(x) / total)).backward()`` is exact where sizes differ; a loss by name
    counts the same in every micro-batch. With a closure and no declared loss curvature is that of all that it calls
    ``backward()`` on, or of the sum that it returns. Fewer passes than n are the batch that they are (the last ones of
    an epoch); divided by n all the same, they give a gradient that is shorter, and the same curvature. Of more, the
    first n count for the curvature, and all for the gradient. From the first pass to the step the inputs and columns of
    each layer are kept of all micro-batches, at the steps at which factors are updated (every 10th).

    **Several processes** train one network in DistributedDataParallel, which is passed as it is or as its ``.module``,
    or one that :func:`torch.distributed.fsdp.fully_shard` (FSDP2) has sharded: steps are those of one process on the
    samples of all, if each has as many. docs/distributed.md says what is sent, and what is refused.

    **Batch-norm.** Running statistics are those of the iterates. After ``optimizer.eval()`` recompute them with
    :func:`torch.optim.swa_utils.update_bn`, ``update_bn(loader, model)``, and then call ``model.eval()``. Training goes
    on as if that had not been, as it does not read them.

    **In the coordinates of a power law**, ``coordinates=PowerLaw(alpha, delta)``, singular values of gradients are
    mapped by a power law, with a learning rate, and nothing of the network need be known:
    :class:`hessopt.spectral.power_law.PowerLawSpectralNewton`.

    Args:
        params: The network, or its parameters in any form that :mod:`torch.optim` takes, with ``model=``.
        loss: ``"cross_entropy"``, ``"mse"``, ``"bce_with_logits"``, ``"poisson_nll"``, a :class:`hessopt.NamedLoss`, or
            the module that computes the loss, as for :class:`hessopt.KroneckerNewton`. Default: None.
        lr: γ, a factor on the step lengths, for schedules and warm-up. Default: None, 1; with fixed lengths 0.01.
        model: The network, if ``params`` is not the network itself.
        coordinates: :class:`hessopt.KroneckerCoordinates` or :class:`hessopt.PowerLaw`. Default: None, the former.
        step_lengths: ``"curvature"``, a :class:`hessopt.CurvatureLengths` with options, or ``"fixed"``: the learning
            rate is the step length, in the units of Muon with matched root mean squares. Default: ``"curvature"``.
        momentum: μ in [0, 1), or a :class:`hessopt.Momentum` that also says how long a gradient may be. Default: None,
            ``Momentum(0.9, clip=1.5)``.
        weight_decay: λ, decoupled, in units of the step lengths. Default: 0.
        average: k, of the average of iterates; None: there is none, and a schedule is up to the user. Default: 8.
        maximize: Maximize the loss, which must be concave in the output.
        adamw: What is left to AdamW beside what has no factors, and its options. Its ratio is to the median of the step
            lengths. Default: None, ``AdamWPart(betas=(0.9, 0.99))``.
        accumulate: n, at least 1: backward passes of micro-batches before each step. Default: 1; of several passes the
            first then is the one whose curvature counts.

    Param groups may have their own ``lr``, ``weight_decay`` and ``maximize`` (the same in all groups).

    Raises:
        ValueError: an argument is out of range or does nothing, or a parameter is not the network's.
        TypeError: the network is missing, or an argument is of another type.
        ModelError: the network is compiled, scripted or wrapped for parallel training.

    Source:
        docs/spectral.md. Polar factors: Jordan et al., Muon (2024).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        >>> optimizer = SpectralNewton(model, loss="mse")
        >>> x = torch.randn(256, 4)
        >>> losses = []
        >>> for _ in range(60):
        ...     optimizer.zero_grad()
        ...     loss = nn.functional.mse_loss(model(x), x.prod(dim=1, keepdim=True))
        ...     loss.backward()
        ...     _ = optimizer.step()
        ...     losses.append(loss.item())
        >>> losses[-1] < 0.5 * losses[0]
        True
        >>> optimizer.eval()  # the network is the average of the iterates from here on
    """

    _KINDS: ClassVar[dict[type, type[SpectralNewton]]] = {}

    def __init_subclass__(cls, coordinates: type, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._KINDS[coordinates] = cls

    def __new__(
        cls, *args: Any, coordinates: KroneckerCoordinates | PowerLaw | None = None, **_: Any
    ) -> SpectralNewton:
        """An optimizer of the kind that the coordinates ask for."""
        if cls is not SpectralNewton:
            return super().__new__(cls)
        kind = KroneckerCoordinates if coordinates is None else type(coordinates)
        if kind not in cls._KINDS:
            known = " or ".join(f"hessopt.{kind.__name__}" for kind in cls._KINDS)
            raise TypeError(f"coordinates must be a {known}, got {kind.__name__}.")
        return super().__new__(cls._KINDS[kind])

    def __init__(
        self,
        params: Params,
        loss: Loss | None = None,
        lr: float | Tensor | None = None,
        *,
        model: nn.Module | None = None,
        coordinates: KroneckerCoordinates | PowerLaw | None = None,
        step_lengths: Literal["curvature", "fixed"] | CurvatureLengths = "curvature",
        momentum: float | Momentum | None = None,
        weight_decay: float = 0.0,
        average: float | None = 8,
        maximize: bool = False,
        adamw: AdamWPart | None = None,
        accumulate: int = 1,
    ) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no __init__.")

    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step; returns the loss before it, detached, or None without a closure."""
        raise NotImplementedError

    def eval(self) -> None:
        """Have the network hold the average of the iterates, if there is one: to evaluate and to save it."""

    def train(self) -> None:
        """Have the network hold the iterates again: to train it."""

    @property
    def alphas(self) -> dict[str, float]:
        """Exponents of a power law, by parameter name; empty in other coordinates."""
        return {}

    @property
    def step_lengths(self) -> dict[str, float]:
        """``η s`` of each layer as last used, by its name; empty before the first step, and with a power law."""
        return {}

    def report(self) -> dict[str, str]:
        """How each parameter is treated, by its name."""
        raise NotImplementedError
