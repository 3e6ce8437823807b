"""Small networks that between them hold every construction surgery must cope with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Residual adds, a projection, a flattened classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 2), 1))


class Dense(nn.Module):
    """Concatenation, normalised and read with offsets; a classifier that is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(10)
        self.c = nn.Conv2d(10, 7, 1)
        self.head = nn.Conv2d(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.bn(torch.cat([x, self.b(x)], 1)))
        return self.head(F.relu(self.c(x))).mean((2, 3))


class Mobile(nn.Module):
    """Depth-wise convolution, squeeze and excite, hard activations."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.reduce, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn1(self.expand(x)))
        x = F.hardswish(self.bn2(self.depth(x)))
        gate = self.excite(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return self.head(self.project(x * F.hardsigmoid(gate)).mean((2, 3)))


class Shuffle(nn.Module):
    """Grouped convolution, channel split, shuffle, group normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.group = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(4, 16)
        self.wide = nn.Conv2d(16, 12, 3, groups=4)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([a, F.relu(self.group(b))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.wide(F.relu(self.norm(x)))).mean((2, 3)))


class Attention(nn.Module):
    """A transformer block with packed projections, class token and position table."""

    def __init__(self, width: int = 16, heads: int = 4, *, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        b, n, c = x.shape
        y = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads)
        q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + self.scale * self.proj(y.transpose(1, 2).reshape(b, n, c))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x[:, 0])


class GroupedQuery(nn.Module):
    """A language model: tied embedding, RMS norm by hand, rotary positions, grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.o = nn.Linear(16, 16, bias=False)
        self.gate, self.up = nn.Linear(16, 24), nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.register_buffer("frequency", 1.0 / (100.0 ** (torch.arange(0, 4, 2) / 4)))

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[2], dtype=torch.float32), self.frequency)
        angle = torch.cat([angle, angle], -1)
        half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
        return x * angle.cos() + half * angle.sin()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, n, _ = x.shape
        y = self.norm(x)
        q = self.rotate(self.q(y).view(b, n, 4, 4).transpose(1, 2))
        k = self.rotate(self.k(y).view(b, n, 2, 4).transpose(1, 2))
        v = self.v(y).view(b, n, 2, 4).transpose(1, 2)
        k = k[:, :, None].expand(b, 2, 2, n, 4).reshape(b, 4, n, 4)
        v = v[:, :, None].expand(b, 2, 2, n, 4).reshape(b, 4, n, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, 16))
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return x @ self.embed.weight.t()


class Several(nn.Module):
    """Two inputs, two outputs, einsum, a shared layer, transposed convolution, pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.fine = nn.Conv2d(6, 12, 1)
        self.out = nn.Conv2d(3, 2, 1)
        self.mix = nn.Parameter(torch.randn(8, 7))
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = F.relu(self.a(x)), F.relu(self.a(y))
        x, y = F.relu(self.shared(x)), F.relu(self.shared(self.shared(y)))
        mixed = torch.einsum("bchw,cd->bdhw", x + y, self.mix).mean((2, 3))
        return self.head(F.relu(mixed)), self.out(F.pixel_shuffle(self.fine(self.up(x)), 2))


class Leftovers(nn.Module):
    """Units that leave a constant: activations with phi(0) != 0, normalisation without scale."""

    def __init__(self, *, padding: int = 0) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.b = nn.Conv2d(8, 6, 3, padding=padding, bias=False)
        self.c = nn.Linear(6, 10)
        self.head = nn.Linear(10, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.plain(self.a(x)))
        return self.head(torch.cos(self.c(F.softplus(self.b(x)).mean((2, 3)))))


class Padded(nn.Module):
    """A shortcut without parameters: every second pixel, zero channels on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.head(x.mean((2, 3)))


def image() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 8, 8),)


NETWORKS = {
    "residual": (Residual, image),
    "dense": (Dense, image),
    "mobile": (Mobile, image),
    "shuffle": (Shuffle, image),
    "attention": (Attention, image),
    "attention by hand": (lambda: Attention(fused=False), image),
    "grouped query": (GroupedQuery, lambda: (torch.randint(0, 11, (2, 6)),)),
    "several": (Several, lambda: (*image(), *image())),
    "leftovers": (Leftovers, image),
    "leftovers, padded": (lambda: Leftovers(padding=1), image),
    "padded shortcut": (Padded, image),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network with random statistics and scales, in evaluation mode, and its inputs."""
    make, inputs = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.running_mean)
                nn.init.uniform_(part.running_var, 0.5, 1.5)
                if part.affine:
                    nn.init.normal_(part.weight)
                    nn.init.normal_(part.bias)
        return module.eval(), inputs()
