"""What Newton's method keeps from one step to the next, and where: in the optimizer's state."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from hessopt.closure.objective import Objective
from hessopt.search.damping import NielsenDamping
from hessopt.search.trust_region import TrustRegion

S = TypeVar("S", TrustRegion, NielsenDamping)
LEAST_FORCING = 1e-12
"""Relative residual below which conjugate gradients only move rounding errors."""


class Kept:
    """Numbers, in the state of one parameter; and vectors, in parts in the state of every one.

    Args:
        state: The optimizer's.
        first: The parameter that has the numbers.
        objective: The parameters that vectors are over.

    Attributes:
        numbers: Those of the last step; empty before the first.
    """

    def __init__(self, state: MutableMapping[Tensor, dict[str, Any]], first: Tensor, objective: Objective) -> None:
        self._state = state
        self._first = first
        self._objective = objective
        self.numbers: dict[str, Any] = state.get(first, {})

    def restored(self, search: S) -> S:
        """A copy of a radius or a damping, as the last step left it."""
        found = replace(search)
        if self.numbers:
            found.load_state_dict(self.numbers)
        return found

    def vector(self, name: str) -> Tensor | None:
        """A vector ``(P,)`` of the last step; None if it is not there for all parameters."""
        parts = [self._state[p].get(name) if p in self._state else None for p in self._objective.parameters]
        return None if any(part is None for part in parts) else self._objective.flat(parts)

    def model_errors(self, gradient: Tensor) -> tuple[float, float] | None:
        """How far the gradient is from what the Gauss-Newton and the full model predicted for the last step."""
        ggn, hessian = self.vector("model_ggn"), self.vector("model_hessian")
        if ggn is None or hessian is None:
            return None
        return float(torch.linalg.vector_norm(gradient - ggn)), float(torch.linalg.vector_norm(gradient - hessian))

    def forcing(self, norm: float, most: float) -> float:
        """η by the second choice of Eisenstat and Walker (1996), with their safeguard.

        Args:
            norm: ‖g‖.
            most: Upper bound, and the value at the first step.
        """
        if not self.numbers or self.numbers["gradient_norm"] == 0:
            return most
        eta = 0.9 * (norm / self.numbers["gradient_norm"]) ** 2
        before = 0.9 * self.numbers["forcing"] ** 2
        if before > 0.1:
            eta = max(eta, before)
        return float(min(max(eta, LEAST_FORCING), most))

    def keep(self, numbers: dict[str, Any], **vectors: Tensor | None) -> None:
        """Count a step and put its numbers and vectors into the state; a vector that is None is dropped."""
        self.numbers = self._state[self._first]
        self.numbers["step"] = self.numbers.get("step", 0) + 1
        self.numbers.update(numbers)
        for name, vector in vectors.items():
            for state in self._state.values():
                state.pop(name, None)
            if vector is not None:
                for p, part in zip(self._objective.parameters, self._objective.parts(vector), strict=True):
                    self._state[p][name] = part.clone()
