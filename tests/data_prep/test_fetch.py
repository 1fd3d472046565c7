from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Literal

import pytest

from data_prep.fetch import Package, fetch, fetch_all, unpack
from data_prep.job import _sources

THING = Package(name="thing-data", manager="debian", licence="MIT")


def tar_of(files: dict[str, bytes], mode: Literal["w:gz", "w:xz"]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def deb_of(files: dict[str, bytes]) -> bytes:
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar_of(files, "w:xz")}
    raw = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        raw += header + content + b"\n" * (len(content) % 2)
    return raw


def test_a_debian_package_is_unpacked_once(tmp_path: Path) -> None:
    archive = tmp_path / "thing-data_1%3a2.0-3_all.deb"
    archive.write_bytes(deb_of({"./usr/share/thing/file.txt": b"content"}))
    opened = fetch(THING, tmp_path / "cache", archive)
    file = opened.root / "usr/share/thing/file.txt"
    assert file.read_bytes() == b"content"
    assert opened.version == "1:2.0-3"
    file.write_bytes(b"kept")
    assert (fetch(THING, tmp_path / "cache", archive).root / "usr/share/thing/file.txt").read_bytes() == b"kept"


def test_a_package_with_a_link_to_nowhere_is_unpacked(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        link = tarfile.TarInfo("font.ttf")
        link.type, link.linkname = tarfile.SYMTYPE, "of-another-package.ttf"
        tar.addfile(link)
    (tmp_path / "thing-data-1.0.tgz").write_bytes(buffer.getvalue())
    assert (fetch(THING, tmp_path / "cache", tmp_path / "thing-data-1.0.tgz").root / "font.ttf").is_symlink()


def test_an_archive_is_that_of_the_longest_name_it_begins_with() -> None:
    both = [Package(name=name, manager="debian", licence="MIT") for name in ("sounds-en", "sounds-en-g722")]
    found = _sources(["a/sounds-en-g722_1_all.deb", "a/sounds-en_1_all.deb"], both)
    assert found == {"sounds-en-g722": Path("a/sounds-en-g722_1_all.deb"), "sounds-en": Path("a/sounds-en_1_all.deb")}
    with pytest.raises(ValueError, match="say which package"):
        _sources(["other.deb"], both)


def test_an_npm_package_in_the_cache_is_used(tmp_path: Path) -> None:
    (tmp_path / "thing-data-6.1.0.tgz").write_bytes(tar_of({"package/a": b"1"}, "w:gz"))
    opened = fetch(Package(name="thing-data", manager="npm", licence="MIT"), tmp_path)
    assert opened.version == "6.1.0"
    assert (opened.root / "package/a").read_bytes() == b"1"


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    opened = fetch(THING, tmp_path / "cache", tmp_path)
    assert opened.root == tmp_path
    assert opened.version == "local"


def test_nothing_is_written_outside_the_folder(tmp_path: Path) -> None:
    archive = tmp_path / "evil.deb"
    archive.write_bytes(deb_of({"../outside.txt": b"x"}))
    with pytest.raises(tarfile.FilterError):
        unpack(archive, tmp_path / "inner")
    assert not (tmp_path / "outside.txt").exists()


def test_errors_say_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="thing-data"):
        fetch(THING, tmp_path, tmp_path / "missing.deb")
    with pytest.raises(ValueError, match="thing-data"):
        fetch_all([THING], tmp_path, {"other": tmp_path})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"apt-get is not installed here.*--source"):
        fetch(THING, tmp_path / "cache")
    broken = tmp_path / "broken.deb"
    broken.write_bytes(b"!<arch>\n")
    with pytest.raises(ValueError, match=r"no data\.tar"):
        fetch(THING, tmp_path / "cache", broken)
