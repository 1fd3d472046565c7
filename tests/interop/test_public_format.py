"""Reading and writing checkpoint folders, and what is said about broken ones."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnitrain.data.batch import PackedBatch
from omnitrain.interop.public_config import (
    AUDIO,
    CODE2WAV,
    MTP,
    TALKER,
    TALKER_TEXT,
    TEXT,
    VISION,
    CheckpointError,
    public_config,
    read_config,
)
from omnitrain.interop.public_format import load_pretrained, public_tensors, save_pretrained
from omnitrain.interop.text_model import DENSE, READ, SPARSE
from omnitrain.models.omni import OmniModel
from omnitrain.models.presets import build, count_parameters, init_weights
from tests.interop.public_models import SPECIAL, public_sample, save_public_model

PIECES = [("text", 4), ("image", (1, 4, 6)), ("audio", 150), ("video", (2, 4, 4), 1.0), ("text", 6)]


def logits(model: OmniModel, sample) -> torch.Tensor:
    return model.thinker.logits(model(**PackedBatch.pack([sample.encoded]).model_inputs()).hidden)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("thinker")
    save_public_model(folder, variant=1)
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    save_public_model(folder, variant=0, kind="full")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.mark.parametrize("variant", [0, 1])
@pytest.mark.parametrize("layout", ["thinker", "full"])
def test_there_and_back(tmp_path: Path, layout: str, variant: int) -> None:
    """Saved by transformers, loaded and saved by us in several files, loaded by transformers: the same logits."""
    from transformers import Qwen3OmniMoeForConditionalGeneration, Qwen3OmniMoeThinkerForConditionalGeneration

    reference = save_public_model(tmp_path / "theirs", variant)
    sample = public_sample(reference.config, PIECES)
    save_pretrained(load_pretrained(tmp_path / "theirs"), tmp_path / "ours", layout=layout, max_shard_bytes=100_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    if layout == "thinker":
        back = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(tmp_path / "ours")
    else:
        back = Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path / "ours").thinker
    torch.testing.assert_close(
        back(**sample.reference_inputs).logits, reference(**sample.reference_inputs).logits, rtol=1e-5, atol=1e-5
    )
    ours = load_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(ours, sample), reference(**sample.reference_inputs).logits[0], rtol=0, atol=1e-4)
    assert ours.config.special_tokens["<|audio_pad|>"] == SPECIAL["audio"]


def test_the_public_keys_are_written(thinker: Path, tmp_path: Path) -> None:
    save_pretrained(load_pretrained(thinker), tmp_path)
    theirs, ours = load_file(thinker / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)


def test_a_full_checkpoint_keeps_its_talker(full: Path, tmp_path: Path) -> None:
    """Fine-tuned Thinker, everything else byte for byte as it was."""
    from transformers import Qwen3OmniMoeForConditionalGeneration

    model = load_pretrained(full)
    assert model.config.thinker.accept_hidden_layer == 2
    assert model.config.special_tokens["<|im_start|>"] == SPECIAL["im_start"]
    with torch.no_grad():
        model.thinker.norm.weight.mul_(2)
    save_pretrained(model, tmp_path, base=full)
    before, after = load_file(full / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"thinker.model.norm.weight"}
    assert before.keys() == after.keys()
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path).has_talker


def test_base_must_fit(thinker: Path, full: Path, tmp_path: Path) -> None:
    model = load_pretrained(thinker)
    with pytest.raises(CheckpointError, match=r"config\.json: base must be a full checkpoint"):
        save_pretrained(model, tmp_path, base=thinker)
    with pytest.raises(CheckpointError, match="other sizes"):
        save_pretrained(model, tmp_path, base=full)


def test_experts_may_be_stacked(thinker: Path, tmp_path: Path) -> None:
    tensors = load_file(thinker / "model.safetensors")
    prefix = "model.layers.1.mlp.experts."
    gate_up = [
        torch.cat([tensors.pop(f"{prefix}{e}.gate_proj.weight"), tensors.pop(f"{prefix}{e}.up_proj.weight")])
        for e in range(6)
    ]
    tensors[f"{prefix}gate_up_proj"] = torch.stack(gate_up)
    tensors[f"{prefix}down_proj"] = torch.stack([tensors.pop(f"{prefix}{e}.down_proj.weight") for e in range(6)])
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(thinker / "config.json", tmp_path)
    expected, actual = load_pretrained(thinker).state_dict(), load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(expected[k], actual[k]) for k in expected)


def test_rope_fields_of_older_files(thinker: Path, tmp_path: Path) -> None:
    config = json.loads((thinker / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope.pop("rope_theta")
    config["text_config"]["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == read_config(thinker)


def test_dtype_is_kept_or_chosen(thinker: Path, tmp_path: Path) -> None:
    save_pretrained(load_pretrained(thinker, dtype=torch.bfloat16), tmp_path)
    assert {p.dtype for p in load_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_pretrained(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_our_own_model_goes_out_and_comes_back(tmp_path: Path) -> None:
    model = build(
        "tiny", vocab_size=320, special_tokens={"<|audio_pad|>": 306, "<|image_pad|>": 308}, aut={"layers": 1}
    )
    init_weights(model, seed=0)
    save_pretrained(model, tmp_path)
    back = load_pretrained(tmp_path)
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))


def broken(source: Path, target: Path, *, config=None, tensors=None) -> Path:
    values, weights = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    if config:
        config(values)
    if tensors:
        tensors(weights)
    (target / "config.json").write_text(json.dumps(values))
    save_file(weights, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.self_attn.k_proj.weight"), r"key 'model.layers.0.self_attn.k_proj.weight' is"),
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), r"experts.3.up_proj.weight' is missing"),
        (lambda t: t.update({"model.layers.9.x": torch.ones(1)}), r"model.safetensors: unknown key 'model.layers.9.x'"),
        (
            lambda t: t.update({"visual.merger.mlp.2.bias": torch.ones(7)}),
            r"model.safetensors: key 'visual.merger.mlp.2.bias' has shape \[7\], config.json asks for \[48\]",
        ),
    ],
)
def test_a_broken_tensor_is_named(thinker: Path, tmp_path: Path, change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(broken(thinker, tmp_path, tensors=change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["text_config"].update(num_experts="4"), "config.json: field text_config.num_experts is '4'"),
        (lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[2, 3, 3]), "mrope_sections (2, 3, 3)"),
        (lambda c: c["text_config"].update(hidden_act="gelu"), "field text_config.hidden_act is 'gelu'"),
        (lambda c: c.update(tie_word_embeddings=True), "field tie_word_embeddings is True"),
        (lambda c: c.update(architectures=["LlamaForCausalLM"]), "architectures is 'LlamaForCausalLM'"),
        (lambda c: c.update(audio_config=3), "field audio_config must be an object"),
    ],
)
def test_a_broken_configuration_is_named(thinker: Path, tmp_path: Path, change, message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_pretrained(broken(thinker, tmp_path, config=change))


INSANE = [
    ("text_config.num_hidden_layers", 1_000_000, "must be a whole number from 1 to 1000"),
    ("text_config.num_hidden_layers", -3, "must be a whole number from 1"),
    ("text_config.hidden_size", "64", "must be a whole number"),
    ("text_config.hidden_size", 1e9, "must be a whole number"),
    ("text_config.hidden_size", 2**40, "to 131072"),
    ("text_config.hidden_size", True, "must be a whole number"),
    ("text_config.num_experts", 10**6, "to 16384"),
    ("text_config.vocab_size", 10**9, "to 16777216"),
    ("text_config.rms_norm_eps", "small", "must be of type float"),
    ("text_config.rms_norm_eps", float("nan"), "must be of type float"),
    ("text_config.attention_bias", "yes", "must be of type bool"),
    ("text_config.mlp_only_layers", [1, "2"], "must be a list of"),
    ("text_config.mlp_only_layers", 3, "must be a list of"),
    ("text_config.rope_parameters.mrope_section", [4, 4], "must be a list of 3 times"),
    ("text_config.rope_parameters.rope_theta", [1], "must be of type float"),
    ("text_config.rope_parameters", "default", "must be an object"),
    ("text_config.num_attention_heads", 0, "must be a whole number from 1"),
    ("audio_config.encoder_layers", 10**6, "from 1 to 1000"),
    ("vision_config.depth", 10**6, "from 1 to 1000"),
    ("vision_config.patch_size", 10**5, "from 1 to 64"),
    ("vision_config.num_position_embeddings", 17, "must be a square"),
    ("vision_config.deepstack_visual_indexes", list(range(10**5)), "must be a list"),
    ("audio_token_id", "a", "must be a whole number"),
    ("position_id_per_seconds", 0, "must be a whole number from 1"),
]


@pytest.mark.parametrize(("place", "value", "message"), INSANE)
def test_sizes_that_are_not_sane_are_refused_by_name(thinker: Path, tmp_path: Path, place, value, message) -> None:
    *outer, key = place.split(".")

    def change(values: dict) -> None:
        for name in outer:
            values = values[name]
        values[key] = value

    with pytest.raises(CheckpointError) as error:
        load_pretrained(broken(thinker, tmp_path, config=change))
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'config.json'}: field {place} ")
    assert message in said
    assert "\n" not in said


def test_a_model_of_too_many_parameters_is_not_built(thinker: Path, tmp_path: Path) -> None:
    """Each size is sane by itself, their product is not."""
    huge = {"num_hidden_layers": 900, "num_experts": 16384, "moe_intermediate_size": 4096, "num_experts_per_tok": 2}
    said = r"config\.json: describes .*e\+1\d parameters, most of .*text_config; at most"
    with pytest.raises(CheckpointError, match=said):
        load_pretrained(broken(thinker, tmp_path, config=lambda c: c["text_config"].update(huge)))


def test_sizes_that_contradict_each_other_are_refused_by_place(thinker: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: text_config: .*heads \(3\) must be a multiple"):
        load_pretrained(broken(thinker, tmp_path, config=lambda c: c["text_config"].update(num_key_value_heads=2)))


@pytest.mark.parametrize("text", ["[1, 2]", "[" * 100_000, "", '"config"', "{"])
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        load_pretrained(tmp_path)


def test_an_index_names_files_of_its_own_folder(thinker: Path, tmp_path: Path) -> None:
    shutil.copy(thinker / "config.json", tmp_path)
    weight_map = {"lm_head.weight": str(thinker / "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="expected a file of the same folder"):
        load_pretrained(tmp_path)


def test_old_weights_stay_until_the_new_ones_are_written(thinker: Path, tmp_path: Path, monkeypatch) -> None:
    model = load_pretrained(thinker)
    save_pretrained(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr("omnitrain.interop.public_format.save_file", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pretrained(model, tmp_path, layout="full")
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_folder_without_a_checkpoint(thinker: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_pretrained(tmp_path)
    shutil.copy(thinker / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "a.st"}}))
    with pytest.raises(CheckpointError, match=r"is missing|a\.st"):
        load_pretrained(tmp_path)


def test_the_full_size_is_the_reference_s() -> None:
    """`config.json` of our 30B preset, built by transformers on the meta device: every parameter count agrees."""
    from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    with torch.device("meta"):
        ours = build("qwen3_omni_30b_a3b")
        config = Qwen3OmniMoeThinkerConfig.from_dict(public_config(ours.config, "thinker"))
        reference = Qwen3OmniMoeThinkerForConditionalGeneration(config)
    assert count_parameters(ours.aut) == count_parameters(reference.model.audio_tower)
    assert count_parameters(ours.visual) == count_parameters(reference.model.visual)
    decoder = count_parameters(reference.model.language_model) + count_parameters(reference.lm_head)
    assert count_parameters(ours.thinker) == decoder


def _without_defaults(section: dict, reference) -> dict:
    """`section` without the fields that stand in it with the default of the reference's configuration class."""
    kept = {}
    for key, value in section.items():
        default = getattr(reference, key, None)
        if isinstance(value, dict) and key.endswith("_config"):
            value = _without_defaults(value, default)
        elif value == (list(default) if isinstance(default, tuple) else default) and key != "architectures":
            continue
        kept[key] = value
    return kept


def _as_in_4_57(config: dict) -> dict:
    """The rotary base beside `rope_scaling`, and the older word for the type of the numbers."""
    old = {key: _as_in_4_57(value) if isinstance(value, dict) else value for key, value in config.items()}
    if rope := old.pop("rope_parameters", None):
        old["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope["rope_type"]
        if "mrope_section" in rope:
            old["rope_scaling"] = rope
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    return old


@pytest.mark.parametrize("layout", ["whole", "without_defaults", "4.57", "4.57_without_defaults"])
def test_the_published_configuration(layout: str, tmp_path: Path) -> None:
    """With and without the fields that transformers fills in, 28,010 tensors and 35,259,818,545 numbers."""
    from transformers import Qwen3OmniMoeConfig

    with torch.device("meta"):
        config = public_config(build("qwen3_omni_30b_a3b", speech=True).config, "full")
    if "without" in layout:
        config = _without_defaults(config, Qwen3OmniMoeConfig())
        assert not {"num_position_embeddings", "depth"} & set(config["thinker_config"].get("vision_config", {}))
    if "4.57" in layout:
        config = _as_in_4_57(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, prefix = read_config(tmp_path)
    with torch.device("meta"):
        model = OmniModel(ours)
        tensors = list(public_tensors(model, "full"))
    assert prefix == "thinker."
    assert len(tensors) == 28_010
    assert sum(t.numel() for _, t in tensors) == 35_259_818_545


def test_every_default_is_that_of_transformers() -> None:
    from transformers import Qwen3Config, Qwen3MoeConfig, Qwen3OmniMoeConfig

    full = Qwen3OmniMoeConfig()
    thinker, talker = full.thinker_config, full.talker_config
    theirs = [
        (TEXT, thinker.text_config), (AUDIO, thinker.audio_config), (VISION, thinker.vision_config),
        (TALKER, talker), (TALKER_TEXT, talker.text_config), (MTP, talker.code_predictor_config),
        (CODE2WAV, full.code2wav_config), (READ[DENSE], Qwen3Config()), (READ[SPARSE], Qwen3MoeConfig()),
    ]  # fmt: skip
    for part, reference in theirs:
        for key, value in part.defaults.items():
            if callable(value) or key == "trim":  # computed there too; ours alone
                assert not hasattr(reference, key)
                continue
            default = getattr(reference, key)
            if key == "speaker_id":
                default = default or {}
            assert value == (tuple(default) if isinstance(default, list) else default), (part.model_type, key)
        if "rope_theta" in {f.name for f in fields(part.config)}:
            assert part.theta == reference.default_theta or part.theta == reference.rope_parameters["rope_theta"]
