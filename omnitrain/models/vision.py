"""Vision encoder: patches of pictures and videos -> features, and deepstack features (Qwen3-Omni report section 2.1;
Qwen3-VL; DeepStack, arXiv 2406.04334).

Parameter names equal those of the public checkpoint below `thinker.visual.`, so weights load without a mapping.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from omnitrain.models.layers.attention import varlen_attention
from omnitrain.models.layers.checkpointing import run
from omnitrain.models.layers.precision import residual
from omnitrain.models.layers.rope import Rotation, rotate
from omnitrain.models.layers.transfer import sent
from omnitrain.models.sizes import VisionConfig


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel: one matrix applied to each patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch, config.patch, config.patch)
        self.proj = nn.Conv3d(config.channels, config.d_model, kernel, stride=kernel)

    def forward(self, patches: Tensor) -> Tensor:
        """[P, channels * temporal_patch * patch * patch] -> [P, D]"""
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


class VisionAttention(nn.Module):
    """Multi-head attention inside each frame, with 2-D rotary positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, rotation: Rotation, cu_seqlens: Tensor, longest: int) -> Tensor:
        """[P, D], cos and sin [P, 1, head_dim / 2] -> [P, D]; frames of at most `longest` patches"""
        q, k, v = rearrange(self.qkv(x), "p (qkv h d) -> qkv p h d", qkv=3, h=self.heads)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = varlen_attention(q, k, v, cu_seqlens, causal=False, longest=longest)
        return self.proj(rearrange(y, "p h d -> p (h d)"))


class VisionMLP(nn.Module):
    """Two matrices with the tanh form of GELU between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.d_model, config.ffn)
        self.linear_fc2 = nn.Linear(config.ffn, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[P, D] -> [P, D]"""
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.d_model, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, rotation: Rotation, cu_seqlens: Tensor, longest: int) -> Tensor:
        """[P, D] -> [P, D]"""
        x = x + self.attn(self.norm1(x), rotation, cu_seqlens, longest)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """merge x merge neighbouring patches -> one feature of the Thinker's width.

    The final merger normalises each patch before it joins them, the deepstack mergers normalise what they joined.
    """

    def __init__(self, config: VisionConfig, *, norm_joined: bool) -> None:
        super().__init__()
        self.patches_per_token = config.merge**2
        self.norm_joined = norm_joined
        joined = config.d_model * self.patches_per_token
        self.ln_q = nn.LayerNorm(joined if norm_joined else config.d_model, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, config.out_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[P, D] -> [P / merge^2, out_dim]"""
        if not self.norm_joined:
            x = self.ln_q(x)
        x = rearrange(x, "(n m) d -> n (m d)", m=self.patches_per_token)
        return self.mlp(self.ln_q(x) if self.norm_joined else x)


class VisionEncoder(nn.Module):
    """ViT at native resolution, for pictures and videos laid end to end.

    1. Each patch (2 frames of 16 x 16 pixels) becomes a vector; the learned 48 x 48 positions, resampled bilinearly
       to the medium's own grid, are added.
    2. A pre-norm transformer. Queries and keys turn with the patch's row (half of the frequencies) and column (the
       other half). Attention stays within a frame: time is the Thinker's business (TM-RoPE).
    3. After `deepstack_layers`, and at the end, mergers make features of the Thinker's width from 2 x 2 patches.

    Patches arrive frame by frame, and within a frame in blocks of merge x merge, so that what is merged is contiguous.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.grid_side**2, config.d_model)
        self.blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.layers)])
        self.merger = PatchMerger(config, norm_joined=False)
        self.merger_list = nn.ModuleList([PatchMerger(config, norm_joined=True) for _ in config.deepstack_layers])
        self.activation_checkpointing = False
        self.kept_activations: Collection[str] = ()

    def forward(self, patches: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode pictures and videos.

        Args:
            patches: [P, channels * temporal_patch * patch * patch], media end to end.
            grid_thw: int64 [M, 3], patches in time, height and width of each medium; best on the host, which reads it.

        Returns:
            features [P / merge^2, out_dim], and deepstack features, one [P / merge^2, out_dim] per level.

        Raises ValueError: if the grids do not sum to P, or a height or width is no multiple of `merge`.
        """
        config = self.config
        grids = grid_thw.tolist()
        self._check(patches, grids)
        if not grids:
            empty = self.pos_embed.weight.new_zeros(0, config.out_dim)
            return empty, [empty for _ in config.deepstack_layers]

        rotation = self._rotation(grids, patches.device)
        frames = [h * w for t, h, w in grids for _ in range(t)]
        cu_seqlens = sent(torch.tensor([0, *frames]).cumsum(0, dtype=torch.int32), patches.device)

        x = residual(self.patch_embed(patches), self.merger.ln_q)
        x = x + self._positions(grids).to(x.dtype)
        deepstack: list[Tensor] = []
        checkpointing: dict[str, Any] = {"checkpointed": self.activation_checkpointing, "kept": self.kept_activations}
        for i, block in enumerate(self.blocks):
            x = run(block, x, rotation, cu_seqlens, max(frames), **checkpointing)
            if i in config.deepstack_layers:
                deepstack.append(self.merger_list[len(deepstack)](x))
        return self.merger(x), deepstack

    def grey_tile(self) -> tuple[Tensor, Tensor]:
        """patches [merge^2, patch_dim] and grid_thw [1, 3] of the smallest picture, of one feature."""
        merge = self.config.merge
        patches = self.pos_embed.weight.new_zeros(merge * merge, self.config.patch_dim)
        return patches, torch.tensor([[1, merge, merge]])

    def _check(self, patches: Tensor, grids: list[list[int]]) -> None:
        config = self.config
        for i, (t, h, w) in enumerate(grids):
            if min(t, h, w) < 1 or h % config.merge or w % config.merge:
                raise ValueError(
                    f"grid_thw[{i}] is {(t, h, w)}: all must be positive, height and width multiples of {config.merge}"
                )
        expected = (sum(t * h * w for t, h, w in grids), config.patch_dim)
        if tuple(patches.shape) != expected:
            raise ValueError(f"patches have shape {tuple(patches.shape)}; grid_thw and the patch size need {expected}")

    def _positions(self, grids: list[list[int]]) -> Tensor:
        """fp32 [P, D]: the learned table, stretched so that its corners meet the picture's corners."""
        config = self.config
        table = rearrange(self.pos_embed.weight.float(), "(h w) d -> 1 d h w", h=config.grid_side)
        resampled = {
            (h, w): rearrange(
                F.interpolate(table, (h, w), mode="bilinear", align_corners=True),
                "1 d (h mh) (w mw) -> (h w mh mw) d",
                mh=config.merge,
                mw=config.merge,
            )
            for h, w in {(h, w) for _, h, w in grids}
        }
        return torch.cat([resampled[h, w] for t, h, w in grids for _ in range(t)])

    def _rotation(self, grids: list[list[int]], device: torch.device) -> Rotation:
        """cos and sin, each [P, 1, head_dim / 2]: row * theta^-(2i / half) for the first half of the pairs, column for
        the second."""
        config = self.config
        half = config.d_model // config.heads // 2
        frequency = config.rope_theta ** (-torch.arange(0, half, 2, device=device).float() / half)
        angles = []
        for t, h, w in grids:
            row_column = torch.stack(
                torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"), dim=-1
            )
            blocks = repeat(row_column, "(h mh) (w mw) rc -> (t h w mh mw) rc 1", t=t, mh=config.merge, mw=config.merge)
            angles.append((blocks * frequency).flatten(1))
        angle = torch.cat(angles)[:, None]
        return angle.cos(), angle.sin()
