"""Real shards and media through the data module: workers, resume, Lightning, settings, loaders."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import lightning as L
import numpy as np
import pytest
import torch

from omnitrain.config.typed import typed
from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.data.chat import train_bpe
from omnitrain.data.composition import fingerprint
from omnitrain.data.datamodule import OmniDataModule
from omnitrain.data.media import encode_audio, encode_image, encode_video
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.settings import DataConfig
from omnitrain.data.shards import SampleSource, write_media_table, write_shards
from omnitrain.data.stream import TooManyBadSamples
from omnitrain.data.work import Work
from omnitrain.vocabulary import AUDIO, IMAGE, VIDEO
from tests.data import corrupt

RNG = np.random.default_rng(0)
MEDIA = ["image", "audio", "video"]
WORDS = ("a red fire truck drives to the left", "then the cat meows", "while it rains", "on the green hill")


def words(n):
    return " ".join(RNG.choice(WORDS, max(1, n // 4)))


def sample(kind, i, split="train", media=None, with_audio=False, answer=None):
    if kind == "text":
        messages = (Message(role="document", segments=(Segment(type="text", text=words(int(RNG.integers(3, 150)))),)),)
    else:
        question = (
            Segment(type=kind, media=media, with_audio=with_audio),
            Segment(type="text", text="What is this?"),
        )
        messages = (
            Message(role="user", segments=question),
            Message(role="assistant", segments=(Segment(type="text", text=answer or words(6)),)),
        )
    return Sample(id=f"{kind}/{split}/{i}", source="toys", messages=messages, split=split, task=kind, languages=("en",))


def picture(i):
    return encode_image(RNG.integers(0, 255, (40 + i, 64, 3), dtype=np.uint8))


def wave(seconds):
    return (0.1 * RNG.standard_normal(int(16_000 * seconds))).astype(np.float32)


def clip(i):
    frames = RNG.integers(0, 255, (12, 48, 64, 3), dtype=np.uint8)
    return encode_video(frames, fps=6, audio=wave(2.0), preset="ultrafast")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    samples = []
    for split, n in (("train", 8), ("validation", 3)):
        samples += [sample("text", i, split) for i in range(3 * n)]
        samples += [sample("image", i, split, picture(i)) for i in range(n)]
        samples += [sample("audio", i, split, encode_audio(wave(0.7 + 0.1 * i), 16_000, "flac")) for i in range(n)]
        samples += [sample("video", i, split, clip(i), with_audio=i % 2 == 0) for i in range(n // 3 + 1)]
    samples.append(sample("image", 99, media=picture(0)[:100]))
    write_shards(samples, folder, "toys", progress=False)
    train_bpe([s.reference for s in samples], 400).save(folder / "tokenizer.json")
    return folder


def module(folder, **changes):
    others = {
        name: changes.pop(name)
        for name in ("seed", "run_dir", "vocab_size", "work", "rank", "world_size")
        if name in changes
    }
    config = typed(
        DataConfig,
        {
            "sources": {
                "media": {
                    "path": folder,
                    "split": "train",
                    "where": {"task": ["image", "audio", "video"]},
                    "weight": 2,
                },
                "text": {"path": folder, "split": "train", "where": {"task": "text"}, "weight": 1},
            },
            "tokenizer": folder / "tokenizer.json",
            "validation_sources": {"toys": {"path": folder, "split": "validation"}},
            "max_tokens": 160,
            "max_mel_frames": 400,
            "max_patches": 256,
            "window": 3,
            "max_bad_fraction": 0.2,
            "vision": {"min_pixels": 32 * 32, "max_pixels": 64 * 64, "video_min_pixels": 32 * 32},
            "num_workers": 0,
            **changes,
        },
        "data",
    )
    return OmniDataModule(config, **{"seed": 1, **others})


def take(data, n, train=True):
    batches = []
    try:
        for batch in data.train_dataloader():
            batches.append(batch)
            if train:
                data.mark_trained(batch)
            if len(batches) == n:
                return batches
    finally:
        data.teardown("fit")
    raise AssertionError("the training loader ended")


def assert_equal(a: PackedBatch, b: PackedBatch):
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype, name
            assert torch.equal(value, other), name
        else:
            assert value == other, name


@pytest.fixture(scope="module")
def uninterrupted(folder):
    return take(module(folder), 16)


def test_every_modality_arrives(uninterrupted):
    assert {m for batch in uninterrupted for m in batch.modalities} == {
        "text",
        "image",
        "audio",
        "video",
        "audio_video",
    }
    for batch in uninterrupted:
        assert batch.n_tokens <= 160
        types = batch.token_types
        if batch.patches is not None:
            assert ((types == IMAGE) | (types == VIDEO)).sum() == len(batch.patches) // 4
            assert len(batch.patches) == batch.grid_thw.prod(1).sum() <= 256
        if batch.mel is not None:
            assert len(batch.mel) == batch.mel_lengths.sum() <= 400
            full, rest = batch.mel_lengths // 100, batch.mel_lengths % 100
            assert (types == AUDIO).sum() == (full * 13 + (rest + 7) // 8).sum()
        assert (batch.labels != IGNORE).any()
    assert uninterrupted[-1].skipped["image_corrupt"] >= 1


def test_packed_equals_alone(folder, uninterrupted):
    data = module(folder)
    sources = data.opened("sources")
    alone = {s.id: (source, s) for source in sources.values() for s in map(source.__getitem__, range(len(source)))}
    for batch in uninterrupted[:4]:
        for k, name in enumerate(batch.sample_ids):
            if "@" in name:
                continue
            source, one = alone[name]
            encoded = data.encoder(one, source.media_bytes)
            a, b = batch.cu_seqlens[k : k + 2].tolist()
            assert np.array_equal(batch.position_ids[:, a:b].numpy(), encoded.position_ids)
            assert np.array_equal(batch.labels[a:b].numpy(), encoded.labels)


def test_resume_at_every_batch(folder, uninterrupted):
    data = module(folder)
    loader = iter(data.train_dataloader())
    for stop in range(12):
        batch = next(loader)
        data.mark_trained(batch)
        state = json.loads(json.dumps(data.state_dict()))
        resumed = module(folder)
        resumed.load_state_dict(state)
        for a, b in zip(uninterrupted[stop + 1 :], take(resumed, 3), strict=False):
            assert_equal(a, b)


@pytest.mark.slow
def test_workers_and_threads_change_nothing(folder, uninterrupted):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        data = module(folder, num_workers=2)
        data.load_state_dict({"settings": data._settings(), "ranks": [uninterrupted[4].stream_state]})
        batches = take(data, 11)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(uninterrupted[5:], batches, strict=True):
        assert_equal(a, b)


def test_reading_ahead_is_not_training(folder, uninterrupted):
    data = module(folder)
    loader = iter(data.train_dataloader())
    batches = [next(loader) for _ in range(4)]
    data.mark_trained(batches[1])
    resumed = module(folder)
    resumed.load_state_dict(data.state_dict())
    assert_equal(take(resumed, 1)[0], uninterrupted[2])
    # and iterating the same module again goes on after the last trained batch
    assert_equal(next(iter(data.train_dataloader())), uninterrupted[2])
    with pytest.raises(ValueError, match="training loader"):
        data.mark_trained(next(iter(data.val_dataloader())))


def test_state_of_an_untrained_module_is_the_start(folder, uninterrupted):
    resumed = module(folder)
    resumed.load_state_dict(module(folder).state_dict())
    assert_equal(take(resumed, 1)[0], uninterrupted[0])


def test_settings_that_would_change_the_stream_are_named(folder, uninterrupted):
    data = module(folder)
    data.mark_trained(uninterrupted[3])
    state = data.state_dict()
    for changes, name in [
        ({"seed": 2}, "seed: 1 -> 2"),
        ({"max_tokens": 170}, "budget"),
        ({"window": 4}, "window: 3 -> 4"),
        ({"sources": {"text": {"path": folder, "where": {"task": "text"}}}}, "sources"),
        ({"vision": {"min_pixels": 64 * 64}}, "features"),
        ({"stages": [{"until_tokens": 5, "max_tokens": 100}, {}]}, "stages"),
    ]:
        with pytest.raises(ValueError, match=f"cannot continue exactly.*{name}"):
            module(folder, **changes).load_state_dict(state)
    with pytest.raises(ValueError, match="2 processes cannot share the 1 streams"):
        module(folder, rank=0, world_size=2).load_state_dict(state)
    # a later stage may be planned afterwards, and workers are free
    module(folder, stages=[{"until_tokens": 10**6}, {"max_tokens": 320}], num_workers=3).load_state_dict(state)


def test_other_content_of_the_same_size_is_noticed(folder, uninterrupted, tmp_path):
    data = module(folder)
    data.mark_trained(uninterrupted[3])
    state = data.state_dict()
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    module(moved).load_state_dict(state)
    [shard] = moved.glob("*.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"data source .media. holds other content.*module\.init_from"):
        module(moved).load_state_dict(state)
    del state["settings"]["content"]  # as in a checkpoint of before it was noted
    module(moved).load_state_dict(state)


def test_fingerprints_see_large_files_and_media_beside_the_shards(tmp_path):
    class Blob:
        name = "blob"

        def __init__(self, content):
            self.path = tmp_path / "large.parquet"
            self.path.write_bytes(content)

        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise BadSample("row_invalid", "not looked at here")

        def locate(self, index):
            return str(self.path), 0

    whole = RNG.bytes(3 << 20)
    changed = [b"?" + whole[1:], whole[:-1] + b"?", whole + b"?", whole]
    assert len({fingerprint(Blob(content)) for content in changed}) == 4
    assert fingerprint(Blob(whole)) == fingerprint(Blob(whole))

    message = Message(role="user", segments=(Segment(type="image", path="media.parquet#a"),))
    write_shards([Sample(id="a", source="s", messages=(message,))], tmp_path / "shards", "s", progress=False)
    seen = set()
    for pixel in (b"1", b"2"):
        write_media_table([("a", pixel)], tmp_path / "shards" / "media.parquet")
        seen.add(fingerprint(SampleSource(tmp_path / "shards")))
    assert len(seen) == 2


class Trained(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.ids = []

    def training_step(self, batch, batch_idx):
        self.ids.append(batch.sample_ids)
        self.trainer.datamodule.mark_trained(batch)
        return self.weight * batch.n_tokens

    def validation_step(self, batch, batch_idx):
        assert isinstance(batch, PackedBatch)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        assert isinstance(batch, PackedBatch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return L.Trainer(**quiet, enable_checkpointing=False, **kwargs)


def test_lightning_trains_checkpoints_and_resumes(folder, uninterrupted, tmp_path):
    first = Trained()
    run = trainer(max_steps=5, val_check_interval=2)
    run.fit(first, module(folder))
    assert first.ids == [batch.sample_ids for batch in uninterrupted[:5]]
    run.save_checkpoint(tmp_path / "last.ckpt")
    second = Trained()
    data = module(folder)
    trainer(max_steps=9).fit(second, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert second.ids == [batch.sample_ids for batch in uninterrupted[5:9]]
    assert data._stream is None  # worker processes are gone
    trainer().test(second, module(folder, test_sources={"toys": data.validation_sources[0], "text": data.sources[1]}))


def test_validation_is_finite_and_repeats(folder):
    data = module(folder)
    packs = list(data.val_dataloader())
    for a, b in zip(packs, data.val_dataloader(), strict=True):
        assert_equal(a, b)
    ids = {name.partition("@")[0] for batch in packs for name in batch.sample_ids}
    assert ids == {s.id for s in data.opened("validation_sources")["toys"]}
    assert not hasattr(data.train_dataloader(), "__len__")
    assert not hasattr(data.train_dataloader(), "state_dict")


def test_prompts_end_where_the_answer_begins(folder):
    data = module(folder)
    prompts = {name: batch for batch in data.predict_dataloader() for name in batch.sample_ids}
    batch = prompts["image/validation/0"]
    k = batch.sample_ids.index("image/validation/0")
    a, b = batch.cu_seqlens[k : k + 2].tolist()
    shown = data.tokenizer.decode(batch.input_ids[a:b].tolist(), skip_special=False)
    assert shown.endswith("<|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\n")
    assert (batch.labels[a:b] == IGNORE).all()


def test_planned_and_seen(folder, uninterrupted):
    data = module(folder, stages=[{"until_tokens": 100, "weights": {"text": 1}}, {}])
    plan = data.planned_mixture()
    assert plan[0] == {"until_tokens": 100, "shares": {"media": 0.0, "text": 1.0}}
    assert plan[1]["shares"] == {"media": pytest.approx(2 / 3), "text": pytest.approx(1 / 3)}
    data = module(folder)
    assert data.seen_mixture()["tokens"] == 0
    data.mark_trained(uninterrupted[-1])
    seen = data.seen_mixture()
    assert seen["tokens"] == sum(batch.n_tokens for batch in uninterrupted)
    assert seen["seen"]["source"]["samples"].keys() == {"media", "text"}
    assert set(seen["seen"]["modality"]["tokens"]) == {"text", "image", "audio", "video", "audio_video"}
    assert abs(seen["drawn"]["media"] - 2 / 3 * sum(seen["drawn"].values())) < 1
    assert 0.5 < seen["packing_efficiency"] <= 1
    assert seen["skipped"]["image_corrupt"] >= 1


def test_weights_default_to_the_number_of_samples(folder):
    data = module(folder, sources={"all": {"path": folder}, "few": {"path": folder, "limit": 10}})
    n = len(data.opened("sources")["all"])
    assert data.planned_mixture()[0]["shares"] == {
        "all": pytest.approx(n / (n + 10)),
        "few": pytest.approx(10 / (n + 10)),
    }


def test_bad_samples_land_in_the_log(folder, tmp_path):
    data = module(folder, run_dir=tmp_path / "run")
    batches = take(data, 12)
    records = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert records[0]["id"] == "image/train/99"
    assert records[0]["reason"] == "image_corrupt"
    assert records[0]["shard"].endswith("toys-00000-of-00001.parquet")
    assert len(records) == sum(batches[-1].skipped.values())


def test_every_kind_of_corrupt_sample_is_skipped_counted_and_logged(folder, tmp_path):
    shard, reasons = corrupt.corrupt_shard(tmp_path)
    log = tmp_path / "bad_samples.jsonl"
    settings = {"sources": {"corrupt": {"path": shard}}, "max_tokens": 600, "max_patches": 600, "seed": 0}
    data = module(folder, **settings, validation_sources=settings["sources"], max_bad_fraction=1, run_dir=tmp_path)
    packs = list(data.val_dataloader())
    assert sum(len(batch) for batch in packs) == 8
    assert packs[-1].skipped == Counter(reasons.values())

    skipped = take(data, 8)[-1].skipped
    records = [json.loads(line) for line in log.read_text().splitlines()]
    rows = {r["row"]: r["id"] or r["reason"] for r in records}
    assert len(rows) == len(reasons)  # several epochs: each has been met, and is named by its row
    assert all(reasons[r["id"]] == r["reason"] for r in records if r["id"])
    assert Counter(r["reason"] for r in records) == skipped

    with pytest.raises(TooManyBadSamples, match=r"of 100 samples are bad .*max_bad_fraction allows 1.0%.*bad_samples"):
        take(module(folder, **settings, max_bad_fraction=0.01, run_dir=tmp_path), 50)


def test_token_out_of_range_and_nothing_to_learn(folder):
    data = module(folder, vocab_size=300)
    source = data.opened("sources")["text"]
    with pytest.raises(BadSample, match="token_out_of_range") as error:
        data.encoder(source[0], source.media_bytes)
    assert "vocabulary of 300" in error.value.detail
    question = Sample(id="q", source="s", messages=(Message(role="user", segments=(Segment(type="text", text="?"),)),))
    with pytest.raises(BadSample, match="no_target"):
        module(folder).encoder(question, source.media_bytes)
    chat = Sample(
        id="q",
        source="s",
        messages=(*question.messages, Message(role="assistant", segments=(Segment(type="text", text="!"),))),
        meta={"tools": "{"},
    )
    with pytest.raises(BadSample, match="tools_invalid"):
        module(folder).encoder(chat, source.media_bytes)


def test_mistakes_are_named(folder):
    for changes, message in [
        ({"sources": {"a": {"pth": "x"}}}, r"data\.sources\.a\.pth: there is no such key; did you mean path"),
        ({"sources": {"a": {}}}, "'a' needs a path"),
        ({"sources": {"a": {"path": "nowhere"}}}, "nowhere"),
        ({"sources": ["a"]}, r"data\.sources: write a mapping"),
        ({"vision": {"patchsize": 3}}, r"data\.vision\.patchsize: there is no such key; did you mean patch"),
        ({"stages": [3]}, r"data\.stages\[0\]: write a mapping"),
        ({"max_bad_fraction": 2}, "max_bad_fraction"),
        ({"num_workers": -1}, "num_workers"),
        ({"max_patches": 0}, "patches is 0"),
        ({"balance": 0}, "data.balance is 0"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json"),
    ]:
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
            module(folder, **changes).setup("fit")


@pytest.mark.parametrize("balance", [None, 0.7])
def test_fewer_processes_take_over_the_streams(folder, balance):
    """Four streams in 4, then 2, then 1 processes: each step has the packs of a run in four processes throughout."""
    work = Work(token=1.0, pair=0.01, mel_frame=0.5, patch=2.0)

    def steps(processes, n, state=None):
        found, states = [], []
        for rank in range(processes):
            data = module(folder, rank=rank, world_size=processes, streams=4, balance=balance, work=work)
            if state is not None:
                data.load_state_dict(state)
            found.append(take(data, n * 4 // processes))
            states.append(data.state_dict())
        whole = {"settings": states[0]["settings"], "ranks": []}
        whole["ranks"] = [next(s["ranks"][i] for s in states if s["ranks"][i] is not None) for i in range(4)]
        each = 4 // processes
        ids = [{b.sample_ids for rank in found for b in rank[s * each : (s + 1) * each]} for s in range(n)]
        return ids, whole

    whole, _ = steps(4, 6)
    first, state = steps(4, 2)
    second, state = steps(2, 2, state)
    third, _ = steps(1, 2, state)
    assert first + second + third == whole
    with pytest.raises(ValueError, match="3 processes cannot share the 4 streams"):
        module(folder, rank=0, world_size=3).load_state_dict(state)
    for changes in ({"balance": 0.8, "work": work}, {"balance": 0.7, "work": Work(token=2.0)}):
        with pytest.raises(ValueError, match="these settings changed: balance"):
            module(folder, rank=0, world_size=1, **changes).load_state_dict(state)
