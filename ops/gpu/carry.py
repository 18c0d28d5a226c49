"""What travels to a machine without a network, in parts of a limited size. Knows no step and imports nothing of ours.

    python -m ops.gpu.carry pack FOLDER NAME=FILE ... [--limit 56]    FOLDER/part-1, FOLDER/part-2, ...
    python -m ops.gpu.carry unpack FOLDER PART ...                    FOLDER/NAME, ... as far as all pieces are there

Large files are cut into pieces. Each part has a manifest of its own pieces, so parts may come one after the other; a
file is joined with the part that completes it. Pieces and files are believed by their SHA-256 alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST, PIECES = "manifest.json", "pieces"
MANIFEST_BYTES = 1 << 16  # kept free for it in every part
LIMIT_MIB = 56
CHUNK = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A stretch of one file, as a part carries it.

    Attributes:
        name: of the file, relative to where it is unpacked.
        index, count: which piece of how many.
        sha256, file_sha256: of the piece; of the whole file.
        path: of the piece inside its part.
    """

    name: str
    index: int
    count: int
    sha256: str
    file_sha256: str
    path: str


def pack(files: Mapping[str, Path], folder: Path, limit: int) -> list[Path]:
    """Make parts of at most `limit` bytes under `folder`, replacing those that are there. Returns them, in order."""
    for old in folder.glob("part-*"):
        shutil.rmtree(old)
    cuts = _cut({name: path.stat().st_size for name, path in files.items()}, limit - MANIFEST_BYTES)
    counts = {name: sum(cut.name == name for cut in cuts) for name in files}
    digests = {name: sha256(path) for name, path in files.items()}
    pieces: dict[Path, list[Piece]] = {}
    for cut in cuts:
        part = folder / f"part-{cut.part}"
        part.mkdir(parents=True, exist_ok=True)
        mine = pieces.setdefault(part, [])
        path = part / f"piece-{len(mine)}"
        _copy(files[cut.name], path, cut.start, cut.size)
        mine.append(Piece(cut.name, cut.index, counts[cut.name], sha256(path), digests[cut.name], path.name))
    for part, mine in pieces.items():
        (part / MANIFEST).write_text(json.dumps([asdict(piece) for piece in mine], indent=1) + "\n")
    return list(pieces)


@dataclass(frozen=True)
class Cut:
    """Where a stretch of a file goes."""

    name: str
    index: int
    part: int
    start: int
    size: int


def _cut(sizes: Mapping[str, int], room: int) -> list[Cut]:
    """Files one after the other into parts of `room` bytes each, cut where a part is full."""
    cuts, part, free = [], 1, room
    for name, size in sizes.items():
        start = index = 0
        while start < size or index == 0:
            if free == 0:
                part, free = part + 1, room
            taken = min(free, size - start)
            cuts.append(Cut(name, index, part, start, taken))
            start, index, free = start + taken, index + 1, free - taken
    return cuts


def unpack(folder: Path, parts: Sequence[Path]) -> list[str]:
    """Take pieces in, join what is complete. Returns the names of files that still lack pieces.

    Raises:
        ValueError: a piece or a joined file is not what its manifest says; nothing of it is kept.
    """
    pieces = [(part, Piece(**fields)) for part in parts for fields in json.loads((part / MANIFEST).read_text())]
    wanted = {piece.name: piece for _, piece in pieces}
    whole = {name for name, piece in wanted.items() if _is(folder / name, piece.file_sha256)}
    for part, piece in pieces:
        if piece.name not in whole:
            _take(part / piece.path, _place(folder, piece, piece.index), piece.sha256)
    lacking = []
    for name, piece in wanted.items():
        places = [_place(folder, piece, index) for index in range(piece.count)]
        if name not in whole and all(place.exists() for place in places):
            _join(places, folder / name, piece.file_sha256)
        elif name not in whole:
            lacking.append(name)
    return lacking


def _place(folder: Path, piece: Piece, index: int) -> Path:
    """By the digest of its file too: pieces of another pack are never joined with these."""
    return folder / PIECES / f"{piece.name}-{piece.file_sha256}-{index}"


def _take(source: Path, place: Path, digest: str) -> None:
    if not _is(source, digest):
        raise ValueError(f"{source} arrived damaged (wrong SHA-256); carry its part again")
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_suffix(".part")
    shutil.copyfile(source, part)
    part.replace(place)


def _join(places: Sequence[Path], target: Path, digest: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with part.open("wb") as joined:
        for place in places:
            with place.open("rb") as piece:
                shutil.copyfileobj(piece, joined, CHUNK)
    if not _is(part, digest):
        part.unlink()
        raise ValueError(f"{target.name} is not what was packed (wrong SHA-256); pack and carry it again")
    part.replace(target)
    for place in places:
        place.unlink()


def _copy(source: Path, target: Path, start: int, size: int) -> None:
    with source.open("rb") as whole, target.open("wb") as piece:
        whole.seek(start)
        while size and (chunk := whole.read(min(CHUNK, size))):
            piece.write(chunk)
            size -= len(chunk)


def _is(path: Path, digest: str) -> bool:
    return path.exists() and sha256(path) == digest


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ops.gpu.carry", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="make parts")
    packing.add_argument("folder", type=Path)
    packing.add_argument("files", nargs="+", metavar="NAME=FILE")
    packing.add_argument("--limit", type=float, default=LIMIT_MIB, help="MiB of a part (default %(default)s)")
    unpacking = commands.add_parser("unpack", help="take parts in")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("parts", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "pack":
        files = {name: Path(path) for name, _, path in (item.partition("=") for item in options.files)}
        for part in pack(files, options.folder, int(options.limit * (1 << 20))):
            size = sum(path.stat().st_size for path in part.iterdir())
            print(f"{part}: {size / (1 << 20):.1f} MiB")
        return 0
    try:
        lacking = unpack(options.folder, options.parts)
    except (ValueError, OSError) as error:
        print(f"carry: {error}", file=sys.stderr)
        return 1
    print(f"carry: {len(options.parts)} parts taken in; not yet whole: {', '.join(lacking) or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
