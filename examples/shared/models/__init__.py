"""Networks that the examples share: a perceptron, ResNet-18, a vision transformer and a small GPT."""

from .perceptron import mlp
from .resnet import resnet18
from .transformer import gpt, vit

__all__ = ["gpt", "mlp", "resnet18", "vit"]
