"""Sizes of a mesh: what fits, and what is said where it does not."""

from __future__ import annotations

import pytest

from omnitrain.parallel.context import shares
from omnitrain.parallel.mesh import MeshSizes


@pytest.mark.parametrize(
    ("world", "given", "expected"),
    [
        (8, {}, (1, 8, 1, 1)),
        (8, {"shard": 4}, (2, 4, 1, 1)),
        (8, {"data": 4}, (4, 2, 1, 1)),
        (8, {"data": 2, "shard": 2, "context": 2}, (2, 2, 1, 2)),
        (16, {"shard": "auto", "context": 4, "expert": 8}, (1, 4, 8, 4)),
        (8, {"expert": "auto", "experts": [128]}, (1, 8, 8, 1)),
        (8, {"expert": "auto", "experts": [12, 128]}, (1, 8, 4, 1)),
        (64, {"expert": "auto", "experts": [128], "neighbours": 8}, (1, 64, 8, 1)),
        (8, {"expert": "auto"}, (1, 8, 1, 1)),
    ],
)
def test_sizes(world: int, given: dict, expected: tuple[int, ...]) -> None:
    sizes = MeshSizes.of(world, **given)
    assert (sizes.data, sizes.shard, sizes.expert, sizes.context) == expected
    assert sizes.world == world


@pytest.mark.parametrize(
    ("world", "given", "words"),
    [
        (8, {"shard": 3}, r"parallel\.shard=3: does not divide 8 .*use one of 1, 2, 4, 8"),
        (8, {"data": 5}, r"parallel\.data=5: does not divide 8"),
        (8, {"context": 3}, r"parallel\.context=3: does not divide 8 processes; use one of 1, 2, 4, 8"),
        (8, {"data": 2, "shard": 2}, r"is 4, and there are 8 processes .*auto"),
        (8, {"shard": 4, "expert": 8}, r"parallel\.expert=8: does not divide the 4 processes of a copy .*1, 2, 4"),
        (8, {"shard": 0}, r"parallel\.shard=0"),
        (8, {"expert": 0}, r"parallel\.expert=0: must be at least 1"),
    ],
)
def test_refused(world: int, given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MeshSizes.of(world, **given)


@pytest.mark.parametrize(
    ("sizes", "count", "ends"),
    [
        ([1, 1, 1, 1], 2, [2, 4]),
        ([4, 1, 1, 1, 1], 2, [1, 5]),
        ([1, 1, 1, 1, 4], 2, [4, 5]),
        ([5], 2, [0, 1]),
        ([3, 3, 3], 4, [1, 1, 2, 3]),
        ([2, 2], 1, [2]),
    ],
)
def test_shares_are_about_equal_and_whole(sizes: list[int], count: int, ends: list[int]) -> None:
    found = shares(sizes, count)
    assert len(found) == count
    assert found[-1] == len(sizes)
    assert found == sorted(found)
    assert found == ends
