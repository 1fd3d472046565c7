"""What can be set of the evaluation is a configuration too."""

from __future__ import annotations

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from omnitrain.evaluation.settings import SETTINGS


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_are_a_structured_configuration(name: str) -> None:
    assert OmegaConf.to_object(OmegaConf.structured(SETTINGS[name])) == SETTINGS[name](scores=name)


def test_reading_the_settings_loads_nothing_heavy() -> None:
    code = "import sys, omnitrain.evaluation.settings, omnitrain.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
