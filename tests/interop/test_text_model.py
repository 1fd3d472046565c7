"""A public text model as a Thinker: its logits, number for number, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnitrain.config.run_config import ThinkerModuleConfig
from omnitrain.data.batch import IGNORE, EncodedSample, PackedBatch
from omnitrain.interop.public_format import CheckpointError
from omnitrain.interop.start_from import start_from
from omnitrain.interop.text_model import is_text_model, load_text_model
from omnitrain.models.omni import OmniModel
from omnitrain.models.presets import build, init_weights
from omnitrain.training.thinker import ThinkerModule

SIZES: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5,
    intermediate_size=40, rope_parameters=dict(rope_type="default", rope_theta=5e5), max_position_embeddings=128,
)  # fmt: skip
EXPERTS = dict(
    num_hidden_layers=3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True,
    mlp_only_layers=[1], decoder_sparse_step=1,
)  # fmt: skip
OURS: dict[str, Any] = dict(
    d_model=32, heads=4, kv_heads=2, head_dim=16, mrope_sections=[4, 2, 2], ffn=40, rope_theta=5e5, norm_eps=1e-5,
    layers=3, n_experts=4, top_k=2, expert_width=24, dense_layers=[1], accept_hidden_layer=1,
)  # fmt: skip


def save(folder: Path, kind: str, **changes: Any):
    """A random text model of `transformers`, written to `folder`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    if kind == "dense":
        model: Any = Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "num_hidden_layers": 2, **changes}))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, **EXPERTS, **changes}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.1 * noise + 1.0 if p.ndim == 1 else noise / p.shape[-1] ** 0.5)
            assert p.ndim > 1 or "norm" in name
    model.eval().save_pretrained(folder)
    return model


def thinker(vocab_size: int = 96, **changes: Any) -> OmniModel:
    sizes = {"d_model": 16, "layers": 1, "heads": 2, "ffn": 16}
    model = build(
        "tiny", vocab_size=vocab_size, special_tokens={}, thinker={**OURS, **changes}, aut={**sizes, "conv_hidden": 4},
        vision={**sizes, "layers": 2, "deepstack_layers": [0]},
    )  # fmt: skip
    init_weights(model, 0)
    return model


def logits(model: OmniModel, texts: list[list[int]]) -> list[torch.Tensor]:
    """Of packed texts, taken apart again."""
    samples = []
    for ids in texts:
        n = len(ids)
        samples.append(
            EncodedSample(
                id="x",
                source="s",
                task="text",
                modality="text",
                languages=(),
                input_ids=torch.tensor(ids).numpy(),
                labels=torch.full((n,), IGNORE).numpy(),
                token_types=torch.zeros(n, dtype=torch.uint8).numpy(),
                position_ids=torch.arange(n).float().expand(3, n).numpy(),
            )
        )
    batch = PackedBatch.pack(samples)
    with torch.no_grad():
        out = model.thinker.lm_head(model(**batch.model_inputs()).hidden)
    return list(out.split([len(ids) for ids in texts]))


DENSE = {"layers": 2, "dense_layers": [0, 1]}


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("experts", {}, {}),
        ("experts", {"norm_topk_prob": False, "mlp_only_layers": []}, {"normalise_top_k": False, "dense_layers": []}),
        ("dense", {}, DENSE),
        ("dense", {"tie_word_embeddings": True, "attention_bias": False}, DENSE),
    ],
)
def test_logits_of_the_text_model(tmp_path: Path, kind: str, theirs: dict, ours: dict) -> None:
    reference = save(tmp_path, kind, **theirs)
    model = thinker(**ours)
    encoder = model.aut.state_dict()
    encoder = {name: x.clone() for name, x in encoder.items()}
    ThinkerModule(model, ThinkerModuleConfig(init_from={"thinker": str(tmp_path)}))
    texts = [[5, 17, 3, 88, 95, 0, 41], [9, 9, 2], list(range(40))]
    for ids, ours_ in zip(texts, logits(model, texts), strict=True):
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(ours_, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(x, encoder[name]) for name, x in model.aut.state_dict().items())


def test_experts_stored_one_by_one(tmp_path: Path) -> None:
    """As the published checkpoints have them; transformers writes whichever its version likes."""
    save(tmp_path, "experts")
    stored = load_file(tmp_path / "model.safetensors")
    before = load_text_model(tmp_path, thinker()).weights
    single: dict[str, torch.Tensor] = {}
    for key, x in stored.items():
        if key.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(both.chunk(2) for both in x):
                stem = key.removesuffix("gate_up_proj")
                single[f"{stem}{e}.gate_proj.weight"], single[f"{stem}{e}.up_proj.weight"] = gate.clone(), up.clone()
        elif key.endswith("experts.down_proj"):
            single |= {f"{key.removesuffix('down_proj')}{e}.down_proj.weight": w.clone() for e, w in enumerate(x)}
        else:
            single[key] = x
    assert any("experts.3.up_proj" in key for key in single)
    save_file(single, tmp_path / "model.safetensors")
    after = load_text_model(tmp_path, thinker()).weights
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_ids_that_the_file_does_not_know_get_the_mean_row(tmp_path: Path) -> None:
    reference = save(tmp_path, "experts")
    model = thinker(vocab_size=100)
    with pytest.warns(UserWarning, match="token ids 96 to 99 have no row there"):
        ThinkerModule(model, ThinkerModuleConfig(init_from={"thinker": str(tmp_path)}))
    for ours, theirs in (
        (model.thinker.embed_tokens.weight, reference.model.embed_tokens.weight),
        (model.thinker.lm_head.weight, reference.lm_head.weight),
    ):
        assert torch.equal(ours[:96], theirs)
        torch.testing.assert_close(ours[96:], theirs.mean(0).expand(4, -1))


def test_what_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    save(folder, "experts")
    assert is_text_model(folder)
    with pytest.raises(ValueError, match=r"96 rows, the model's vocabulary 90; use the tokenizer.*vocab_size=96"):
        start_from(thinker(vocab_size=90), {"thinker": folder})
    with pytest.raises(ValueError, match=r"write module\.init_from=\{thinker: "):
        start_from(thinker(), folder)
    with pytest.raises(ValueError, match=r"init_from\.thinkr: there is no such part; did you mean thinker"):
        start_from(thinker(), {"thinkr": folder})
    with pytest.raises(ValueError, match="'Qwen3MoeForCausalLM'; an audio encoder is read from"):
        start_from(thinker(), {"aut": folder})
    with pytest.raises(ValueError, match=r"nowhere: neither the folder of a run .* nor one in the public format"):
        start_from(thinker(), {"thinker": tmp_path / "nowhere"})
    values = json.loads((folder / "config.json").read_text())
    for change, said in (
        ({"use_sliding_window": True}, "sliding windows are not supported"),
        ({"hidden_act": "gelu"}, "only 'silu' is supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_type is 'yarn'"),
        ({"architectures": ["LlamaForCausalLM"]}, "expected .*Qwen3"),
        ({"hidden_size": "32"}, "field hidden_size is '32'"),
    ):
        (folder / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(CheckpointError, match=said):
            load_text_model(folder, thinker())


def test_other_sizes_are_told_with_the_override_that_fits(tmp_path: Path) -> None:
    """The message's own words make a Thinker that the text model fits into."""
    save(tmp_path, "dense", num_hidden_layers=4, head_dim=32)
    with pytest.raises(CheckpointError, match=r"layers 4 \(model: 3\), head_dim 32 \(model: 16\)") as error:
        load_text_model(tmp_path, thinker())
    text = str(error.value).split("+model.thinker={")[1].removesuffix("}'")
    assert "mrope_sections:[6,5,5]" in text
    from omegaconf import OmegaConf

    told: Any = OmegaConf.to_container(OmegaConf.create("{" + text.replace(":", ": ") + "}"))
    assert load_text_model(tmp_path, thinker(**told)).missing_rows is None
