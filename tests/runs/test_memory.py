"""What a run will take, before anything is loaded: compared with what a run has taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omnitrain.config.compose import run_config
from omnitrain.config.run_config import RunConfig
from omnitrain.config.typed import ConfigError
from omnitrain.interop.public_format import load_pretrained
from omnitrain.models.omni import OmniModel
from omnitrain.runs import memory
from omnitrain.runs.memory import available_memory, check_memory, gigabytes, training_memory
from omnitrain.training.optim import adamw, parameter_groups
from omnitrain.training.thinker import ThinkerModule
from tests.interop.public_models import save_small_folder

LORA = "module.lora={rank:4,parts:[thinker,aut],targets:[attention,mlp,experts]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_folder(tmp_path_factory.mktemp("public"))


def config_of(folder: Path, *more: str) -> RunConfig:
    return run_config(["+recipe=finetune", f"model.folder={folder}", *more])


@pytest.mark.parametrize("more", [(), ("module.train=[router,aut_adapter]",), (LORA, "module.train=[head]")])
def test_it_is_what_a_step_leaves(folder: Path, more: tuple[str, ...]) -> None:
    """Bytes of weights, gradients and AdamW's moments after one step in which every trained number had a gradient."""
    config = config_of(folder, *more)
    said = training_memory(config)
    with torch.device("cpu"):
        model = OmniModel(memory._on_meta(config.model.config)[0].config)
    ThinkerModule(model, config.module.config, config.optim)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer = adamw(parameter_groups(model, config.optim), config.optim)
    optimizer.step()
    assert said.weights == sum(p.nbytes for p in model.parameters())
    assert said.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert said.optimizer == sum(x.nbytes for s in optimizer.state.values() for x in s.values() if x.ndim)
    assert said.total - said.sums == sum(said.by_part.values())
    assert (said.sums > 0) == any("experts" in word for word in more)


def test_frozen_weights_keep_their_dtype_where_they_can(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"float32"', '"bfloat16"'))
    sizes = [
        training_memory(config_of(folder, "module.train=[head]", f"trainer.precision={precision}")).weights
        for precision in ("32-true", "bf16-mixed")
    ]
    (folder / "config.json").write_text(text)
    head = 4096 * 32  # words of the pack's tokenizer
    numbers = sizes[0] // 4
    assert sizes[1] == 2 * (numbers - head) + 4 * head


def test_experts_with_adapters_stay_unless_they_are_computed_again(folder: Path) -> None:
    """Two layers of 8 experts: both kept, and the gradient of one; or one, and its gradient."""
    experts = 8 * (2 * 16 * 32 + 32 * 16) * 4
    again = training_memory(config_of(folder, LORA))
    kept = training_memory(config_of(folder, LORA, "module.activation_checkpointing=[]"))
    assert (again.sums, kept.sums) == (2 * experts, 3 * experts)


def test_processes(folder: Path) -> None:
    """Each has its own copy, and DDP its own copy of the gradients."""
    one, two = (training_memory(config_of(folder, f"trainer.devices={n}")) for n in (1, 2))
    assert two.gradients == 2 * one.gradients
    assert two.weights == one.weights


def test_a_shared_copy(folder: Path) -> None:
    """Each process has its shards of all, and gradients once."""
    one = training_memory(config_of(folder))
    for options in (["parallel=fsdp"], ["parallel=fsdp_ep"], ["parallel=fsdp_ep_cp"]):
        four = training_memory(config_of(folder, *options, "trainer.devices=4"))
        assert 4 * four.total == pytest.approx(one.total, abs=16)
        largest = max(x.nbytes for x in load_pretrained(folder, dtype=torch.float32, speech=False).parameters())
        assert (one.beginning, four.beginning) == (0, 2 * largest)  # what is drawn, and its product
    copies = training_memory(config_of(folder, "parallel=fsdp", "parallel.shard=2", "trainer.devices=4"))
    assert 2 * copies.total == pytest.approx(one.total, abs=16)
    with pytest.raises(ConfigError, match=r"parallel\.shard=3: does not divide 4"):
        training_memory(config_of(folder, "parallel=fsdp", "parallel.shard=3", "trainer.devices=4"))


def test_a_codec_and_aut_alone_are_counted() -> None:
    codec = training_memory(run_config(["+recipe=codec"]))
    assert codec.weights * 4 == codec.total
    assert codec.by_part.keys() == {"codec", "discriminators"}
    aut = training_memory(run_config(["+recipe=aut_quickstart", "module.train=[aut_decoder]"]))
    assert aut.weights > aut.gradients == aut.optimizer // 2 > 0


def test_what_cannot_fit_is_stopped(folder: Path, monkeypatch, capsys) -> None:
    check_memory(config_of(folder))
    assert capsys.readouterr().out.startswith("memory before activations: ")
    monkeypatch.setattr(memory, "available_memory", lambda: 10**7)
    with pytest.raises(ConfigError) as error:
        check_memory(config_of(folder, "trainer.devices=2"))
    said = str(error.value)
    assert said.startswith("this run cannot fit: before activations it takes ")
    assert "there are 10.0 MB free here; train less of it (module.train=[PART, ...], or adapters" in said
    assert "\n" not in said
    check_memory(config_of(folder, "module.train=[aut_adapter]"))


def test_the_public_model() -> None:
    """30B-A3B: 31.7 billion numbers without speech; 16 bytes each where all learn."""
    whole = training_memory(run_config(["model=qwen3_omni_30b_a3b", "data.tokenizer=x", "model.special_tokens={}"]))
    assert whole.total == 16 * whole.weights // 4
    assert gigabytes(whole.total) == "507.5 GB"


def test_what_is_free(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal:  2000 kB\nMemAvailable:   1000 kB\n")
    assert available_memory(tmp_path, tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    assert available_memory(tmp_path, tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("9000\n")
    assert available_memory(tmp_path, tmp_path) == 4000
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 3000\n")
    assert available_memory(tmp_path, tmp_path) == 7000


def test_sizes_in_words() -> None:
    assert [gigabytes(n) for n in (1500, 2_500_000, 507_500_000_000)] == ["2 kB", "2.5 MB", "507.5 GB"]
