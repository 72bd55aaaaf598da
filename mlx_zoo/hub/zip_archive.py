"""A zip archive whose members are stored, not compressed: where each one's bytes lie in the file.

Only what `torch.save` writes is read: one disk, no compression, no encryption, no comment. Where
the archive says a thing twice (the two directories, the two headers of a member, its descriptor),
both must agree, and members may not overlap: one file is one archive, whoever reads it.

Sources: PKWARE's APPNOTE.TXT; caffe2/serialize/inline_container.cc, which writes torch's archives.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mlx_zoo.errors import CheckpointError, IntegrityError, UnsafeCheckpoint
from mlx_zoo.hub.reading import read_bytes

MAX_MEMBERS = 65_536
MAX_DIRECTORY = 32 << 20  # bytes
MAX_EXTRA = 1024  # bytes of a member's extra field; zip64 needs 32

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END_LOCATOR64 = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQ2H2I4Q")
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF  # "the real figure is in the zip64 field"
HAS_DESCRIPTOR, UTF8 = 0x8, 0x800
FOLDER = 0x10  # an attribute of MS-DOS: torch reads nothing of such a member, and returns memory


class Member(NamedTuple):
    """A file in a zip archive, as the central directory describes it."""

    name: bytes
    flags: int
    crc: int
    size: int
    header_start: int
    is_stored: bool  # neither compressed nor encrypted, nor a folder


class Region(NamedTuple):
    """Where bytes lie in the file, and their CRC-32 where the container has one."""

    start: int
    num_bytes: int
    crc: int | None


def read_region(
    file: io.BufferedReader, region: Region, what: str, room: np.ndarray | None = None
) -> np.ndarray:
    """The bytes of a region (uint8), checked against its CRC where there is one.

    They are in `room` where that is given. Raises as `read_unchecked` and `check_crc` do.
    """
    buffer = read_unchecked(file, region, what, room)
    check_crc(buffer, region, what)
    return buffer


def read_unchecked(
    file: io.BufferedReader, region: Region, what: str, room: np.ndarray | None
) -> np.ndarray:
    """The bytes of a region. Raises CheckpointError where the file ends before."""
    file.seek(region.start)
    try:
        return read_bytes(file, region.num_bytes, room)
    except EOFError as error:
        raise CheckpointError(f"truncated in {what}") from error


def check_crc(buffer: np.ndarray, region: Region, what: str) -> None:
    """Raise IntegrityError where the bytes do not have the CRC-32 that their archive promises."""
    if region.crc is not None and zlib.crc32(buffer.data) != region.crc:
        raise IntegrityError(f"{what} does not have the CRC-32 that the archive promises")


# --- The central directory ------------------------------------------------------------------------


def central_directory(file: io.BufferedReader, size: int) -> tuple[list[Member], int]:
    """The members of the archive of `size` bytes, and where their list starts.

    Raises CheckpointError where it is malformed, UnsafeCheckpoint where it is too long.
    """
    start, directory_size, count = _find_directory(file, size)
    if count > MAX_MEMBERS or directory_size > MAX_DIRECTORY:
        raise UnsafeCheckpoint(f"a zip archive of {count} members; at most {MAX_MEMBERS} are read")
    file.seek(start)
    directory = file.read(directory_size)
    members, position = [], 0
    try:
        for _ in range(count):
            member, position = _central_entry(directory, position)
            members.append(member)
    except struct.error as error:
        raise CheckpointError("the zip directory is truncated") from error
    if position != directory_size:
        raise CheckpointError("the zip directory has bytes that belong to no member")
    return members, start


def _find_directory(file: io.BufferedReader, size: int) -> tuple[int, int, int]:
    """The directory's start, bytes and members; only its end records may lie behind it."""
    end_start = size - END.size
    signature, *disks, here, count, directory_size, start, comment = _unpack(file, end_start, END)
    if signature != b"PK\5\6" or comment:
        raise CheckpointError("truncated: a zip archive without its directory at the end")
    _check_one_disk(disks, here, count)
    locator_start = end_start - END_LOCATOR64.size
    signature, disk, end64_start, num_disks = _unpack(file, locator_start, END_LOCATOR64)
    if signature == b"PK\6\7":  # torch always writes it; figures that fit are in both
        if end64_start + END64.size != locator_start or disk or num_disks != 1:
            raise CheckpointError("the zip64 directory is not where it should be")
        signature, *_, disk, other, here, count64, size64, start64 = _unpack(
            file, end64_start, END64
        )
        _check_one_disk([disk, other], here, count64)
        agrees = count in (count64, FULL16) and directory_size in (size64, FULL32)
        if signature != b"PK\6\6" or not agrees or start not in (start64, FULL32):
            raise CheckpointError("the zip directory and the zip64 directory disagree")
        end_start, start, directory_size, count = end64_start, start64, size64, count64
    if start + directory_size != end_start:
        raise CheckpointError("the zip directory is not where it should be")
    return start, directory_size, count


def _check_one_disk(disks: list[int], here: int, count: int) -> None:
    if any(disks) or here != count:
        raise CheckpointError("a zip archive on several disks")


def _central_entry(directory: bytes, position: int) -> tuple[Member, int]:
    """The member described at `position` of the directory, and the position of the next."""
    fields = CENTRAL_HEADER.unpack_from(directory, position)
    signature, _, _, flags, method, _, _, crc, packed, size = fields[:10]
    name_size, extra_size, comment_size, disk, _, attributes, header_start = fields[10:]
    if signature != b"PK\1\2" or disk or extra_size > MAX_EXTRA:
        raise CheckpointError("the zip directory is malformed")

    name_start = position + CENTRAL_HEADER.size
    extra_start = name_start + name_size
    comment_start = extra_start + extra_size
    name = directory[name_start:extra_start]
    extra = directory[extra_start:comment_start]
    size, packed, header_start = _zip64((size, packed, header_start), extra)
    stored = method == 0 and size == packed and not flags & ~(HAS_DESCRIPTOR | UTF8)
    stored = stored and not attributes & FOLDER
    return Member(name, flags, crc, size, header_start, stored), comment_start + comment_size


def _zip64(values: tuple[int, ...], extra: bytes) -> list[int]:
    """Replace those of `values` that did not fit 32 bits by what the extra field says."""
    wide = b""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = extra[4 : 4 + size]
        extra = extra[4 + size :]
    result = []
    for value in values:
        if value == FULL32:
            value, wide = struct.unpack_from("<Q", wide)[0], wide[8:]
        result.append(value)
    return result


# --- The members ----------------------------------------------------------------------------------


def member_regions(file: io.BufferedReader, members: list[Member], end: int) -> dict[str, Region]:
    """Where each member's bytes lie, before `end`; local headers agree, and nothing overlaps.

    Names are in lower case: torch finds a member by either.

    Raises UnsafeCheckpoint for a name that is a path out of the archive, CheckpointError else.
    """
    regions: dict[str, Region] = {}
    position = 0
    for member in sorted(members, key=lambda member: member.header_start):
        if member.header_start < position:
            raise CheckpointError(f"{member.name[:100]!r} overlaps another member of the archive")
        name = _member_name(member)
        if name in regions:
            raise CheckpointError(f"{name[:100]!r} occurs twice in the archive")
        if not member.is_stored:
            raise CheckpointError(f"{name[:100]!r} is compressed or encrypted, or a folder")
        if member.header_start + member.size > end:  # before seeking there
            raise CheckpointError(f"{name[:100]!r} reaches out of the archive")
        regions[name], position = _local_region(file, member)
        if position > end:
            raise CheckpointError(f"{name[:100]!r} reaches into the directory of the archive")
    return regions


def _member_name(member: Member) -> str:
    try:
        name = member.name.lower().decode()  # of ASCII's letters alone
    except UnicodeDecodeError as error:
        raise CheckpointError(f"a member's name is not UTF-8: {member.name[:100]!r}") from error
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts) or not name.isprintable() or "\\" in name:
        raise UnsafeCheckpoint(f"a member of the archive has a path for a name: {name[:100]!r}")
    return name


def _local_region(file: io.BufferedReader, member: Member) -> tuple[Region, int]:
    """Where the member's bytes lie, and where the member ends with its data descriptor."""
    fields = _unpack(file, member.header_start, LOCAL_HEADER)
    signature, _, flags, method, _, _, crc, packed, size, name_size, extra_size = fields
    # With a descriptor, the figures follow the data and the local header may have zeros.
    if flags & HAS_DESCRIPTOR and (crc, packed, size) == (0, 0, 0):
        crc, packed, size = member.crc, member.size, member.size
    agrees = (
        signature == b"PK\3\4"
        and (flags, method, crc) == (member.flags, 0, member.crc)
        and {packed, size} <= {member.size, FULL32}
        and file.read(name_size) == member.name
    )
    if not agrees:
        raise CheckpointError(f"{member.name[:100]!r}: the archive's two headers disagree")

    start = member.header_start + LOCAL_HEADER.size + name_size + extra_size
    end = start + member.size
    if flags & HAS_DESCRIPTOR:
        file.seek(end)
        found = file.read(24)
        descriptor = next((d for d in _descriptors(member) if found.startswith(d)), None)
        if descriptor is None:
            raise CheckpointError(f"{member.name[:100]!r}: the data descriptor disagrees")
        end += len(descriptor)
    return Region(start, member.size, member.crc), end


def _descriptors(member: Member) -> Iterator[bytes]:
    """The two forms that follow the data of a member, with sizes of 64 and of 32 bits."""
    yield struct.pack("<4sI2Q", b"PK\7\10", member.crc, member.size, member.size)
    if member.size <= FULL32:
        yield struct.pack("<4s3I", b"PK\7\10", member.crc, member.size, member.size)


def _unpack(file: io.BufferedReader, position: int, layout: struct.Struct) -> tuple:
    if position < 0:
        raise CheckpointError("the archive is truncated")
    file.seek(position)
    data = file.read(layout.size)
    if len(data) != layout.size:
        raise CheckpointError("the archive is truncated")
    return layout.unpack(data)
