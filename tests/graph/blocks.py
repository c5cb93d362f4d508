"""Small hand-written blocks, each with one way of writing a residual branch. Width 8, 2 heads, 5 tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, TOKENS = 8, 2, 5


def sample(*, batch: int = 2, tokens: int = TOKENS, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def seeded(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """The module in evaluation mode with weights that do something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return module.eval()


def in_heads(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Attention of `x` to `context`; fused, or written out as product, softmax, product."""

    def __init__(self, *, fused: bool = True, heads: int = HEADS, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.fused, self.heads, self.kv_heads = fused, heads, kv_heads
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, WIDTH * kv_heads // heads)
        self.v_proj = nn.Linear(WIDTH, WIDTH * kv_heads // heads)
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q = in_heads(self.q_proj(x), self.heads)
        k, v = in_heads(self.k_proj(context), self.kv_heads), in_heads(self.v_proj(context), self.kv_heads)
        if self.heads != self.kv_heads:
            k, v = (repeat_kv(value, self.heads // self.kv_heads) for value in (k, v))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1])
            mixed = torch.matmul(torch.softmax(scores if mask is None else scores + mask, dim=-1), v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def repeat_kv(value: Tensor, times: int) -> Tensor:
    batch, heads, tokens, width = value.shape
    return value[:, :, None].expand(batch, heads, times, tokens, width).reshape(batch, heads * times, tokens, width)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(**options), Mlp()  # type: ignore[arg-type]


class PreNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        x = x + self.attn(n, n)
        return x + self.mlp(self.norm2(x))


class PostNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x, x))
        return self.norm2(x + self.mlp(x))


class LayerScale(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale1, self.scale2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        x = x + self.scale1 * self.attn(n, n)
        return x + self.scale2 * self.mlp(self.norm2(x))


class Parallel(Block):
    """`(x + attn) + mlp`, or with `is_inner` `(attn + mlp) + x`."""

    def __init__(self, *, is_inner: bool = False) -> None:
        super().__init__()
        self.is_inner = is_inner

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        a, f = self.attn(n, n), self.mlp(n)
        return (a + f) + x if self.is_inner else x + a + f


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class RmsNormed(PreNorm):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = RmsNorm(), RmsNorm()  # type: ignore[assignment]


class Stack(nn.Module):
    """A norm, numbered blocks, a final norm: the trunk of a transformer."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
