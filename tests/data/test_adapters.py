"""A user's own data through a mapping: JSONL, tars, Parquet with the Hub's feature structs, streamed data sets."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnitrain.data.adapters import MappedSource, load_mapping, open_source, stream_samples
from omnitrain.data.sample import BadSample, Segment
from omnitrain.data.shards import SampleSource, Source, write_shards
from tests.data import corrupt


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(folder: Path, lines: list, extra: bytes = b"") -> None:
    (folder / "clips").mkdir(exist_ok=True)
    (folder / "clips" / "a.wav").write_bytes(corrupt.good_audio())
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "data.jsonl").write_bytes(text.encode() + b"\n" + extra)


ASR = """
kind: jsonl
path: data.jsonl
source: mine
licence: CC0
task: asr
split: "{split}"
languages: ["{locale}"]
id: "utterance-{n}"
concept: "{speaker.name}"
meta: {age: "{speaker.age}"}
messages:
  - user: [{audio: "clips/{file}"}, {text: ["Transcribe.", "What is said?"]}]
  - assistant: "{sentence}"
"""
LINES = [
    {
        "n": i,
        "file": "a.wav",
        "split": "validation" if i == 3 else "train",
        "locale": ("ca", "es")[i % 2],
        "sentence": f"frase {i} — ñ",
        "speaker": {"name": f"p{i}", "age": 20 + i},
    }
    for i in range(6)
]


def mapping(folder: Path, text: str) -> Path:
    (folder / "map.yaml").write_text(text, encoding="utf-8")
    return folder / "map.yaml"


def test_jsonl(tmp_path: Path) -> None:
    jsonl(tmp_path, LINES)
    source = open_source(mapping(tmp_path, ASR))
    assert isinstance(source, MappedSource)
    assert isinstance(source, Source)
    assert (len(source), source.name) == (6, "mine")
    sample = source[4]
    assert (sample.id, sample.task, sample.languages, sample.concept) == ("utterance-4", "asr", ("ca",), "p4")
    assert (sample.modality, sample.reference, sample.meta) == ("audio", "frase 4 — ñ", {"age": "24"})
    assert source.media_bytes(sample.messages[0].segments[0]) == corrupt.good_audio()
    assert source.locate(4) == (str(tmp_path / "data.jsonl"), 4)
    prompts = {s.messages[0].segments[1].text for s in source}
    assert prompts == {"Transcribe.", "What is said?"}
    assert [s.id for s in source] == [s.id for s in pickle.loads(pickle.dumps(source))]
    assert [s.id for s in open_source(tmp_path / "map.yaml", split="validation")] == ["utterance-3"]
    assert len(open_source(tmp_path / "map.yaml", where={"languages": ["es"], "split": "train"})) == 2
    with pytest.raises(ValueError, match="no row has"):
        open_source(tmp_path / "map.yaml", where={"task": "caption"})
    with pytest.raises(BadSample, match="media_outside"):
        source.media_bytes(Segment(type="audio", path="clips/../../x"))


def test_jsonl_bad_lines(tmp_path: Path) -> None:
    lines = [*LINES[:1], {k: v for k, v in LINES[1].items() if k != "sentence"}, {**LINES[2], "sentence": ["a"]}]
    deep, long = b"[" * 100_000 + b"\n", b'{"n": ' + b"9" * 10_000 + b"}\n"
    jsonl(tmp_path, lines, extra=b'{"n": 1, "sentence": "caf\xe9"}\n{"n": \n[1]\n\n' + deep + long)
    source = MappedSource(mapping(tmp_path, ASR))
    assert len(source) == 8  # the blank line is none
    assert source[0].id == "utterance-0"
    for row, reason, detail in [
        (1, "row_invalid", "sentence"),
        (2, "row_invalid", "list"),
        (3, "text_not_utf8", "xe9"),
        (4, "row_invalid", "JSON"),
        (5, "row_invalid", "list"),
        (6, "row_invalid", "JSON"),
        (7, "row_invalid", "JSON"),
    ]:
        with pytest.raises(BadSample, match=detail) as error:
            source[row]
        assert error.value.reason == reason
    bad: list[tuple[int, str]] = []
    assert len(list(stream_samples(tmp_path / "map.yaml", lambda row, error: bad.append((row, error.reason))))) == 1
    assert [row for row, _ in bad] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("kind: jsonl", "kind: json"), "kind 'json' is unknown .did you mean 'jsonl'"),
        (("licence:", "license:"), "field 'license' is unknown .did you mean 'licence'"),
        (("source: mine", ""), "field 'source' is missing"),
        (("{sentence}", "{sentense}"), "column 'sentense' is not in the data .did you mean 'sentence'"),
        (("{sentence}", "{}"), "a field is"),
        (("{sentence}", "{sentence"), "assistant.*expected '}'"),
        (("- assistant", "- assistent"), "role 'assistent' is unknown .did you mean 'assistant'"),
        (("{audio:", "{sound:"), "segment type 'sound' is unknown"),
        (("path: data.jsonl", "path: none*.jsonl"), "no file matches"),
        (('languages: ["{locale}"]', "languages: en"), "languages is a list"),
        (("messages:", "messages: {"), "is no YAML"),
    ],
)
def test_a_wrong_mapping_names_field_and_fix(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    jsonl(tmp_path, LINES)
    file = mapping(tmp_path, ASR.replace(*change))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        MappedSource(file)


def test_conversations_with_markers(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nCompare with <image>"},
        {"from": "gpt", "value": "Both are noise."},
    ]
    jsonl(tmp_path, [{"id": "x", "pictures": ["1.png", "2.png"], "conversations": turns}])
    source = MappedSource(
        mapping(
            tmp_path,
            """
kind: jsonl
path: data.jsonl
source: chat
media_root: pictures
messages:
  column: conversations
  role: from
  text: value
  roles: {human: user, gpt: assistant}
  media: {"<image>": {image: "{pictures}"}}
""",
        )
    )
    user, assistant = source[0].messages
    assert [(s.type, s.text, s.path) for s in user.segments] == [
        ("image", None, "1.png"),
        ("text", "Compare with ", None),
        ("image", None, "2.png"),
    ]
    assert (user.role, assistant.role, source[0].reference) == ("user", "assistant", "Both are noise.")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "2.png").write_bytes(b"2")
    assert source.media_bytes(user.segments[2]) == b"2"


def test_markers_and_media_that_disagree(tmp_path: Path) -> None:
    def row(question: str, answer: str, **media: object) -> dict:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"turns": turns, "pics": [], "sound": None, **media}

    rows = [
        (row("<image> and <image>", "Two.", pics=["1", "2"]), None),
        (row("<image>?", "One.", pics=["1", "2"]), r"1 marker.* for 2 image"),
        (row("What?", "None.", pics=["1"]), r"0 marker.* for 1 image"),
        (row("<image> <image>", "Two.", pics=["1"]), r"2 marker.* for 1 image"),
        (row("<image>?", "I see <image>.", pics=["1"]), r"2 marker.* for 1 image"),
        (row("Write <image> in HTML.", "So."), r"1 marker.* for 0 image"),
        (row("<audio>?", "A bell.", sound="a.wav"), None),
        (row("<audio> <audio>", "A bell.", sound="a.wav"), r"2 marker.* for 1 audio"),
        (row("Listen.", "A bell.", sound="a.wav"), r"0 marker.* for 1 audio"),
        (row("<audio>?", "A bell."), r"1 marker.* for 0 audio"),
    ]
    jsonl(tmp_path, [row for row, _ in rows])
    text = "kind: jsonl\npath: data.jsonl\nsource: chat\nmessages:\n"
    media = '  column: turns\n  media: {"<image>": {image: "{pics}"}, "<audio>": {audio: "{sound}"}}\n'
    source = MappedSource(mapping(tmp_path, text + media))
    for index, (_, message) in enumerate(rows):
        if message is None:
            assert sum(segment.path is not None for segment in source[index].segments) == (1 if index else 2)
            continue
        with pytest.raises(BadSample, match=message) as error:
            source[index]
        assert error.value.reason == "row_invalid"
    source = MappedSource(mapping(tmp_path, text + '  - user: [{image: "{pics}"}]\n  - assistant: Yes.\n'))
    assert source[2].segments[0].path == "1"
    with pytest.raises(BadSample, match=r"row_invalid: 1 segment.* for 2 image"):
        source[0]


CAPTION = """
kind: webdataset
path: "*.tar"
source: web
task: caption
languages: [en]
id: "{__key__}"
messages:
  - user: [{image: "{jpg|png}"}, Describe.]
  - assistant: "{json.caption}"
"""


def test_webdataset(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(3):
                caption = json.dumps({"caption": f"picture {shard}{i}"}).encode()
                for name, data in [
                    (f"x/{shard}{i}.{'png' if i else 'jpg'}", corrupt.good_image("png" if i else "jpeg")),
                    (f"x/{shard}{i}.json", caption if i < 2 else b'{"caption": "caf\xe9"}'),
                ]:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    source = MappedSource(mapping(tmp_path, CAPTION))
    assert len(source) == 6
    assert (source[4].id, source[4].reference, source.locate(4)) == ("x/11", "picture 11", (str(tmp_path / "1.tar"), 1))
    assert source.media_bytes(source[0].messages[0].segments[0]) == corrupt.good_image("jpeg")
    with pytest.raises(BadSample, match="text_not_utf8"):
        source[5]
    (tmp_path / "2.tar").write_bytes(b"\x1f\x8b not a tar")
    with pytest.raises(ValueError, match=r"2\.tar is no plain tar"):
        MappedSource(tmp_path / "map.yaml")


def hub_table(folder: Path) -> None:
    """A Parquet file with the Hub's media features (its schema names them), as the Hub stores it."""
    import datasets

    features = datasets.Features(
        {
            "audio": datasets.Audio(),
            "image": datasets.Image(),
            "pages": datasets.List(datasets.Image()),
            "text": datasets.Value("string"),
        }
    )
    rows = [
        {
            "audio": {"bytes": corrupt.good_audio("flac"), "path": "a.flac"},
            "image": {"bytes": corrupt.good_image(), "path": None},
            "pages": [{"bytes": corrupt.good_image("jpeg"), "path": None}],
            "text": f"line {i}",
        }
        for i in range(5)
    ]
    rows[4]["image"] = {"bytes": None, "path": "beside.png"}
    (folder / "beside.png").write_bytes(corrupt.good_image())
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), folder / "hub.parquet")


HUB = """
kind: parquet
path: hub.parquet
source: hub
task: mixed
messages:
  - user: [{image: "{image}"}, {audio: "{audio}"}, {image: "{pages.0}"}, "Read {text}."]
  - assistant: "{text}"
"""


def test_parquet_with_hub_features(tmp_path: Path) -> None:
    hub_table(tmp_path)
    source = MappedSource(mapping(tmp_path, HUB))
    sample = source[3]
    assert len(source) == 5
    assert (sample.id, sample.reference, sample.modality) == ("hub/3", "line 3", "audio_video")
    assert [s.media for s in sample.messages[0].segments] == [
        corrupt.good_image(),
        corrupt.good_audio("flac"),
        corrupt.good_image("jpeg"),
        None,
    ]
    assert source.media_bytes(source[4].messages[0].segments[0]) == corrupt.good_image()
    assert pickle.loads(pickle.dumps(source))[1].reference == "line 1"


@pytest.mark.parametrize("streaming", [False, True])
def test_hub(tmp_path: Path, streaming: bool) -> None:
    """`hub` goes through datasets.load_dataset; a folder laid out like a repository stands for the Hub."""
    (tmp_path / "repo").mkdir()
    hub_table(tmp_path / "repo")
    text = HUB.replace("kind: parquet", "kind: hub").replace("path: hub.parquet", "path: repo")
    file = mapping(tmp_path, text + f"streaming: {str(streaming).lower()}\n")
    if streaming:
        with pytest.raises(ValueError, match="omnitrain data import"):
            MappedSource(file)
    else:
        assert MappedSource(file)[2].reference == "line 2"
    samples = list(stream_samples(file, lambda row, error: pytest.fail(f"{row}: {error}")))
    assert len(samples) == 5
    assert all(s.path is None for sample in samples for s in sample.messages[0].segments)
    assert samples[4].messages[0].segments[0].media == corrupt.good_image()
    write_shards(samples, tmp_path / "out", "hub", progress=False)
    assert list(SampleSource(tmp_path / "out")) == samples


def test_hub_folder_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(corrupt.good_image())
    (tmp_path / "pictures" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "noise"}\n')
    file = mapping(
        tmp_path,
        """
kind: hub
path: imagefolder
data_dir: pictures
source: folder
messages:
  - user: [{image: "{image}"}]
  - assistant: "{text}"
""",
    )
    source = MappedSource(file)
    [segment] = source[0].messages[0].segments
    assert source[0].reference == "noise"
    assert pickle.loads(pickle.dumps(source)).media_bytes(segment) == corrupt.good_image()
    import fsspec

    read = []
    monkeypatch.setattr(fsspec, "open", lambda path, mode: read.append(path) or io.BytesIO(b"remote"))
    assert source.media_bytes(Segment(type="image", path="hf://datasets/imagefolder@abc/x.png")) == b"remote"
    for path in ("hf://datasets/other/x.png", "hf://datasets/imagefolder/../other/x.png", "/etc/passwd"):
        with pytest.raises(BadSample, match="media_outside"):
            source.media_bytes(Segment(type="image", path=path))
    assert read == ["hf://datasets/imagefolder@abc/x.png"]


def test_mapping_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mapping .*none\.yaml is missing"):
        load_mapping(tmp_path / "none.yaml")
