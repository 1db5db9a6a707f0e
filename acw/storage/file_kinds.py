"""What a file is that should have been another: a page instead of a download, a pointer, an archive, a part of it.

Readers say what they stumble over; who gets an "invalid header" wants to know that a login page was saved.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

HEAD_BYTES = 512  # enough for every signature, that of tar at 257 included

DOWNLOAD = "download the file itself anew"
_LFS = "git lfs pull fetches the file, or download it by hand"
_UNPACK = "unpack it and give the file in it"
# The first bytes of a file -> what it is, and the remedy.
_SIGNATURES = (
    (b"version https://git-lfs.github.com/spec/", "a pointer of Git LFS, not the file", _LFS),
    (b"/annex/objects/", "a pointer of git-annex, not the file", "git annex get fetches the file"),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"%PDF-", "a PDF document", DOWNLOAD),
    (b"\x89PNG\r\n", "a PNG image", "rename it, or give the right file"),
    (b"\xff\xd8\xff", "a JPEG image", "rename it, or give the right file"),
    (b"\x89HDF\r\n", "an HDF5 file", "convert it to the format that is read here"),
    (b"\x93NUMPY", "an NPY file", "convert it to the format that is read here"),
)
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<!--")


def recognised(path: Path, wanted: str = "") -> str | None:
    """What a file plainly is and what to do, as `is an HTML page; download it`; None where these rules do not know.

    To be asked only after a reader has refused the file. wanted: the format that it should have had, such as `NPY`: to
    be of that is no explanation.
    """
    try:
        found = _kind(path)
    except OSError:
        return None
    return None if found is None or (wanted and wanted in found[0]) else f"is {found[0]}; {found[1]}"


def _kind(path: Path) -> tuple[str, str] | None:
    """What it is, and the remedy."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        return "empty", DOWNLOAD
    if not head.strip(b"\0"):
        return "all zeros at its beginning, as an interrupted download leaves it", DOWNLOAD
    for signature, kind, remedy in _SIGNATURES:
        if head.startswith(signature):
            return kind, remedy
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head.startswith(b"PK"):
        return _zip(path)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_PAGES):
        return "an HTML page, not the file", f"{DOWNLOAD}, in a browser where its site asks to log in or to confirm"
    if text.startswith(b"<"):
        return "an XML document, such as a server's error, not the file", DOWNLOAD
    if _is_text(head):
        what = "JSON" if text.startswith((b"{", b"[")) else "text"
        return f"{what} ({_beginning(head)})", DOWNLOAD
    return None


def _zip(path: Path) -> tuple[str, str] | None:
    if not zipfile.is_zipfile(path):
        return "cut short: a zip archive without its end", DOWNLOAD
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return "a damaged zip archive", DOWNLOAD
    if any(name.endswith("/data.pkl") for name in names):
        return None  # what torch.save writes
    return f"a zip archive of other files ({', '.join(names[:3]) or 'none'}{', ...' * (len(names) > 3)})", _UNPACK


def _is_text(head: bytes) -> bool:
    """Whether bytes read as UTF-8; a character may be cut at their end."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode()
    return all(character.isprintable() or character in "\t\r\n" for character in text)


def _beginning(head: bytes) -> str:
    """The first characters of a text, on one line."""
    return f"'{' '.join(head.decode(errors='replace').split())[:40]}'"
