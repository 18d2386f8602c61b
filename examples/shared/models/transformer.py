"""Pre-norm transformers: a vision transformer and a decoder-only language model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def vit(
    image: int = 32,
    patch: int = 4,
    depth: int = 6,
    width: int = 128,
    heads: int = 4,
    classes: int = 10,
    activation: Callable[[], nn.Module] = nn.GELU,
) -> ViT:
    """Vision transformer (Dosovitskiy et al. 2021) with class token; weights truncated N(0, 0.02²), biases 0."""
    return ViT(image, patch, depth, width, heads, classes, activation)


class ViT(nn.Module):
    """Made by :func:`vit`."""

    def __init__(
        self,
        image: int,
        patch: int,
        depth: int,
        width: int,
        heads: int,
        classes: int,
        activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        if image % patch:
            raise ValueError(f"image size {image} is not a multiple of the patch size, {patch}.")
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, (image // patch) ** 2 + 1, width))
        self.h = nn.Sequential(*(TransformerBlock(width, heads, False, activation) for _ in range(depth)))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], dim=1) + self.positions
        logits: Tensor = self.head(self.ln_f(self.h(tokens))[:, 0])
        return logits


def gpt(
    vocab: int = 65,
    context: int = 64,
    depth: int = 4,
    width: int = 128,
    heads: int = 4,
    tied: bool = True,
    activation: Callable[[], nn.Module] = nn.GELU,
) -> GPT:
    """Decoder-only transformer in GPT-2's layout and initialisation: tokens ``(B, T)`` to logits ``(B, T, vocab)``.

    ``gpt(50257, 1024, 12, 768, 12)`` has the 124 million parameters of GPT-2. ``tied``: the embedding's weight is the
    output's too, so that it is one parameter. Source: Radford et al. 2019.
    """
    return GPT(vocab, context, depth, width, heads, tied, activation)


class GPT(nn.Module):
    """Made by :func:`gpt`."""

    def __init__(
        self,
        vocab: int,
        context: int,
        depth: int,
        width: int,
        heads: int,
        tied: bool,
        activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.context = context
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.Sequential(*(TransformerBlock(width, heads, True, activation) for _ in range(depth)))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                residual = name.endswith("c_proj.weight")  # scaled so that the sum of 2·depth branches keeps its size
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[-1] > self.context:
            raise ValueError(f"{tokens.shape[-1]} tokens are more than the context of {self.context}.")
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[-1], device=tokens.device))
        logits: Tensor = self.lm_head(self.ln_f(self.h(x)))
        return logits


class TransformerBlock(nn.Module):
    """Pre-norm: ``x + attn(ln_1(x))``, then ``x + mlp(ln_2(x))``, with four times the width inside the MLP."""

    def __init__(self, width: int, heads: int, causal: bool, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("act", activation())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class Attention(nn.Module):
    """Multi-head self-attention; causal: token i sees tokens 0 … i."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the number of heads, {heads}.")
        self.heads, self.causal = heads, causal
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.c_attn(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each (B, heads, T, width/heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        output: Tensor = self.c_proj(mixed.transpose(1, 2).flatten(2))
        return output
