"""Causal convolutions with two faces over one set of weights: `forward` for whole signals, `step` for pieces of them.

A stream is the same signal cut anywhere: what `step` returns for the pieces, laid end to end, is what `forward` returns
for the whole. A module keeps what it must remember of a stream outside itself, in a state that `init_state` makes and
`step` updates in place; its size does not depend on how much has passed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StreamingModule(nn.Module):
    """[B, C, T] -> [B, C', T'], whole or in pieces. As it stands, for modules that look at one column at a time."""

    def init_state(self, batch: int) -> Any:
        """What a stream of `batch` signals remembers before its first sample, on the weights' device."""
        return None

    def step(self, x: Tensor, state: Any) -> Tensor:
        """The next piece [B, C, t] -> the part of the output that it completes; `state` moves on."""
        return self(x)


@dataclass
class ConvState:
    """Memory of one convolution.

    context: [B, C, L], the last L inputs, zeros before the first; of a transposed convolution, what the inputs so far
        add to the next L outputs. L is fixed by kernel, stride and dilation.
    skip: output samples that are still to be thrown away at the start of the stream.
    """

    context: Tensor
    skip: int = 0

    def extend(self, x: Tensor) -> Tensor:
        """[B, C, L + t]: the context and the new piece; keeps the last L of it as the next context."""
        x = torch.cat([self.context, x], dim=-1)
        self.context = x[..., x.shape[-1] - self.context.shape[-1] :].clone()  # a view would keep all of x alive
        return x


class CausalConv1d(StreamingModule):
    """Convolution that sees the present and the past only: [B, C, T] -> [B, C', ceil(T / stride)].

    Output i sees the inputs up to (i + 1) * stride - 1. Zeros stand before the first input, and after the last one
    where T is no multiple of the stride. The weights are `conv.weight` and `conv.bias`, as in the public checkpoint.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, *, stride: int = 1, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels_in, channels_out, kernel, stride=stride, dilation=dilation, groups=groups)
        self.stride = stride
        self.context = (kernel - 1) * dilation + 1 - stride
        if self.context < 0:
            raise ValueError(f"CausalConv1d: kernel {kernel} with dilation {dilation} is shorter than stride {stride}")

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 0:
            return x.new_zeros(x.shape[0], self.conv.out_channels, 0)
        return self.conv(F.pad(x, (self.context, -x.shape[-1] % self.stride)))

    def init_state(self, batch: int) -> ConvState:
        return ConvState(self.conv.weight.new_zeros(batch, self.conv.in_channels, self.context))

    def step(self, x: Tensor, state: ConvState) -> Tensor:
        """[B, C, t] -> [B, C', t / stride]. ValueError if t is no multiple of the stride."""
        if x.shape[-1] % self.stride:
            raise ValueError(f"a piece of {x.shape[-1]} columns is no multiple of the stride {self.stride}")
        if x.shape[-1] == 0:
            return self(x)
        return self.conv(state.extend(x))


class CausalConvTranspose1d(StreamingModule):
    """Transposed convolution, [B, C, T] -> [B, C', T * stride], or fewer with `trim="public"`.

    Untrimmed, input i reaches the outputs from i * stride to i * stride + kernel - 1, so that kernel - stride outputs
    hang over the end. Both trims cut these, since later inputs would still add to them.

    trim:
        "causal" cuts nothing else: T inputs give T * stride outputs, each of them from present and past inputs.
        "public" cuts kernel - stride outputs at the start too, as the public model does. What is left is the causal
            output without its start: the signal moves forward in time by kernel - stride, which is a look-ahead of as
            many samples, and T inputs give T * stride - (kernel - stride) outputs.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, *, stride: int, trim: str) -> None:
        super().__init__()
        if kernel < stride:
            raise ValueError(f"CausalConvTranspose1d: kernel {kernel} is shorter than stride {stride}")
        self.conv = nn.ConvTranspose1d(channels_in, channels_out, kernel, stride=stride)
        self.stride = stride
        self.skip = kernel - stride if trim == "public" else 0
        self.context = -(-kernel // stride) - 1  # earlier inputs that reach the outputs of the present one

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 0:
            return x.new_zeros(x.shape[0], self.conv.out_channels, 0)
        return self.conv(x)[..., self.skip : x.shape[-1] * self.stride]

    def init_state(self, batch: int) -> ConvState:
        begun = self.conv.weight.new_zeros(batch, self.conv.out_channels, self.context * self.stride)
        return ConvState(begun, skip=self.skip)

    def step(self, x: Tensor, state: ConvState) -> Tensor:
        """[B, C, t] -> [B, C', t * stride], fewer while the start of the stream is being cut.

        One matrix product gives what each input adds to each output that it reaches; these are added where they
        overlap. For few inputs this takes a quarter of the time of PyTorch's transposed convolution on a CPU.
        """
        if x.shape[-1] == 0:
            return self(x)
        batch, _, t = x.shape
        # An output is the sum over the `reach` last inputs, so the state holds what the inputs so far have added to the
        # next outputs, without the bias: it is added once, when an output is complete.
        reach, stride = self.context + 1, self.stride
        added = (x.transpose(1, 2) @ self.conv.weight.flatten(1)).unflatten(2, self.conv.weight.shape[1:])
        added = F.pad(added, (0, reach * stride - added.shape[-1]))
        added = added.unflatten(3, (reach, stride))  # [B, t, C', reach, stride]
        y = x.new_zeros(batch, self.conv.out_channels, t + self.context, stride)
        y[:, :, : self.context] = state.context.unflatten(2, (self.context, stride))
        for i in range(reach):
            y[:, :, i : i + t] += added[:, :, :, i].transpose(1, 2)
        if self.context:
            state.context = y[:, :, t:].flatten(2).clone()
        y = y[:, :, :t].flatten(2) + cast(Tensor, self.conv.bias)[:, None]
        cut = min(state.skip, y.shape[-1])
        state.skip -= cut
        return y[..., cut:]


def init_states(stages: Iterable[nn.Module], batch: int) -> list[Any]:
    """The states of `StreamingModule`s that are applied one after the other."""
    return [cast(StreamingModule, stage).init_state(batch) for stage in stages]


def step_through(stages: Iterable[nn.Module], x: Tensor, states: list[Any]) -> Tensor:
    """One piece through `StreamingModule`s that are applied one after the other."""
    for stage, state in zip(stages, states, strict=True):
        x = cast(StreamingModule, stage).step(x, state)
    return x
