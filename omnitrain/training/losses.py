"""What is minimised, and the sums it is reported from.

Over one *global batch* (every rank, every accumulation step) the loss is

    L = sum_i w_i nll_i / sum_i w_i  +  c * balance,

where i runs over the target tokens, w_i is the weight of the token's modality (1 unless configured), and `balance` is
the mixture-of-experts load-balancing loss. Numerator and denominator are summed apart, so neither packing nor the
number of devices or of accumulation steps changes the gradient of the first term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.models.talker import Talker, TalkerInputs


def balance_loss(share: Tensor, probability: Tensor, *, pool_layers: bool = False) -> Tensor:
    """Load-balancing loss of a mixture of experts (Switch Transformer, arXiv 2101.03961, eq. 4).

        E / L * sum_{l,e} f[l,e] P[l,e]

    With `share` of the *global* batch, experts may specialise within a micro-batch as long as the whole is balanced
    (Qiu et al. 2025, "Demons in the detail", arXiv 2501.11873). Its value is top_k when every expert gets its share.

    Args:
        share: f [L, E], how often each expert of each layer was chosen, per position (no gradient); rows sum to top_k.
        probability: P [L, E], router probability of each expert, mean over positions (with gradient); rows sum to 1.
        pool_layers: average both over layers before multiplying, as the public reference implementation does.
    """
    n_layers, n_experts = probability.shape
    if pool_layers:
        return n_experts * (share.mean(0) * probability.mean(0)).sum()
    return n_experts / n_layers * (share * probability).sum()


def mtp_loss(hidden: Tensor, heads: Tensor, codes: Tensor, *, chunk: int = 1024, compiled: bool = False) -> Tensor:
    """What MTP minimises: the codes of a frame after the first, each from those before it (report section 2.4).

        nll_q = - sum_f log softmax(heads[q - 1] hidden[f, q - 1])[codes[f, q]],   q = 1 .. Q - 1

    Args:
        hidden: [F, Q - 1, D], see `MTP.forward`.  heads: [Q - 1, K, D].  codes: int64 [F, Q].
        chunk, compiled: see `chunked_cross_entropy`.

    Returns:
        fp32 [Q - 1], in nats, summed over the frames.
    """
    of_codebook = [
        chunked_cross_entropy(hidden[:, q], heads[q], codes[:, q + 1], chunk=chunk, compiled=compiled)
        for q in range(len(heads))
    ]
    return torch.stack([nll.total for nll in of_codebook])


def talker_loss(
    talker: Talker,
    hidden: Tensor,
    inputs: TalkerInputs,
    *,
    residual: float = 1.0,
    frames: Tensor | None = None,
    chunk: int = 1024,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """What Talker and MTP minimise together (report section 2.4).

        L = nll_0 + residual / (Q - 1) * sum_{q >= 1} nll_q

    nll_0: codebook 0 (or the end of speech) at every frame, from the Talker's hidden states; nll_q: `mtp_loss`.

    Args:
        hidden: [T, D], the Talker's output for `inputs`.  residual: weight of the mean over MTP's codebooks.
        frames: int64 [n], rows of `inputs.codes`: MTP computes the loss of these, which stand for all (times F / n).
            None: of all.

    Returns:
        L, and nll [Q] of every codebook, from 1 on over `frames` alone; in nats, summed over the frames.
    """
    of_chunks: Any = {"chunk": chunk, "compiled": compiled}
    first = chunked_cross_entropy(hidden, talker.codec_head.weight, inputs.labels, **of_chunks).total
    chosen, share = inputs, 1.0
    if frames is not None:
        chosen = replace(inputs, codes=inputs.codes[frames], frame_sources=inputs.frame_sources[frames])
        share = len(frames) / max(1, len(inputs.codes))
    rest = mtp_loss(talker.residual_hidden(hidden, chosen), talker.mtp.code_head, chosen.codes, **of_chunks)
    return first + residual / share * rest.mean(), torch.cat([first[None], rest])


def sample_of_token(batch: PackedBatch) -> Tensor:
    """[N]: index of the sample that each position belongs to."""
    return torch.repeat_interleave(batch.cu_seqlens.diff().long())


def token_weights(batch: PackedBatch, modality_weights: Mapping[str, float]) -> Tensor:
    """[N] fp32: weight of each position in the loss; 0 where there is no label. Where the labels are."""
    targets = (batch.labels != IGNORE).float()
    if not modality_weights:
        return targets
    per_sample = torch.tensor([modality_weights.get(m, 1.0) for m in batch.modalities], device=targets.device)
    return targets * per_sample[sample_of_token(batch)]


@dataclass(frozen=True)
class SampleSums:
    """Loss of each sample in a batch, un-normalised (no gradient): nll fp64 [B], nats; tokens int64 [B], targets;
    target_bytes int64 [B], UTF-8 bytes of the targets."""

    nll: Tensor
    tokens: Tensor
    target_bytes: Tensor

    @staticmethod
    def of(batch: PackedBatch, nll: Tensor) -> SampleSums:
        """Sum `nll` [N] over each sample of `batch`."""
        owner = sample_of_token(batch).cpu()
        n = batch.cu_seqlens.shape[0] - 1
        tokens = torch.zeros(n, dtype=torch.int64).index_add_(0, owner, (batch.labels != IGNORE).long().cpu())
        # Summed on the CPU in double precision and in order: exact to the last bit from run to run.
        sums = torch.zeros(n, dtype=torch.float64).index_add_(0, owner, nll.detach().double().cpu())
        target_bytes = torch.zeros(n, dtype=torch.int64) if batch.target_bytes is None else batch.target_bytes
        return SampleSums(sums, tokens, target_bytes.cpu())


@dataclass(frozen=True)
class RouterUse:
    """How the experts of one decoder were used: counts, prob_sums [L, E] (see `models.layers.moe.Routing`) over
    `positions` positions."""

    counts: Tensor
    prob_sums: Tensor
    positions: int


@dataclass(frozen=True, kw_only=True)
class BatchLosses:
    """What one micro-batch adds to the loss of an optimizer step, un-normalised.

    Attributes:
        total: sum of weight x nats over the targets (with gradient).  weight: sum of the weights.
        routers: by name of the decoder.
        groups: sums for the log, by (modality, task): nats, target tokens, target bytes, samples.
    """

    total: Tensor
    weight: Tensor
    routers: Mapping[str, RouterUse]
    groups: Sequence[tuple[tuple[str, str], tuple[float, ...]]]
