"""The parity of `test_parity.py` on a GPU: fp32 number for number; bf16 no further from fp32 than the reference is."""

from __future__ import annotations

import copy

import pytest
import torch

from omnitrain.data.batch import PackedBatch
from omnitrain.interop.public_format import load_pretrained
from tests.interop.public_models import public_sample, save_public_model
from tests.interop.test_parity import SAMPLES

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def on_gpu(inputs: dict, dtype: torch.dtype) -> dict:
    return {
        k: v.to("cuda", dtype if v.is_floating_point() and k != "video_second_per_grid" else None)
        if isinstance(v, torch.Tensor)
        else v
        for k, v in inputs.items()
    }


@torch.no_grad()
def test_logits_of_all_samples_in_one_pack(tmp_path) -> None:
    reference = save_public_model(tmp_path, variant=0)
    samples = [public_sample(reference.config, p, seed=i) for i, p in enumerate(SAMPLES.values())]
    exact = torch.cat([reference(**s.reference_inputs).logits[0] for s in samples])
    batch = PackedBatch.pack([s.encoded for s in samples]).to("cuda")

    def error(logits: torch.Tensor) -> float:
        return float((logits.float().cpu() - exact).norm() / exact.norm())

    def ours(dtype: torch.dtype) -> torch.Tensor:
        model = load_pretrained(tmp_path, dtype=dtype, device="cuda")
        return model.thinker.logits(model(**batch.model_inputs()).hidden)

    def theirs(dtype: torch.dtype) -> torch.Tensor:
        model = copy.deepcopy(reference).to("cuda", dtype)
        return torch.cat([model(**on_gpu(s.reference_inputs, dtype)).logits[0] for s in samples])

    assert error(ours(torch.float32)) < 1e-4
    assert error(ours(torch.bfloat16)) < max(0.02, 1.5 * error(theirs(torch.bfloat16)))
