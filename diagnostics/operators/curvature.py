"""Matrix-free curvature of the loss with respect to the parameters: the Hessian, Gauss-Newton and tensor parts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diagnostics.autograd.tape import rounding
from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.linear_operator import LinearOperator
from diagnostics.operators.curvature_tape import Columns, JointTape, SplitTape, Tape
from diagnostics.operators.data import Batches
from diagnostics.operators.determinism import Determinism, check_deterministic
from diagnostics.operators.parameter_space import ParameterSelection, ParameterSpace
from diagnostics.operators.replay import Replay, along_the_tape
from diagnostics.operators.shards import shard, together, unwrapped

T = TypeVar("T", bound=Tape)


class CurvatureProducts(NamedTuple):
    """One or several vectors multiplied by H and by its two parts; ``total = gn + tensor``."""

    total: Tensor
    gn: Tensor
    tensor: Tensor


class CurvatureOperator(LinearOperator):
    """Base class: a symmetric matrix ``(P, P)`` that is a sum over batches, of the loss of a model on data.

    Args:
        model: The network; eager, in float32 or float64. It runs in the mode it is in (train or eval). One in
            DistributedDataParallel: see below.
        batches: One batch as a tuple ``(inputs, targets)``, or a list, ``DataLoader`` or other source of such pairs
            that can be read again and again. Inputs are passed as ``model(inputs)``, a tuple as ``model(*inputs)``, a
            dict as ``model(**inputs)``. What is on another device is moved to the parameters'.
        loss_fn: ``loss_fn(z, targets) -> scalar``, of the model's output z.
        parameters: None for all that require grad; names or shell patterns; or a predicate ``(name, parameter) ->
            bool``. Parameters left out are held fixed.
        reduction: What the loss does within a batch, and hence what is done over batches: ``"mean"`` averages batches
            with the number of their samples as weights, which is the mean over all samples, whatever the size of the
            last batch; ``"sum"`` adds them.
        progress: Show a bar over batches, on a terminal only.
        positive_semidefinite: Set by subclasses whose matrix has no negative eigenvalue by construction.

    One batch: model and loss are run once, the tape of the gradient is kept, and a product is a backward pass over it.
    Several: each product runs them again on every batch, for all columns in one pass over the data, and adds the
    batches' products in the order in which they come, in the operator's dtype.

    All products are of one and the same function: every run starts from the buffers and the global random state as
    they were at construction (so dropout masks are the same, and a ``DataLoader(shuffle=True)`` without a generator of
    its own shuffles the same way); :meth:`check_deterministic` tests that. The model's parameters, ``.grad``, buffers
    and mode, and the global random state are left as found. Under ``torch.autocast`` the curvature is computed with
    autocast off, in the dtype of the parameters.

    **Several processes.** Given a network in :class:`torch.nn.parallel.DistributedDataParallel`, ``batches`` are those
    of this process, and the matrix is that of the batches of all: means are over all samples, whatever each process
    has, and sums over all processes. A process without samples passes an empty batch or list. All processes have to
    construct the operator and to ask for the same products, by the same vectors, and get the same results, bit for bit.
    What runs is the network inside, ``.module``, so that no buffers are sent; names of parameters are those that it
    has. Given the ``.module`` itself, the operator is that of this process's batches, and no other one is waited for.

    Attributes:
        space: The chosen parameters as a flat vector, in ``model.parameters()`` order, tied ones once.
        batches: The data.
        reduction: ``"mean"`` or ``"sum"``.
        replay: Model and loss as one function of the parameters, the same at every run.

    Raises:
        CaptureError: the model, an input or the loss is not one whose curvature can be computed (scripted, compiled,
            half precision, complex, detached, not finite …); the message names it and the way out.
        DiagnosticsError: no such parameter; the data cannot be read twice or are empty; no second derivative.
        StaleGraphError: from products, when parameters or modes have changed since; :meth:`refresh` moves the operator
            to the present ones.
    """

    _tape_kind: ClassVar[type[Tape]]

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        parameters: ParameterSelection = None,
        reduction: Literal["mean", "sum"] = "mean",
        progress: bool = True,
        positive_semidefinite: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}.')
        model, self._ranks = unwrapped(model)
        self.space = ParameterSpace(model, parameters)
        super().__init__(
            (self.space.size, self.space.size),
            self.space.dtype,
            self.space.device,
            symmetric=True,
            positive_semidefinite=positive_semidefinite,
        )
        own, self._counts = shard(batches, self._ranks)
        self.batches = Batches(own)
        self.reduction = reduction
        self._progress = progress
        self.replay = Replay(model, loss_fn, self.space.device)
        self._samples: int | None = None
        self._kept: dict[type[Tape], Tape] = {}
        together(self._ranks, self._start)

    def refresh(self) -> None:
        """Move the operator to the model's present parameters, buffers and mode, and the present random state."""
        self.replay.refresh()
        self._kept.clear()
        together(self._ranks, self._start)

    def matmat(self, vectors: Tensor) -> Tensor:
        """The product with the columns of a matrix, ``(P, k) -> (P, k)``."""
        if vectors.shape[1] == 0:
            return torch.zeros_like(vectors)
        columns = self.space.split(vectors.detach())
        (product,) = self._sum(self._tape_kind, lambda tape: (self.space.join(self._product(tape, columns)),))
        return _finite(product)

    def products(self, vectors: Tensor) -> CurvatureProducts:
        """H, its Gauss-Newton part and its tensor part times the same vectors, ``(P,)`` or ``(P, k)``, in one sweep.

        Over one kept batch this costs a product with T and a backward pass; of an operator of H, the first call runs
        the model once more.
        """

        def parts(tape: SplitTape) -> tuple[Tensor, Tensor]:
            tensor, moved = tape.tensor_and_jvp(columns)
            return self.space.join(tape.gauss_newton(columns, moved)), self.space.join(tensor)

        self._apply(lambda v: v, vectors, self.shape[1])  # checks the vectors
        columns = self.space.split((vectors.unsqueeze(1) if vectors.ndim == 1 else vectors).detach())
        gn, tensor = (part.reshape(vectors.shape) for part in self._sum(SplitTape, parts))
        return CurvatureProducts(_finite(gn + tensor), gn, tensor)

    def loss_and_gradient(self) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and its gradient ``(P,)``, over all batches as the operator sums them."""
        loss, gradient = self._sum(self._tape_kind, lambda tape: (tape.loss.clone(), tape.gradient()))
        return loss, gradient

    def flatten(self, values: Any) -> Tensor:
        """One vector ``(P,)`` of a tensor for each chosen parameter: a mapping from names, or tensors in order."""
        return self.space.flatten(values)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The entries of a vector ``(P,)`` by parameter name, in the parameters' shapes."""
        return self.space.unflatten(vector)

    def check_deterministic(self) -> Determinism:
        """Compute a product twice, each time from new runs of the model, and find out why they differ, if they do.

        Returns:
            The relative difference, and what would make products differ if it were not held fixed: dropout, buffers
            that a forward pass changes, the order of the data.

        Raises:
            NonDeterministicError: they differ by more than rounding. The message says why.
        """
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(self.shape[1], generator=generator, dtype=self.dtype).to(self.device)

        def product() -> Tensor:
            kept, self._kept = self._kept, {}
            try:
                return self @ vector
            finally:
                self._kept = kept

        return check_deterministic(product, self.batches, self.replay)

    def check_symmetric(self) -> float:
        """Compare ``uᵀ A v`` with ``vᵀ A u`` for two random vectors: a wrong backward of an operation shows there.

        Returns:
            The difference, relative to ``‖u‖ ‖A v‖``.

        Raises:
            DiagnosticsError: it is more than rounding (the square root of the machine precision, of the coarsest
                dtype that the network computes in).
        """
        generator = torch.Generator().manual_seed(0)
        pair = torch.randn(self.shape[1], 2, generator=generator, dtype=self.dtype).to(self.device)
        products = self @ pair
        forms = pair.mT @ products
        scale = (pair.norm(dim=0).flip(0) * products.norm(dim=0)).amax().clamp_min(torch.finfo(self.dtype).tiny)
        asymmetry = float((forms[0, 1] - forms[1, 0]).abs() / scale)
        if asymmetry > torch.finfo(self.dtype).eps ** 0.5 and asymmetry > self._rounding() ** 0.5:
            raise DiagnosticsError(
                f"the second derivative that PyTorch gives is not symmetric (uᵀ A v and vᵀ A u differ by "
                f"{asymmetry:.1e}), so the backward of an operation is wrong. Replace it by one made of simpler ones."
            )
        return asymmetry

    def _rounding(self) -> float:
        """Machine precision of the coarsest dtype that the gradient of some batch passes through."""
        found: list[float] = []

        def look(tape: Tape) -> tuple[Tensor, ...]:
            found.append(rounding(g for g in tape.gradients if g is not None))
            return ()

        self._sum(self._tape_kind, look)
        return max(self._ranks.objects(max(found)))

    @abstractmethod
    def _product(self, tape: Any, columns: Columns) -> Columns:
        """What one batch adds to the product, for a loss of that batch alone."""

    def _attach(self, tape: Tape) -> None:
        """Add to a new tape what products over it need, other than derivatives."""

    def _start(self) -> None:
        with self.replay.replayed():
            batch = next(iter(self.batches))
            tape = self._tape_kind.of_batch(self.replay, batch.private(self.device), self.space)
            self._attach(tape)
        if self.batches.single:
            self._kept[self._tape_kind] = tape

    def _sum(self, kind: type[T], measure: Callable[[T], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The sum, or the mean over samples, of what ``measure`` finds in the tape of each batch, of all processes."""
        parts, samples = self._own_sum(kind, measure)
        if self._ranks.size > 1:
            if self.reduction == "mean":
                self._ranks.mean_(parts, float(samples * self._counts))
            else:
                for part in parts if not self._counts else ():
                    part.zero_()
                self._ranks.sum_(parts)
        return parts

    def _own_sum(self, kind: type[T], measure: Callable[[T], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], int]:
        """The same of this process's batches, and the number of their samples."""
        self.replay.check_fresh()
        self.space.check_trained()
        if self.batches.single and kind in self._kept:
            with along_the_tape(self.device):
                return measure(self._kept[kind]), self._kept[kind].size  # type: ignore[arg-type]
        sums: tuple[Tensor, ...] = ()
        samples = 0
        with self.replay.replayed():
            bar = tqdm(
                self.batches,
                total=self.batches.count(),
                desc=type(self).__name__,
                leave=False,
                disable=None if self._progress and not self.batches.single else True,
            )
            for batch in bar:
                tape = kind.of_batch(self.replay, batch.private(self.device), self.space)
                self._attach(tape)
                if self.batches.single:
                    self._kept[kind] = tape
                with along_the_tape(self.device):
                    found = measure(tape)
                weight = batch.size if self.reduction == "mean" and not self.batches.single else 1
                found = tuple(part.mul(weight) for part in found) if weight != 1 else found
                sums = tuple(a.add_(b) for a, b in zip(sums, found, strict=True)) if sums else found
                samples += batch.size
                del tape  # before the next one is made
        if self._samples not in (None, samples):
            raise DiagnosticsError(
                f"batches held {self._samples} samples in an earlier pass and {samples} in this one, so that products "
                "are of different functions. Pass a source that is the same at every pass, or list(batches)."
            )
        self._samples = samples
        if self.reduction == "mean" and not self.batches.single:
            return tuple(part.div_(samples) for part in sums), samples
        return sums, samples


class HessianOperator(CurvatureOperator):
    """The Hessian H of the loss with respect to the parameters, ``(P, P)``, by its products.

    ``H v = ∂(gᵀv)/∂θ`` with the gradient g on the tape (Pearlmutter 1994): over one kept batch, a backward pass over
    the gradient's own.

    .. code-block:: python

        op = diagnostics.HessianOperator(model, (inputs, targets), F.cross_entropy)
        op @ v
        scipy.sparse.linalg.eigsh(op.to_scipy(), k=5)

    See :class:`diagnostics.operators.curvature.CurvatureOperator` for the arguments and errors.
    """

    _tape_kind = JointTape

    def _product(self, tape: JointTape, columns: Columns) -> Columns:
        return tape.hessian(columns)


class GaussNewtonOperator(CurvatureOperator):
    """The generalized Gauss-Newton matrix ``Jᵀ ∇²_z ℓ J`` of the loss, ``(P, P)``, by its products.

    J is the Jacobian of the model's output z (all its floating-point tensors together) by the parameters. It is the
    Hessian of the loss with the network linearised. So where the loss also depends on parameters directly (a weight
    penalty inside it), the matrix is ``(J; I)ᵀ ∇²ℓ(z, θ) (J; I)``, with the curvature of the penalty, as in
    :func:`diagnostics.parameter_hessian` with ``part="gn"``.

    ``J v`` is the derivative of the tape of ``Jᵀ s`` by s. See
    :class:`diagnostics.operators.curvature.CurvatureOperator` for the arguments and errors. Source: Schraudolph 2002.
    """

    _tape_kind = SplitTape

    def _product(self, tape: SplitTape, columns: Columns) -> Columns:
        return tape.gauss_newton(columns)


class TensorOperator(CurvatureOperator):
    """The tensor part ``T = H − GGN = Σ_i ∂ℓ/∂z_i ∇²z_i``, ``(P, P)``, by its products.

    What the network's own curvature adds to the Gauss-Newton matrix, and the only source of negative eigenvalues of a
    loss that is convex in z. Computed as the sum, by one backward pass over the tape of ``Jᵀ s`` at s = ∂ℓ/∂z held
    fixed: nothing is subtracted. See :class:`diagnostics.operators.curvature.CurvatureOperator` for the arguments and
    errors.
    """

    _tape_kind = SplitTape

    def _product(self, tape: SplitTape, columns: Columns) -> Columns:
        return tape.tensor(columns)


def _finite(product: Tensor) -> Tensor:
    if not math.isfinite(product.sum()) and not torch.isfinite(product).all():  # the sum alone may overflow
        raise DiagnosticsError("a second derivative is not finite (a norm or a root at zero?), or the vector is not.")
    return product
