"""The problems that optimizers are compared on, by name."""

from ablation.problems import (
    autoencoder,
    classification,
    images,
    language,
    pinn,
    recurrent,
    saddles,
    tabular,
)
from ablation.task import Problem

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for family in (classification, autoencoder, pinn, tabular, images, language, recurrent, saddles)
    for problem in family.PROBLEMS
}

__all__ = ["PROBLEMS"]
