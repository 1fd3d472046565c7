"""Shards: what is written comes back, in any order, in any process; what does not fit is named."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.shards import SCHEMA, SampleSource, Source, write_media_table, write_shards


def sample(i: int, **changes) -> Sample:
    values = {
        "id": f"s{i}",
        "source": "demo",
        "split": "validation" if i % 5 == 0 else "train",
        "task": ("caption", "text")[i % 2],
        "licence": "CC0",
        "languages": (("en",), ("en", "fr"), ("fr", "en"), ())[i % 4],
        "concept": f"c{i // 2}",
        "meta": {"n": str(i), "é": "ü"},
        "messages": (
            Message(
                role="user",
                segments=(Segment(type="image", media=bytes([i % 256]) * (i + 1)), Segment(type="text", text="what?")),
            ),
            Message(role="assistant", segments=(Segment(type="text", text=f"thing {i} 🦊"),)),
        )
        if i % 2 == 0
        else (Message(role="document", segments=(Segment(type="text", text=f"doc {i}"),)),),
    }
    return Sample(**{**values, **changes})


@pytest.mark.parametrize("rows", [1, 30, 31, 60, 61])
def test_shards_of_thirty_rows(tmp_path: Path, rows: int) -> None:
    samples = [sample(i) for i in range(rows)]
    files = write_shards(samples, tmp_path, "demo", rows_per_shard=30, progress=False)
    assert [pq.read_metadata(file).num_rows for file in files] == [30] * (rows // 30) + [rows % 30] * (rows % 30 > 0)
    assert list(SampleSource(tmp_path)) == samples


def test_round_trip_over_several_shards(tmp_path: Path) -> None:
    samples = [sample(i) for i in range(700)]
    files = write_shards(iter(samples), tmp_path, "demo", rows_per_shard=300, progress=False)
    assert [f.name for f in files] == [f"demo-{i:05d}-of-00003.parquet" for i in range(3)]
    source = SampleSource(tmp_path)
    assert isinstance(source, Source)
    assert source.name == tmp_path.name
    assert len(source) == 700
    assert list(source) == samples
    assert source.locate(301) == (str(files[1]), 1)
    with pytest.raises(IndexError):
        source[700]
    assert source.light()["id"].to_pylist() == [s.id for s in samples]
    # written again with other shards: no stale one stays; same samples, same bytes
    before = files[0].read_bytes()
    write_shards(samples, tmp_path, "demo", rows_per_shard=1000, progress=False)
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    assert write_shards(samples, tmp_path / "b", "demo", rows_per_shard=300, progress=False)[0].read_bytes() == before
    assert len(SampleSource(write_shards([], tmp_path / "none", "none", progress=False)[0])) == 0


def test_datasets_reads_the_same_file(tmp_path: Path) -> None:
    import datasets

    [file] = write_shards([sample(i) for i in range(3)], tmp_path, "demo", progress=False)
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert rows[2]["messages"][0]["segments"][0]["media"] == b"\x02\x02\x02"
    rows.to_parquet(str(tmp_path / "again.parquet"))
    assert list(SampleSource(tmp_path / "again.parquet")) == [sample(i) for i in range(3)]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"split": "validation"}, lambda i: i % 5 == 0),
        ({"task": ["caption"], "split": ["train"]}, lambda i: i % 2 == 0 and i % 5),
        ({"modality": ["image"]}, lambda i: i % 2 == 0),
        ({"languages": ["en"]}, lambda i: i % 4 in (0, 3)),  # no language at all agrees with any list
        ({"languages": ["en", "fr"]}, lambda i: True),
        ({"languages": ["en>fr"]}, lambda i: i % 4 == 1),
        ({"languages": ["en>fr", "en"]}, lambda i: i % 4 in (0, 1, 3)),
        ({"concept": ["c1", "c3"]}, lambda i: i in (2, 3, 6, 7)),
    ],
)
def test_where(tmp_path: Path, where: dict, expected) -> None:
    write_shards([sample(i) for i in range(40)], tmp_path, "demo", rows_per_shard=15, progress=False)
    assert [s.id for s in SampleSource(tmp_path, where=where)] == [f"s{i}" for i in range(40) if expected(i)]


def test_where_says_what_there_is(tmp_path: Path) -> None:
    write_shards([sample(i) for i in range(4)], tmp_path, "demo", progress=False)
    with pytest.raises(ValueError, match="did you mean 'languages'"):
        SampleSource(tmp_path, where={"language": ["en"]})
    with pytest.raises(ValueError, match=r"no row.*it holds task caption, text"):
        SampleSource(tmp_path, where={"task": ["asr"]})
    assert len(SampleSource(tmp_path, split="train")) == 3


def test_media_by_path_and_by_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"A")
    write_media_table(((f"m{i}", bytes([i]) * 3000) for i in range(250)), tmp_path / "media.parquet")
    write_shards([sample(0)], tmp_path, "demo", progress=False)
    source = SampleSource(tmp_path)
    assert len(source) == 1  # the media table is no shard
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1" + bytes(100))
    (tmp_path / "link.png").symlink_to("pictures/a.png")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's name is short
        server.bind("socket")
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(40 * 2**30)
    assert source.media_bytes(Segment(type="image", path="pictures/a.png")) == b"A"
    assert source.media_bytes(Segment(type="image", path="media.parquet#m200")) == bytes([200]) * 3000
    assert source.media_bytes(Segment(type="image", media=b"x")) == b"x"
    assert source.media_bytes(Segment(type="image", path="link.png")) == b"A"  # Hub caches consist of links
    assert source.media_bytes(Segment(type="image", path="data:image/png;base64,QUJD")) == b"ABC"
    assert source.media_bytes(Segment(type="image", path="data:,A%20B")) == b"A B"
    assert source.media_bytes(Segment(type="image", path="QUJD" * 100)) == b"ABC" * 100
    for path, reason in {
        "pictures/b.png": "media_missing",
        "pictures": "media_missing",
        "media.parquet#none": "media_missing",
        "../a.png": "media_outside",
        "pictures/../../a.png": "media_outside",
        "/etc/passwd": "media_outside",
        "..\\a.png": "media_outside",
        "C:\\a.png": "media_outside",
        "../media.parquet#m1": "media_outside",
        "": "media_missing",
        "lost.parquet#m1": "media_missing",
        "damaged.parquet#m1": "media_missing",
        "no\udcffutf8.png": "media_missing",
        "nul\0.png": "media_outside",
        "long" * 70 + ".png": "media_missing",
        "a.png/" * 400 + "b.png": "media_missing",
        "loop": "media_missing",
        "pipe": "media_missing",
        "socket": "media_missing",
        "zero": "media_missing",
        "sparse": "media_missing",
        "data:image/png;base64,?": "row_invalid",
        "http://example.org/a.png": "media_missing",
    }.items():
        with pytest.raises(BadSample) as error:
            source.media_bytes(Segment(type="image", path=path))
        assert error.value.reason == reason, path
    with pytest.raises(ValueError, match="occurs twice"):
        write_media_table([("a", b"1"), ("a", b"2")], tmp_path / "twice.parquet")


def _read(source: SampleSource, queue: multiprocessing.Queue) -> None:
    queue.put([source[i].id for i in (17, 3)])


def test_spawned_worker(tmp_path: Path) -> None:
    write_shards([sample(i) for i in range(40)], tmp_path, "demo", rows_per_shard=15, progress=False)
    source = SampleSource(tmp_path, where={"task": "caption"})
    assert source[0].id == "s0"  # opened before it is pickled
    assert len(pickle.dumps(source)) < 4000
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_read, args=(source, queue))
    process.start()
    assert queue.get(timeout=60) == ["s34", "s6"]
    process.join()


def test_missing_and_damaged_shards_stop_at_once(tmp_path: Path) -> None:
    files = write_shards([sample(i) for i in range(40)], tmp_path, "demo", rows_per_shard=15, progress=False)
    with pytest.raises(FileNotFoundError, match=r"nothing\.parquet is missing"):
        SampleSource(tmp_path / "nothing.parquet")
    with pytest.raises(FileNotFoundError, match="no Parquet shard"):
        SampleSource(tmp_path.joinpath("empty") if tmp_path.joinpath("empty").mkdir() is None else "")
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"demo-00000-of-00003\.parquet is no whole Parquet file"):
        SampleSource(files[0])
    files[0].write_bytes(whole)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"demo-00001-of-00003\.parquet of 00003 is missing"):
        SampleSource(tmp_path)


def test_missing_or_unknown_fields_are_named(tmp_path: Path) -> None:
    [file] = write_shards([sample(i) for i in range(4)], tmp_path, "demo", progress=False)
    table = pq.read_table(file)
    for changed, message in [
        (table.drop_columns(["task"]), r"demo.*: column 'task' is missing"),
        (table.rename_columns([n.replace("concept", "concepts") for n in table.column_names]), "'concept' is missing"),
        (table.append_column("tasks", table["task"]), r"'tasks' is unknown \(did you mean 'task'\?\)"),
        (table.set_column(3, "task", pa.array([1, 2, 3, 4])), "'task' is int64, not string"),
    ]:
        pq.write_table(changed, file)
        with pytest.raises(ValueError, match=message):
            SampleSource(file)
    segment = pa.struct([("type", pa.string()), ("text", pa.string()), ("sound", pa.binary())])
    messages = pa.list_(pa.struct([("role", pa.string()), ("segments", pa.list_(segment))]))
    pq.write_table(table.set_column(9, "messages", pa.nulls(4, messages)), file)
    with pytest.raises(ValueError, match=r"field 'messages\.segments\.media' is missing"):
        SampleSource(file)


def test_bad_rows_are_bad_samples(tmp_path: Path) -> None:
    [file] = write_shards([sample(i) for i in range(6)], tmp_path, "demo", progress=False)
    rows = pq.read_table(file).to_pylist()
    rows[1]["messages"][0]["role"] = "robot"
    rows[2]["messages"][0]["segments"][0]["type"] = "picture"
    rows[3]["meta"] = "{"
    rows[4]["messages"] = []
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    raw = pa.array([b"demo"] * 5 + [b"de\xffmo"]).view(pa.string())
    pq.write_table(table.set_column(1, "source", raw), file)
    source = SampleSource(file)
    assert source[0] == sample(0)
    for row, reason, detail in [
        (1, "row_invalid", "robot"),
        (2, "row_invalid", "picture"),
        (3, "row_invalid", "meta"),
        (4, "row_invalid", "messages"),
        (5, "text_not_utf8", "'source'"),
    ]:
        with pytest.raises(BadSample, match=detail) as error:
            source[row]
        assert error.value.reason == reason


def test_writing_refuses_what_does_not_fit(tmp_path: Path) -> None:
    for wrong in [
        sample(1, meta={"n": 1}),
        sample(1, messages=()),
        sample(1, messages=(Message(role="robot", segments=()),)),
        sample(1, messages=(Message(role="user", segments=(Segment(type="smell"),)),)),
    ]:
        with pytest.raises(ValueError, match="'s1'"):
            write_shards([sample(0), wrong], tmp_path, "demo", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_share_of_the_concepts(tmp_path: Path) -> None:
    rows = [sample(i, concept=f"concept {i // 3}") for i in range(600)]
    write_shards(rows, tmp_path, "demo", progress=False)

    def concepts(share: float) -> set[str]:
        kept = list(SampleSource(tmp_path, where={"concept_share": share}))
        found = {row.concept for row in kept}
        assert len(kept) == 3 * len(found)  # a concept stays whole
        return found

    assert len(concepts(1.0)) == 200
    assert concepts(0.2) < concepts(0.5)
    assert 70 < len(concepts(0.5)) < 130
    for wrong in (0, 1.5, "much"):
        with pytest.raises(ValueError, match="concept_share"):
            SampleSource(tmp_path, where={"concept_share": wrong})
