"""Help comes at once and needs neither torch nor Hydra."""

import subprocess
import sys
import time

import pytest

from omnitrain.__main__ import HYDRA_VERBS, VERBS, main


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"]])
def test_help_in_half_a_second(arguments: list[str]) -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "omnitrain", *arguments], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5, seconds


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from omnitrain.__main__ import main; main(['--help']); main(['fit', '--help']);"
        "assert not {'torch', 'hydra', 'lightning', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_names_verbs_recipes_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    for verb in HYDRA_VERBS:
        assert main([verb, "--help"]) == 0
        text = capsys.readouterr().out
        assert "+recipe=quickstart" in text
        assert "qwen3_omni_30b_a3b" in text


def test_unknown_verb_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 1
    assert "did you mean 'fit'" in capsys.readouterr().err
