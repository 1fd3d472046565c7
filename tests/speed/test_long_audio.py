"""The benchmark of long recordings: both sides encode the same, and its lines say what was measured."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
import torch

from speed import long_audio


def test_both_sides_make_the_same_features() -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 4 * long_audio.RATE)
    soundfile.write(buffer, noise, long_audio.RATE, format="FLAC")
    found = []
    for make in long_audio.VARIANTS.values():
        read, _, encode = make()
        with torch.no_grad():
            found.append(encode(read(buffer.getvalue())))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_the_report_fits_lines_and_compares(capsys: pytest.CaptureFixture[str]) -> None:
    def measured(minutes: int, slope: float) -> dict:
        cost = {"read": 0.1 * minutes, "encode": slope * minutes, "mib": 100.0 + minutes * slope, "sum": 0.5}
        return {what: dict(cost) for what in long_audio.MEASURED}

    slopes = {"omnitrain": 0.2, "transformers": 1.9}
    rows = {name: {m: measured(m, slope) for m in (1, 4, 40)} for name, slope in slopes.items()}
    del rows["transformers"][40]["backward"]
    long_audio.report(rows)
    lines = capsys.readouterr().out.splitlines()
    assert "omnitrain, read + forward: +0.00 s +0.300 s a minute, R2 1.0000" in lines[0].replace("-0.00", "+0.00")
    assert "omnitrain, memory of the encoder forward: 7.1% apart from 4 to 40 minutes" in lines
    assert "40 minutes, whole: transformers takes 6.67 x the time, 1.6 x the memory" in lines
    assert "4 minutes, backward: transformers takes 9.50 x the time, 1.1 x the memory" in lines
