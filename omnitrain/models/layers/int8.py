"""Weights in 8 bits for decoding on a CPU, where a token costs what its weights cost to read.

Each row w of a matrix is kept as round(w / s) with s = max |w| / 127 (symmetric, one scale per output; as W8A16 of
torchao and of Dettmers et al. 2022, arXiv 2208.07339, section 2.1). Activations stay floating point.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnitrain.models.layers.moe import FEW_TOKENS, Routing, SwiGLUExperts, rows_by_expert

FEW_ROWS = 12
"""Up to here PyTorch's own kernel reads the 8 bits (in 16-bit activations); beyond, the weights are made 32-bit numbers
again for one product of all rows. One core, 3072 x 512: 0.04 ms against 0.34 for one row in fp32, equal at about 14."""


WHOLE = 16
"""PyTorch's kernel reads so many inputs at once, beyond the end where that does not divide them: zeros are added."""


class Int8Matrices(nn.Module):
    """A matrix [O, I], or a stack of them [E, O, I], in 8 bits. Raises ValueError if `weight` is not on the CPU."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.device.type != "cpu":
            raise ValueError(f"the weights are on {weight.device}: int8 is for decoding on the CPU (device=cpu)")
        # The kernel takes scales of 16 bits: rounded before the weights are divided by them, they cost no precision.
        largest = weight.detach().float().abs().amax(-1, keepdim=True)
        scale = (largest / 127).clamp(min=1e-30).bfloat16()
        numbers = (weight.detach().float() / scale.float()).round_().clamp_(-127, 127)
        self.inputs = weight.shape[-1]
        numbers = F.pad(numbers, (0, -self.inputs % WHOLE))
        self.register_buffer("weight", numbers.to(torch.int8).contiguous())
        self.register_buffer("scale", scale.squeeze(-1))

    def times(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """x [..., I] -> [..., O], by one matrix."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= FEW_ROWS:
            padded = F.pad(rows, (0, -self.inputs % WHOLE)) if self.inputs % WHOLE else rows
            y = torch._weight_int8pack_mm(padded.bfloat16(), weight, scale)
        else:
            y = F.linear(rows, weight[:, : self.inputs].to(rows.dtype)) * scale
        return y.to(x.dtype).view(*x.shape[:-1], len(scale))

    def product(self, x: Tensor, which: int) -> Tensor:
        """x [..., I] -> [..., O], by matrix `which` of a stack."""
        return self.times(x, self.weight[which], self.scale[which])


class Int8Linear(Int8Matrices):
    """`nn.Linear` with its matrix in 8 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        y = self.times(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


class Int8Experts(nn.Module):
    """`SwiGLUExperts` with their matrices in 8 bits, one after the other."""

    def __init__(self, experts: SwiGLUExperts) -> None:
        super().__init__()
        self.gate_up, self.down = Int8Matrices(experts.gate_up), Int8Matrices(experts.down)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [N, D] -> [N, D], the weighted sum of each token's experts."""
        if 0 < len(x) <= FEW_TOKENS:
            tokens = zip(x, routing.experts.tolist(), routing.weights, strict=True)
            return torch.stack([self._of_token(*token) for token in tokens])
        y = torch.zeros_like(x)
        for e, token, choice in rows_by_expert(routing):
            gate, up = self.gate_up.product(x[token], e).chunk(2, dim=-1)
            weight = routing.weights[token, choice, None]
            y.index_add_(0, token, self.down.product(F.silu(gate) * up, e) * weight)
        return y

    def _of_token(self, x: Tensor, experts: list[int], weights: Tensor) -> Tensor:
        """x [D] -> [D]"""
        inner = []
        for e in experts:
            gate, up = self.gate_up.product(x, e).chunk(2)
            inner.append(self.down.product(F.silu(gate).mul_(up), e))
        return weights @ torch.stack(inner)
