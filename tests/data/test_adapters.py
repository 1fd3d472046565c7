"""A user's own data through a mapping: JSONL, tars, Parquet with the Hub's feature structs, streamed data sets."""

from __future__ import annotations

import base64
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


# ----------------------------------------------------------------------------- other people's formats, and broken ones

CHAT = """\
kind: {kind}
path: {path}
source: chat
messages: {{column: messages, media: {{"<image>": {{image: "{{images}}"}}}}}}
"""
PICTURE = corrupt.good_image()
URI = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
SOUND = base64.b64encode(corrupt.good_audio()).decode()
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [
        {"type": "text", "text": "Look at <this>:"},
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "input_audio", "input_audio": {"data": SOUND, "format": "wav"}},
        {"type": "image"},
        {"type": "input_text", "text": "and say."},
    ]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
]  # fmt: skip


@pytest.mark.parametrize("form", ["lines", "array", "indented array", "as text", "parquet"])
def test_parts_of_openai_and_trl(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    row = {"messages": json.dumps(TURNS) if form == "as text" else TURNS, "images": ["a.png"], "ñ": "é"}
    rows = [row, {**row, "images": []}, {**row, "images": ["a.png", "a.png"]}]
    file = tmp_path / ("data.parquet" if form == "parquet" else "data.json")
    if form == "parquet":  # a column of one type: parts with all keys of all of them
        empty = dict.fromkeys(("text", "image_url", "input_audio"))
        full = [{**t, "content": [{**empty, **part} for part in t["content"]]} for t in TURNS[1:]]
        rows = [{"messages": full, "images": r["images"]} for r in rows]
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif "array" in form:
        file.write_text(json.dumps(rows, indent=2 if "indented" in form else None, ensure_ascii=False), "utf-8")
    else:
        file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    kind = "parquet" if form == "parquet" else "jsonl"
    source = MappedSource(mapping(tmp_path, CHAT.format(kind=kind, path=file.name)))
    assert len(source) == 3
    user, answer = source[0].messages[-2:]
    assert [s.type for s in user.segments] == ["text", "image", "audio", "image", "text"]
    assert [s.text for s in user.segments] == ["Look at <this>:", None, None, None, "and say."]
    heard = [source.media_bytes(s) for s in user.segments if s.type != "text"]
    assert heard == [PICTURE, corrupt.good_audio(), PICTURE]
    assert (answer.role, answer.segments[0].text) == ("assistant", "A cat.")
    for number, there in ((1, 0), (2, 2)):
        with pytest.raises(BadSample, match=rf"row_invalid: 1 marker\(s\) <image> in the text for {there} image"):
            source[number]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image"}, r'a part of type image without image; .* media: {"<image>": {image: "{images}"}}'),
        ({"type": "tool_use"}, "a part of type 'tool_use'; known are text, image, audio and video"),
        ({"type": "text"}, "a part of type text whose text is NoneType"),
        ({"type": "audio", "audio": {"array": [0.1]}}, "media_missing: a part of type audio is NoneType"),
        (3, "a part of type 'int'"),
    ],
)
def test_parts_that_cannot_be_read(tmp_path: Path, part: object, message: str) -> None:
    jsonl(tmp_path, [{"messages": [{"role": "user", "content": [part]}]}])
    source = MappedSource(mapping(tmp_path, "kind: jsonl\npath: data.jsonl\nsource: s\nmessages: {column: messages}\n"))
    with pytest.raises(BadSample, match=message):
        source[0]


TEXT = 'kind: {kind}\npath: "{path}"\nsource: s\nmessages: [{{document: "{{text}}"}}]\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"map\.yaml: there is no row in data\.json; mend `path`"),
        (b" [ ]\n", r"map\.yaml: there is no row in data\.json"),
        (b'[{"text": "a"}, {"text": ', r"data\.json is an array of JSON that cannot be read"),
        (b'[{"text": "a"} {"text": "b"}]', r"data\.json is an array of JSON that breaks off at character 15"),
        ('[{"text": "é"}]'.encode("latin-1"), r"data\.json is not UTF-8.*looks like Latin-1: .*iconv -f WINDOWS-1252"),
        ('{"text": "é"}\n'.encode("utf-16"), r"data\.json is not UTF-8; it looks like UTF-16: .*iconv -f UTF-16"),
        ('{"text": "é"}\n'.encode("utf-16-le"), r"data\.json is not UTF-8; it looks like UTF-16"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data.json").write_bytes(content)
    file = mapping(tmp_path, TEXT.format(kind="jsonl", path="data.json"))
    with pytest.raises(ValueError, match=message):
        MappedSource(file)


@pytest.mark.parametrize("array", [False, True])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, array: bool) -> None:
    text = '{"text": "é"}\n{"text": "b"}\n'
    text = "\ufeff" + (f"[{text.strip()}]".replace("\n", ",\n") if array else text)
    (tmp_path / "data.json").write_text(text, encoding="utf-8")
    source = MappedSource(mapping(tmp_path, TEXT.format(kind="jsonl", path="data.json")))
    assert [s.messages[0].segments[0].text for s in source] == ["é", "b"]


def test_a_line_of_latin_1(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes('{"text": "a"}\n{"text": "é"}\n'.encode("latin-1"))
    source = MappedSource(mapping(tmp_path, TEXT.format(kind="jsonl", path="data.json")))
    with pytest.raises(BadSample, match=r"text_not_utf8: .*looks like Latin-1: convert it with `iconv"):
        source[1]


def test_what_is_no_number_is_no_text(tmp_path: Path) -> None:
    values = ("NaN", "-Infinity", "null", '"NaN"', "1.5")
    (tmp_path / "data.json").write_text("".join(f'{{"text": {value}, "unused": NaN}}\n' for value in values))
    source = MappedSource(mapping(tmp_path, TEXT.format(kind="jsonl", path="data.json")))
    for row, message in [(0, "{text} is nan"), (1, "{text} is -inf"), (2, "no value for {text}")]:
        with pytest.raises(BadSample, match=f"row_invalid: .*{message}"):
            source[row]
    assert [source[row].messages[0].segments[0].text for row in (3, 4)] == ["NaN", "1.5"]


def test_a_column_that_comes_late(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("".join('{"other": 1}\n' for _ in range(150)) + '{"text": "late"}\n')
    source = MappedSource(mapping(tmp_path, TEXT.format(kind="jsonl", path="data.json")))
    assert source[150].messages[0].segments[0].text == "late"
    with pytest.raises(BadSample, match=r"no value for \{text\}"):
        source[0]
    with pytest.raises(ValueError, match=r"column 'txt' is not in the data .did you mean 'text'"):
        MappedSource(mapping(tmp_path, TEXT.format(kind="jsonl", path="data.json").replace("{text}", "{txt}")))


def test_parquet_files_whose_columns_differ(tmp_path: Path) -> None:
    def write(name: str, **columns: object) -> None:
        pq.write_table(pa.table(columns), tmp_path / name)

    write("0.parquet", text=["a", "b"], n=[1, 2])
    write("1.parquet", other=[0.5], text=["c"])
    write("2.parquet", text=pa.array([], pa.string()))
    file = mapping(tmp_path, TEXT.format(kind="parquet", path="*.parquet"))
    assert [s.messages[0].segments[0].text for s in MappedSource(file)] == ["a", "b", "c"]
    write("3.parquet", text=[7])
    with pytest.raises(ValueError, match=r"3\.parquet: column 'text' is .*int64.*, but .*string.* in .*0\.parquet"):
        MappedSource(file)
    (tmp_path / "3.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"3\.parquet is no Parquet file: it is empty; remove it"):
        MappedSource(file)
    (tmp_path / "3.parquet").write_bytes(b"PAR1 something else")
    with pytest.raises(ValueError, match=r"3\.parquet is no Parquet file: .*; remove it"):
        MappedSource(file)
    with pytest.raises(ValueError, match=r"there is no row in 2\.parquet"):
        MappedSource(mapping(tmp_path, TEXT.format(kind="parquet", path="2.parquet")))


def test_two_samples_of_one_name_in_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for name, text in [("a.txt", b"one"), ("b.txt", b"two"), ("a.txt", b"three"), ("c.txt", b"4"), ("c.TXT", b"5")]:
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    source = MappedSource(mapping(tmp_path, TEXT.format(kind="webdataset", path="data.tar").replace("{text}", "{txt}")))
    assert len(source) == 3
    assert source[1].messages[0].segments[0].text == "two"
    for row, message in [
        (0, r"a\.txt stands twice in .*data\.tar, at bytes 512 and 2560"),
        (2, r"c\.txt .* twice"),
    ]:
        with pytest.raises(BadSample, match=f"row_invalid: {message}.*a name of its own"):
            source[row]
