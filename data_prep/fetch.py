"""Get a source's files: by package name through the ordinary package manager, or from a path the user already has."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omnitrain.files import atomic

Manager = Literal["debian", "npm"]


@dataclass(frozen=True, kw_only=True)
class Package:
    """A source of data: its package, and the licence of that package's content (SPDX where one exists)."""

    name: str
    manager: Manager
    licence: str


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An unpacked package. `version` is ``"local"`` for a folder given by the user."""

    package: Package
    version: str
    root: Path


def fetch(package: Package, cache: Path, source: Path | None = None) -> Opened:
    """Unpack `package` and say where.

    Args:
        cache: folder that keeps the downloaded archive and the unpacked files, so that a second call does nothing.
        source: instead of a download, a folder with the package's files, or its archive (``.deb``, ``.tgz``).

    Raises:
        FileNotFoundError: `source` does not exist.
        RuntimeError: the package manager is missing or failed; the message says how to go on without it.
    """
    if source is not None and not source.exists():
        raise FileNotFoundError(
            f"--source {source} does not exist; it must be a folder or an archive of {package.name}"
        )
    if source is not None and source.is_dir():
        return Opened(package=package, version="local", root=source)
    archive = source or _cached(package, cache) or _download(package, cache)
    root = cache / archive.name.removesuffix(".deb").removesuffix(".tgz")
    if not root.is_dir():
        with atomic(root) as partial:
            unpack(archive, partial)
    return Opened(package=package, version=_version(package, archive), root=root)


def fetch_all(packages: list[Package], cache: Path, sources: Mapping[str, Path]) -> dict[str, Opened]:
    """`fetch` for each, by package name. `sources` maps package names to the paths given by the user."""
    if unknown := set(sources) - {package.name for package in packages}:
        names = ", ".join(package.name for package in packages)
        raise ValueError(f"--source names {', '.join(sorted(unknown))}, but this script reads: {names}")
    return {package.name: fetch(package, cache, sources.get(package.name)) for package in packages}


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a Debian package (its data member) or a tar archive. Nothing is written outside `folder`."""
    data: Path | io.BytesIO = archive
    if archive.read_bytes()[:8] == b"!<arch>\n":
        data = io.BytesIO(_deb_data(archive))
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=data) if isinstance(data, io.BytesIO) else tarfile.open(data) as tar:
        tar.extractall(folder, filter="data")


def _deb_data(archive: Path) -> bytes:
    """The `data.tar.*` member of an ar archive: 60-byte headers (name 16, ..., size 10 at 48), even padding."""
    raw, at = archive.read_bytes(), 8
    while at + 60 <= len(raw):
        name, size = raw[at : at + 16].decode().strip().rstrip("/"), int(raw[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return raw[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"{archive} holds no data.tar: it is no whole Debian package; fetch it again")


def _stem(package: Package) -> str:
    return f"{package.name}_" if package.manager == "debian" else f"{package.name}-"


def _cached(package: Package, cache: Path) -> Path | None:
    suffix = ".deb" if package.manager == "debian" else ".tgz"
    return max(cache.glob(f"{_stem(package)}*{suffix}"), default=None)


def _version(package: Package, archive: Path) -> str:
    """The version in an archive's name: NAME_VERSION_ARCH.deb or NAME-VERSION.tgz."""
    if package.manager == "debian" and (match := re.match(r".+?_(.+)_[^_]+\.deb$", archive.name)):
        return match[1].replace("%3a", ":")
    if match := re.match(r".+?-(\d[^-]*)\.tgz$", archive.name):
        return match[1]
    return "local"


def _download(package: Package, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    command = (
        ["apt-get", "download", package.name]
        if package.manager == "debian"
        else ["npm", "pack", "--silent", package.name]
    )
    hint = f"fetch the {package.manager} package {package.name} elsewhere and pass its file or folder with --source"
    try:
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not installed here; {hint}") from error
    archive = _cached(package, cache)
    if done.returncode or archive is None:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}; {hint}")
    return archive
