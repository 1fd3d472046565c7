"""The packed cache: any way of cutting documents gives what one pass gives."""

from __future__ import annotations

import pytest
import torch

from omnitrain.generation.cache import PackedKVCache
from omnitrain.models.thinker import Thinker, ThinkerConfig


@pytest.fixture(scope="module")
def thinker() -> Thinker:
    torch.manual_seed(0)
    config = ThinkerConfig(
        vocab_size=50, d_model=32, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=48, n_experts=4, top_k=2,
        expert_width=16, dense_layers=(1,), mrope_sections=(2, 1, 1),
    )  # fmt: skip
    thinker = Thinker(config).eval()
    for parameter in thinker.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return thinker


def borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def positions(starts: list[int], lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]).expand(3, -1).float()


@torch.no_grad()
@pytest.mark.parametrize(
    "cuts",
    [
        [[5, 1, 9]],
        [[5, 1, 8], [0, 0, 1]],
        [[3, 1, 2], [2, 0, 3], [0, 0, 4]],
        [[1, 0, 1], [1, 1, 1], [3, 0, 7]],
        [[1, 1, 1], *[[1, 0, 2]] * 4],
    ],
    ids=str,
)
def test_any_cut_equals_one_pass(thinker, cuts):
    documents = [torch.randn(n, 32) for n in (5, 1, 9)]
    lengths = [len(d) for d in documents]
    whole = thinker(torch.cat(documents), positions([0, 0, 0], lengths), borders(lengths)).hidden.split(lengths)

    cache, done = PackedKVCache(), [0, 0, 0]
    found: list[list[torch.Tensor]] = [[], [], []]
    for piece in cuts:
        x = torch.cat([d[s : s + n] for d, s, n in zip(documents, done, piece, strict=True)])
        out = thinker(x, positions(done, piece), borders(piece), cache=cache).hidden.split(piece)
        for parts, part in zip(found, out, strict=True):
            parts.append(part)
        done = [s + n for s, n in zip(done, piece, strict=True)]
    assert cache.lengths == done == lengths
    for parts, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(torch.cat(parts), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_documents_can_be_forgotten(thinker):
    documents = [torch.randn(n, 32) for n in (4, 6, 3)]
    cache = PackedKVCache()
    x = torch.cat([d[:-1] for d in documents])
    thinker(x, positions([0, 0, 0], [3, 5, 2]), borders([3, 5, 2]), cache=cache)
    cache.keep([0, 2])
    assert cache.lengths == [3, 2]
    last = torch.stack([documents[0][-1], documents[2][-1]])
    out = thinker(last, positions([3, 2], [1, 1]), borders([1, 1]), cache=cache).hidden
    for row, document in zip(out, (documents[0], documents[2]), strict=True):
        n = len(document)
        torch.testing.assert_close(row, thinker(document, positions([0], [n]), borders([n])).hidden[-1])


@torch.no_grad()
def test_documents_can_be_copied(thinker):
    """As by the hypotheses of a search: each copy goes on by itself, in the order that is asked for."""
    documents = [torch.randn(n, 32) for n in (3, 5)]
    cache = PackedKVCache()
    for piece in ([2, 3], [1, 2]):  # so the rows of a document do not lie together
        done = cache.lengths or [0, 0]
        x = torch.cat([d[s : s + n] for d, s, n in zip(documents, done, piece, strict=True)])
        thinker(x, positions(done, piece), borders(piece), cache=cache)
    chosen = [1, 0, 1, 1]
    cache.keep(chosen)
    assert cache.lengths == [5, 3, 5, 5]
    for _ in range(2):
        news = [torch.randn(1, 32) for _ in chosen]
        wholes = [torch.cat([documents[d], new]) for d, new in zip(chosen, news, strict=True)]
        starts = cache.lengths
        out = thinker(torch.cat(news), positions(starts, [1] * 4), borders([1] * 4), cache=cache).hidden
        for row, whole in zip(out, wholes, strict=True):
            expected = thinker(whole, positions([0], [len(whole)]), borders([len(whole)])).hidden[-1]
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
        documents, chosen = wholes, [3, 3, 0, 1]
        cache.keep(chosen)


def test_a_wrong_number_of_documents_is_refused():
    cache, x = PackedKVCache(), torch.zeros(4, 2, 8)
    cache.append(0, x, x, borders([1, 3]))
    with pytest.raises(ValueError, match="holds 2 documents, cu_seqlens has 1"):
        cache.append(0, x, x, borders([4]))
