"""The settings of the data are light to import, and OmegaConf takes them as structured configurations."""

from __future__ import annotations

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from omnitrain.data.settings import AudioGeometry, Budget, MediaLimits, SourceConfig, Stage, VisionGeometry


def test_import_is_light() -> None:
    heavy = "import sys, omnitrain.data.settings; print({'torch', 'numpy'} & set(sys.modules) or 'none')"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout == "none\n"


@pytest.mark.parametrize("kind", [SourceConfig, AudioGeometry, VisionGeometry, MediaLimits, Budget, Stage])
def test_structured(kind: type) -> None:
    assert OmegaConf.structured(kind) is not None


def test_values_come_back() -> None:
    given = {"name": "a", "path": ["x", "y"], "where": {"task": ["asr"], "concept_share": 0.2}, "weight": 2}
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), given))
    assert config == SourceConfig(**given)
    stage = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Stage), {"samples": {"a": 3}}))
    assert stage == Stage(samples={"a": 3})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Budget(tokens=0), "tokens is 0"),
        (lambda: VisionGeometry(fps=0), "fps"),
        (lambda: AudioGeometry(hop=0), "hop is 0"),
        (lambda: SourceConfig(name="a", limit=0), "'a': limit 0"),
        (lambda: SourceConfig(name="a", weight=float("nan")), "'a': weight nan"),
    ],
)
def test_what_cannot_be_is_named(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
