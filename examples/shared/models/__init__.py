"""Networks that the examples share: perceptrons, autoencoders, a small CNN, ResNet-18, a vision transformer, a GPT."""

from .convolutional import mnist_cnn
from .perceptron import autoencoder, mlp
from .resnet import resnet18
from .transformer import gpt, vit

__all__ = ["autoencoder", "gpt", "mlp", "mnist_cnn", "resnet18", "vit"]
