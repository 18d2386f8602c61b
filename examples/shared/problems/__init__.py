"""The problems that optimizers are compared on, by name."""

from examples.shared.problems import (
    autoencoder,
    classification,
    images,
    language,
    pinn,
    recurrent,
    saddles,
    tabular,
)
from examples.shared.task import Problem

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for family in (classification, autoencoder, pinn, tabular, images, language, recurrent, saddles)
    for problem in family.PROBLEMS
}

__all__ = ["PROBLEMS"]
