"""AuT's training: from shards to its losses, beside torch's own; what learns; resume to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from omnitrain.config.run_config import (
    AuTGenerationConfig,
    AuTLossConfig,
    AuTModuleConfig,
    CheckpointConfig,
    OptimConfig,
    SpecAugmentConfig,
)
from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.data.datamodule import OmniDataModule
from omnitrain.data.settings import AugmentConfig, DataConfig, SourceConfig
from omnitrain.evaluation.metrics import cer
from omnitrain.generation.rescore import Rescoring, rescored
from omnitrain.generation.sampling import Decoding
from omnitrain.generation.transcribe import BeamSearch, transcribe
from omnitrain.models.aut_decoder import AuT
from omnitrain.models.presets import init_weights
from omnitrain.models.sizes import AuTConfig, AuTDecoderConfig, AuTModelConfig
from omnitrain.training.aut import AuTModule, error_rates, spec_augment
from omnitrain.training.callbacks import AtomicCheckpoint
from omnitrain.training.logging import ExactCsvLogger

PACK = Path(__file__).parents[2] / "omnitrain/pack"


def tiny_aut(seed: int = 0, ctc_slots: int = 4) -> AuT:
    encoder = AuTConfig(d_model=32, layers=1, heads=2, ffn=32, conv_hidden=4)
    decoder = AuTDecoderConfig(d_model=32, layers=1, heads=2, ffn=32, vocab_size=4096)
    model = AuT(AuTModelConfig(encoder=encoder, decoder=decoder, ctc_slots=ctc_slots))
    init_weights(model, seed)
    return model


ALONE = {"rank": 0, "world_size": 1}


def recordings(share: dict[str, int] = ALONE, **settings: Any) -> OmniDataModule:
    rows = {"task": ["asr", "s2tt"], "languages": ["es", "es>ca"]}
    source = SourceConfig(path=str(PACK), split="train", where=rows, limit=40)
    config = DataConfig(
        tokenizer=str(PACK / "tokenizer.json"),
        sources={"speech": source},
        validation_sources={"speech": replace(source, limit=6, where={"task": ["asr"], "languages": ["es"]})},
        max_tokens=400,
        num_workers=0,
        **settings,
    )
    data = OmniDataModule(config, **share)
    data.setup("fit")
    return data


def a_batch(data: OmniDataModule) -> PackedBatch:
    return next(iter(data.train_dataloader()))


def module(**config: Any) -> AuTModule:
    optim = OptimConfig(lr=3e-3, warmup_steps=1, schedule="constant")
    made = AuTModule(tiny_aut(seed=1), AuTModuleConfig(**config), optim)  # one that does not say the same of all
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    vars(trainer)["datamodule"] = recordings()
    made.trainer = vars(made)["kept"] = trainer
    return made


def test_stripes_are_the_mean_and_keep_to_their_bounds() -> None:
    torch.manual_seed(0)
    mel = torch.randn(300, 16)
    config = SpecAugmentConfig(time_stripes=1, time_width=20, time_share=0.5, frequency_stripes=1, frequency_width=5)
    changed = spec_augment(mel, [100, 200], config)
    for part, before in zip(changed.split([100, 200]), mel.split([100, 200]), strict=True):
        hidden = part != before
        assert torch.allclose(part[hidden], before.mean())
        assert int(hidden.all(1).sum()) <= 20
        assert int(hidden.all(0).sum()) <= 5
    assert not torch.equal(changed, mel)
    none = SpecAugmentConfig(time_stripes=0, frequency_stripes=0)
    assert torch.equal(spec_augment(mel, [100, 200], none), mel)


def test_losses_are_the_decoders_and_the_encoders() -> None:
    made = module(spec_augment=None).eval()
    batch = a_batch(made.datamodule)
    found = made.losses(batch)
    output = made.model(**batch.model_inputs())
    nll = F.cross_entropy(made.model.decoder.logits(output.hidden), batch.labels, ignore_index=IGNORE, reduction="sum")
    ctc, n_bytes = made.ctc_losses(batch, output)
    torch.testing.assert_close(found.total, nll + 0.3 * torch.stack(ctc).sum())
    assert len(ctc) == sum(task == "asr" for task in batch.tasks) > 0
    # The text of the transcripts alone: neither the prompt, nor the token that ends an answer.
    said = made.datamodule.tokenizer.decode(made._targets(batch)[batch.tasks.index("asr")])
    assert said == said.strip() != ""
    texts = map(made.datamodule.tokenizer.decode, made._targets(batch))
    assert n_bytes == sum(len(t.encode()) for t, task in zip(texts, batch.tasks, strict=True) if task == "asr")
    groups = dict(found.groups)
    assert ("ctc", "ctc") in groups
    found.total.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in made.model.parameters())


def test_a_head_is_needed_for_ctc() -> None:
    with pytest.raises(ValueError, match=r"model\.ctc_slots=4"):
        AuTModule(tiny_aut(ctc_slots=0))
    AuTModule(tiny_aut(ctc_slots=0), AuTModuleConfig(loss=AuTLossConfig(ctc=0)))


def test_transcripts_are_written_as_the_configuration_says() -> None:
    """Greedily, and by a beam search with the time of each word; each sample's own recording bounds its times."""
    data = recordings()
    prompts = a_batch(data).prompts()
    greedy = module().eval()
    rows = greedy.predict_step(prompts, 0)
    assert [row["id"] for row in rows] == list(prompts.sample_ids)
    stop = data.tokenizer.stop_ids
    written = transcribe(greedy.model, prompts, Decoding(max_new_tokens=256), stop_ids=stop)
    assert [row["text"] for row in rows] == [data.tokenizer.decode(ids) for ids in written]
    assert set(rows[0]) == {"id", "source", "task", "languages", "text"}

    search = BeamSearch(width=3, length_penalty=2.0, max_new_tokens=4)
    found = transcribe(greedy.model, prompts, search, stop_ids=stop)
    assert found != [ids[:4] for ids in written]
    seconds = [n / 100 for n in prompts.mel_lengths.tolist()]
    for by in ("ctc", "attention"):
        wanted = AuTGenerationConfig(beam=3, length_penalty=2.0, max_new_tokens=4, timestamps=by)
        rows = module(generation=wanted).eval().predict_step(prompts, 0)
        assert [row["text"] for row in rows] == [data.tokenizer.decode(ids) for ids in found]
        assert sum(len(row["words"]) for row in rows) > 1
        for row, end in zip(rows, seconds, strict=True):
            assert "".join(word["text"] for word in row["words"]) == "".join(row["text"].split())
            assert all(0 <= word["start"] < word["end"] <= end for word in row["words"])


def test_both_halves_write_transcripts_and_the_decoder_all_else() -> None:
    data = recordings()
    prompts = a_batch(data).prompts()
    assert set(prompts.tasks) == {"asr", "s2tt"}
    made = module(generation=AuTGenerationConfig(ctc_weight=0.5, max_new_tokens=4)).eval()
    texts = [row["text"] for row in made.predict_step(prompts, 0)]
    alone = transcribe(made.model, prompts, Decoding(max_new_tokens=4), stop_ids=data.tokenizer.stop_ids)
    both = rescored(made.model, prompts, data.tokenizer.encode, data.tokenizer.stop_ids[0], Rescoring())
    for task, text, ids, together in zip(prompts.tasks, texts, alone, both, strict=True):
        assert text == (together if task == "asr" else data.tokenizer.decode(ids))


def test_nonsense_about_transcripts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"module\.generation\.beam=0"):
        AuTGenerationConfig(beam=0)
    with pytest.raises(ValueError, match="draws nothing"):
        AuTGenerationConfig(beam=2, temperature=0.5)
    with pytest.raises(ValueError, match=r"module\.generation\.ctc_weight"):
        AuTGenerationConfig(ctc_weight=2.0)
    loss, weighed = AuTLossConfig(ctc=0), AuTGenerationConfig(ctc_weight=0.5)
    with pytest.raises(ValueError, match=r"ctc_weight needs model\.ctc_slots=4"):
        AuTModule(tiny_aut(ctc_slots=0), AuTModuleConfig(loss=loss, generation=weighed))
    by = AuTGenerationConfig(timestamps="ctc")
    with pytest.raises(ValueError, match=r"timestamps=ctc needs model\.ctc_slots=4"):
        AuTModule(tiny_aut(ctc_slots=0), AuTModuleConfig(loss=loss, generation=by))


def test_error_rates_by_language_are_jiwers() -> None:
    rows = [("es", "una vaca", "una baca"), ("es", "un gat", "gat"), ("fr", "un chat", "un chat")]
    rates = error_rates(rows)
    assert rates["validation/cer/es"] == cer(["una baca", "gat"], ["una vaca", "un gat"])
    assert rates["validation/cer/fr"] == 0
    assert rates["validation/cer"] == cer([h for _, _, h in rows], [r for _, r, _ in rows])
    assert error_rates([]) == {}


def run(folder: Path, steps: int, resume: bool = False) -> AuTModule:
    L.seed_everything(0, workers=True, verbose=False)
    made = AuTModule(tiny_aut(), AuTModuleConfig(), OptimConfig(lr=3e-3, warmup_steps=1, schedule="constant"))
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=[ExactCsvLogger(run_dir=folder)],
        callbacks=[AtomicCheckpoint(CheckpointConfig(every_n_steps=2), run_dir=folder)],
        log_every_n_steps=1, val_check_interval=4, limit_val_batches=2,
        check_val_every_n_epoch=None, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    path = folder / "checkpoints/last.ckpt" if resume else None
    trainer.fit(made, recordings(augment=AugmentConfig()), ckpt_path=path, weights_only=True)
    return made


def test_resumed_is_uninterrupted_with_all_that_is_random(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 2)
    parts = run(tmp_path / "parts", 6, resume=True)
    for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    rows = [(tmp_path / which / "metrics.csv").read_text() for which in ("whole", "parts")]
    assert rows[0] == rows[1]
    header = rows[0].splitlines()[0].split(",")
    assert {
        "train/loss",
        "train/loss/ctc",
        "validation/cer",
        "validation/cer/es",
        "validation/cer_ctc",
        "gradient_norm/ctc",
    } <= set(header)
