"""A few samples as shards, the overrides that make any recipe train on them in a second, and folders of models."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

import omnitrain.config.compose  # noqa: F401  (registers ${omnitrain.pack:})
from omnitrain.config.door import read
from omnitrain.config.locations import CONF
from omnitrain.config.saved import write_config
from omnitrain.data.chat import ChatTokenizer, train_bpe
from omnitrain.data.sample import SPLITS, Message, Sample, Segment
from omnitrain.data.shards import write_shards
from omnitrain.interop.public_format import save_pretrained
from omnitrain.models.omni import OmniModel

sys.path.insert(0, str(Path(__file__).parent / "training"))  # toy_training, forked_runs

WORDS = ["the", "cat", "sits", "on", "a", "red", "mat", "and", "looks", "at", "the", "blue", "moon"]


def toy_samples() -> list[Sample]:
    rng = random.Random(0)
    samples = []
    for split in SPLITS:
        for i in range(12 if split == "train" else 3):
            text = " ".join(rng.choices(WORDS, k=10))
            picture = io.BytesIO()
            Image.new("RGB", (64, 64), (rng.randrange(256), 0, 0)).save(picture, "PNG")
            document = Message(role="document", segments=(Segment(type="text", text=text),))
            question = (Segment(type="image", media=picture.getvalue()), Segment(type="text", text="the cat?"))
            answer = Message(role="assistant", segments=(Segment(type="text", text=text),))
            samples += [
                Sample(id=f"{split}/{i}/text", source="toy", split=split, messages=(document,)),
                Sample(
                    id=f"{split}/{i}/image",
                    source="toy",
                    split=split,
                    task="caption",
                    concept=str(i),
                    languages=("en",),
                    messages=(Message(role="user", segments=question), answer),
                ),
            ]
    return samples


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides: toy data, a model of two layers, no evaluation after training."""
    folder: Path = tmp_path_factory.mktemp("toy")
    write_shards(toy_samples(), folder, "toy", progress=False)
    train_bpe([" ".join(WORDS)] * 3, 400).save(folder / "tokenizer.json")
    return [
        "data=shards",
        f"data.tokenizer={folder}/tokenizer.json",
        f"+data.sources={{toy:{{path:{folder},split:train}}}}",
        *(
            f"+data.{which}_sources={{toy:{{path:{folder},split:{split}}}}}"
            for which, split in (("validation", "validation"), ("test", "heldout_cell"), ("predict", "heldout_cell"))
        ),
        "data.max_tokens=128",
        "data.num_workers=0",
        "+model.thinker={layers:2,accept_hidden_layer:1,d_model:32,heads:2,kv_heads:1,ffn:32,expert_width:16}",
        "+model.aut={d_model:16,layers:1,heads:2,ffn:16,conv_hidden:4}",
        "+model.vision={d_model:32,layers:2,heads:2,ffn:32,deepstack_layers:[0]}",
        "optim.warmup_steps=1",
        "trainer.val_check_interval=100",
        "evaluation.after_fit=false",
    ]


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:  # noqa: F821
    """Starts training runs as processes; see `forked_runs`."""
    from forked_runs import Runs

    server = Runs()
    yield server
    server.close()


@pytest.fixture(scope="module")
def public_dir(model: OmniModel, tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `model` and `tokenizer` of a test file, in the public format."""
    folder = tmp_path_factory.mktemp("public")
    save_pretrained(model, folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def run_dir(
    model: OmniModel, tokenizer: ChatTokenizer, model_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What `fit` leaves behind of the `model` that the overrides describe, and nothing more."""
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, model, tokenizer, model_overrides)
    return folder


def save_run(folder: Path, model: OmniModel, tokenizer: ChatTokenizer, overrides: list[str]) -> None:
    """Write the folder of a run whose tokenizer has been moved away."""
    (folder / "checkpoints").mkdir(parents=True)
    tokenizer.save(folder / "tokenizer.json")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        here = [f"paths.run_dir={folder}", f"data.tokenizer={folder}/tokenizer.json"]
        cfg = compose("config", overrides=[*here, *overrides])
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    values["data"]["tokenizer"] = "/moved/away/tokenizer.json"
    write_config(read(values), folder)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "checkpoints" / "last.ckpt")
