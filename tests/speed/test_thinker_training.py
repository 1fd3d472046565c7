"""The formula behind the benchmark's share of peak, against PyTorch's own count of what a step executes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from omnitrain.interop.public_format import save_pretrained
from omnitrain.models.presets import build, init_weights
from speed import thinker_training as benchmark


def attention(products: int, first: int) -> Callable[..., float]:
    """FLOPs of `products` matrix products of the shape of q k^T, half of them where attention is causal."""

    def count(*args: Any, out_val: Any = None, **_: Any) -> float:
        (b, h, n, d), m = args[first], args[first + 1][2]
        causal = any(a is True for a in args)
        return products * 2 * b * h * n * m * d / (2 if causal else 1)

    return count


def test_needed_flops_are_what_a_step_executes(tmp_path: Path, monkeypatch) -> None:
    full = benchmark.documents
    monkeypatch.setattr(benchmark, "documents", lambda: full(seed=1, n=8))
    sizes = {k: dict(v) for k, v in benchmark.SIZES.items()}
    sizes["thinker"] |= dict(d_model=64, layers=2, heads=2, kv_heads=1, head_dim=32, mrope_sections=(6, 5, 5))
    sizes["thinker"] |= dict(accept_hidden_layer=1, expert_width=32, vocab_size=benchmark.VOCABULARY)
    model = build("tiny", special_tokens=benchmark.TOKENS, **sizes)
    init_weights(model, seed=0)
    save_pretrained(model, tmp_path)

    step, model = benchmark.omnitrain_step(tmp_path, "cpu", "float32", False)
    aten = torch.ops.aten
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            aten.addmm_: lambda _, a, b, out_val=None, **__: 2 * a[0] * a[1] * b[1],
            aten._scaled_dot_product_flash_attention_for_cpu: attention(2, 0),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: attention(4, 1),
        },
    )
    with counter:
        step()
    samples = [benchmark.encode(d) for d in benchmark.documents()]
    needed, executed = benchmark.needed_flops(model.config, samples), counter.get_total_flops()
    # What is left: the gradients with respect to pixels and mel frames, which are needed by nobody.
    assert abs(executed / needed - 1) < 0.03, (executed, needed)
