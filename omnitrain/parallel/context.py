"""One pack over several processes: each holds a slice of its positions, and at attention a share of the heads.

    [n, H, d]  of a slice, all heads    ->  all-to-all  ->    [N, H / C, d]  of all positions, a share of the heads

and back (DeepSpeed Ulysses, arXiv 2309.14509). So attention sees whole documents, wherever slices end, and everything
else works on single positions. Where there are fewer key heads than processes, several get the same one.

Processes of a group read the same pack. Each embeds it, and goes on with its slice; recordings and pictures are dealt
out, and their features collected again. Each has the loss of its own slice, so that sums over all processes are what
one process has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omnitrain.models.aut import AuTEncoder
from omnitrain.models.layers.attention import varlen_attention
from omnitrain.models.layers.decoder import Attention
from omnitrain.models.omni import OmniModel
from omnitrain.models.thinker import ThinkerOutput
from omnitrain.models.vision import VisionEncoder
from omnitrain.parallel.experts import Exchange


class Slices:
    """Which positions of a pack are whose."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.count, self.rank = group, group.size(), group.rank()
        self.positions = 0  # of the pack that the model reads

    def sizes(self, n: int) -> list[int]:
        """Positions of each process, of a pack of `n`."""
        return [n // self.count + (i < n % self.count) for i in range(self.count)]

    def mine(self, n: int) -> slice:
        """This process's positions of a pack of `n`."""
        sizes = self.sizes(n)
        return slice(sum(sizes[: self.rank]), sum(sizes[: self.rank + 1]))

    def collected(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows [m, D] of each process end to end; `sizes`: of each. Gradients of all processes come back."""
        return Exchange.apply(rows.repeat(self.count, 1), [len(rows)] * self.count, list(sizes), self.group)


class Ulysses:
    """Attention of a layer whose positions are dealt out; see `varlen_attention`."""

    def __init__(self, slices: Slices) -> None:
        self.slices = slices

    @torch.compiler.disable
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        *,
        causal: bool,
        longest: int | None = None,
        cu_seqlens_key: Tensor | None = None,
        longest_key: int | None = None,
    ) -> Tensor:
        """query [n, H, D], key and value [n, H_kv, D] of this process's positions -> [n, H, D]; `cu_seqlens` are the
        borders of the whole pack."""
        assert cu_seqlens_key is None, "no cache in training"
        sizes = self.slices.sizes(self.slices.positions)
        q, k, v = (self._all_positions(t, sizes) for t in (query, key, value))
        return self._all_heads(varlen_attention(q, k, v, cu_seqlens, causal=causal, longest=longest), sizes)

    def _all_positions(self, x: Tensor, sizes: list[int]) -> Tensor:
        """[n, H, D] -> [N, h, D], the heads that this process attends with."""
        count = self.slices.count
        _, kept, dim = x.shape
        if kept < count:  # the key head that the query heads of each process belong to
            x = x[:, torch.arange(count, device=x.device) * kept // count]
        share = x.shape[1] // count
        for_each = x.unflatten(1, (count, share)).transpose(0, 1)  # [C, n, h, D]
        rows = for_each.reshape(count * len(x), share * dim)
        return Exchange.apply(rows, [len(x)] * count, sizes, self.slices.group).view(sum(sizes), share, dim)

    def _all_heads(self, y: Tensor, sizes: list[int]) -> Tensor:
        """[N, h, D] -> [n, H, D]"""
        n, (_, share, dim) = sizes[self.slices.rank], y.shape
        out = Exchange.apply(y.flatten(1), sizes, [n] * self.slices.count, self.slices.group)
        return out.view(self.slices.count, n, share, dim).transpose(0, 1).flatten(1, 2)


class _Sliced:
    """The hooks around the Thinker: in go a pack's embeddings, through go this process's, and out comes a pack whose
    other positions are zero (of `accept_hidden`, which the Talker reads, all positions)."""

    def __init__(self, slices: Slices, *, talks: bool) -> None:
        self.slices, self.talks = slices, talks

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, position_ids, cu_seqlens, visual_mask, deepstack, *rest = inputs
        self.slices.positions = len(x)
        mine = self.slices.mine(len(x))
        if visual_mask is not None and deepstack is not None:
            start = int(visual_mask[: mine.start].sum())
            end = start + int(visual_mask[mine].sum())
            visual_mask, deepstack = visual_mask[mine], [level[start:end] for level in deepstack]
        return (x[mine], position_ids[:, mine], cu_seqlens, visual_mask, deepstack, *rest)

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: ThinkerOutput) -> ThinkerOutput:
        n = self.slices.positions
        mine = self.slices.mine(n)

        def in_place(part: Tensor) -> Tensor:
            return torch.nn.functional.pad(part, (0, 0, mine.start, n - mine.stop))

        heard = output.accept_hidden
        heard = self.slices.collected(heard, self.slices.sizes(n)) if self.talks else in_place(heard)
        return replace(output, hidden=in_place(output.hidden), accept_hidden=heard)


class _DealtOut:
    """The hooks around an encoder: each process encodes some neighbouring media of the pack, and collects all.

    `lengths`: rows of input, and of features, of each medium.  `nothing`: the smallest medium.
    """

    def __init__(
        self,
        slices: Slices,
        lengths: Callable[[Tensor], tuple[list[int], list[int]]],
        nothing: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        self.slices, self.lengths, self.nothing = slices, lengths, nothing
        self._features: list[int] = []  # of each process, of the call under way

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        rows, media, *rest = inputs
        read, made = self.lengths(media)
        borders = [0, *shares(read, self.slices.count)]
        self._features = [sum(made[a:b]) for a, b in pairwise(borders)]
        a, b = borders[self.slices.rank : self.slices.rank + 2]
        if a == b:
            return (*self.nothing(), *rest)
        return (rows[sum(read[:a]) : sum(read[:b])], media[a:b], *rest)

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._collect(output)
        features, levels = output
        return self._collect(features), [self._collect(level) for level in levels]

    def _collect(self, features: Tensor) -> Tensor:
        mine = features[: self._features[self.slices.rank]]
        return self.slices.collected(mine, self._features) + 0.0 * features.sum()


def shares(sizes: Sequence[int], count: int) -> list[int]:
    """Where each of `count` shares of neighbouring things ends, so that their `sizes` are about equal."""
    total, so_far, ends = sum(sizes), list(accumulate(sizes)), []
    for i in range(1, count + 1):
        fair = total * i / count
        ends.append(sum(sum_to - size / 2 < fair for sum_to, size in zip(so_far, sizes, strict=True)))
    return [*ends[:-1], len(sizes)]


def slice_packs(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Let the processes of `group` share each pack that `model` reads. Raises ValueError for a model that cannot, or
    heads that cannot be dealt out."""
    if not isinstance(model, OmniModel):
        raise ValueError("parallel.context: packs are shared for a Thinker (module=thinker, talker) alone; set it to 1")
    slices = Slices(group)
    for layer in model.thinker.layers:
        attention = layer.attention
        assert isinstance(attention, Attention)
        few, many = sorted((attention.kv_heads, slices.count))
        if attention.heads % slices.count or many % few:
            raise ValueError(
                f"parallel.context={slices.count}: the Thinker's {attention.heads} heads of queries and "
                f"{attention.kv_heads} of keys cannot be dealt out to so many"
            )
        attention.attend = Ulysses(slices)
    hooks: list[tuple[nn.Module, Any]] = [(model.thinker, _Sliced(slices, talks=model.talker is not None))]
    for encoder in (model.aut, model.visual):
        hooks.append((encoder, _DealtOut(slices, _lengths(encoder), _nothing(encoder))))
    for module, hook in hooks:
        module.register_forward_pre_hook(hook.before)
        module.register_forward_hook(hook.after)


def _lengths(encoder: AuTEncoder | VisionEncoder) -> Callable[[Tensor], tuple[list[int], list[int]]]:
    if isinstance(encoder, AuTEncoder):
        return lambda lengths: (lengths.tolist(), encoder.output_lengths(lengths).tolist())
    merged = encoder.config.merge**2
    return lambda grid: (grid.prod(-1).tolist(), (grid.prod(-1) // merged).tolist())


def _nothing(encoder: AuTEncoder | VisionEncoder) -> Callable[[], tuple[Tensor, Tensor]]:
    return encoder.silence if isinstance(encoder, AuTEncoder) else encoder.grey_tile
