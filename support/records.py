"""LLaVA's files, read record by record: 665k records are a gigabyte of text and several of objects.

In memory are four numbers a record, in every rank and every loader worker; the text stays on disk.
"""

import codecs
import hashlib
import json
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from support.errors import BadInput
from support.files import digest, open_file

BLOCK = 16 << 20  # bytes of a file that are looked at together
LONGEST_RECORD = 64 << 20  # bytes; without a limit a broken file would be read into memory whole
SPACE = re.compile(r"[ \t\r\n]*")


class Records:
    """The records (dicts) of LLaVA files, each a JSON list or JSON lines: len(records), records[i].

    One pass finds where each begins; one record at a time is then read and parsed. In memory are four numpy
    arrays, over all records: offset and size in bytes, characters of all turns (an estimate: a letter outside
    ASCII may count as the bytes of its UTF-8), has_image.

    BadInput: a file that is missing, no JSON, cut short or without records, or a record that is no object;
    later a file that is no longer what it was. No file stays open: safe to fork and to pickle.
    """

    def __init__(self, files: Iterable[str | Path]):
        self.files = [Path(file) for file in files]
        if not self.files:
            raise BadInput("no file of records is named; give a LLaVA JSON with --data")
        # of each file: size and time of its content, what that is, number after its last record
        self.stamps, self.digests, self.ends = [], [], []
        offset, size, characters, has_image = array("q"), array("i"), array("i"), array("b")
        for file in self.files:
            try:
                self.stamps.append(stamp(os.stat(file)))
                read = hashlib.sha256()
                for start, length, record in scan(file, read):
                    offset.append(start)
                    size.append(length)
                    characters.append(count_characters(record))
                    has_image.append(bool(record.get("image")))
            except OSError as error:
                raise BadInput(
                    f"{file} cannot be read ({error.strerror}); give a LLaVA JSON with --data"
                ) from None
            self.ends.append(len(offset))
            self.digests.append(read.hexdigest())
        self.offset, self.size = np.array(offset), np.array(size)
        self.characters, self.has_image = np.array(characters), np.array(has_image, dtype=bool)

    def __len__(self) -> int:
        return len(self.offset)

    def number_of_file(self, i: int) -> int:
        """In which of the files record i lies."""
        return bisect_right(self.ends, i)

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]  # IndexError beyond the last
        number = self.number_of_file(i)
        file = self.files[number]
        try:
            with open_file(file) as handle:  # opened anew: no state that workers could share
                if (now := stamp(os.fstat(handle.fileno()))) != self.stamps[number]:  # perhaps only touched
                    if digest(handle) != self.digests[number]:
                        raise ValueError("other content")
                    self.stamps[number] = now
                content = os.pread(handle.fileno(), int(self.size[i]), int(self.offset[i]))
            return json.loads(content.decode("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BadInput(
                f"{file} has changed since the start of the run ({error}); leave data alone and start again"
            ) from None


def stamp(state: os.stat_result) -> tuple[int, int]:
    """Size in bytes and time of its content, which tell a file from the same file changed."""
    return state.st_size, state.st_mtime_ns


def count_characters(record: dict) -> int:
    """Count the characters of all turns of a record; what is malformed counts nothing here."""
    turns = record.get("conversations", record.get("chosen"))
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    values = [turn.get("value") for turn in turns]
    return sum(len(value) for value in values if isinstance(value, str))


def scan(file: Path, read: "hashlib._Hash") -> Iterator[tuple[int, int, dict]]:
    """Offset and size in bytes, and content, of every record of a JSON list ('[' first) or of JSON lines.

    The file passes through a window of BLOCK bytes and the record that it cuts. Bytes are decoded as latin-1,
    one character each, so that places in the text are places in the file; hence in the content letters
    outside ASCII are garbled. `read` is updated with all bytes. Raises BadInput with file and byte.
    """
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    text, begin, at = "", 0, 0  # the window, the byte at which it begins, how far in it we are

    def broken(reason: str, byte: int) -> BadInput:
        return BadInput(
            f"{file}, byte {byte}: {reason}; a JSON list of objects or JSON lines is asked for, so mend the "
            "file or fetch it again"
        )

    with open_file(file) as handle:

        def more() -> bool:
            """Move the window on; what lies before `at` is dropped. False at the end of the file."""
            nonlocal text, begin, at
            block = handle.read(BLOCK)
            read.update(block)
            text, begin, at = text[at:] + block.decode("latin-1"), begin + at, 0
            try:
                utf8.decode(block)
            except UnicodeDecodeError as error:
                byte = begin + len(text) - len(error.object) + error.start
                raise broken(f"not UTF-8 ({error.reason})", byte) from None
            return bool(block)

        def peek() -> str:
            """The next character that is no white space, "" at the end of the file."""
            nonlocal at
            while True:
                at = SPACE.match(text, at).end()
                if at < len(text) or not more():
                    return text[at : at + 1]

        if handle.peek(3).startswith(codecs.BOM_UTF8):
            read.update(handle.read(3))
            begin = 3
        comma, end = (",", "]") if peek() == "[" else ("", "")
        at += len(end)
        while True:
            if peek() != "{":
                found = repr(text[at : at + 20]) if text else "the end of the file"
                raise broken(f"not an object but {found}", begin + at)
            while True:
                try:
                    record, stop = decoder.raw_decode(text, at)
                    break
                except (ValueError, RecursionError) as error:  # broken, or cut by the end of the window
                    byte = begin + getattr(error, "pos", at)
                    if len(text) - at > LONGEST_RECORD or not more():
                        raise broken(getattr(error, "msg", str(error)), byte) from None
            yield begin + at, stop - at, record
            at = stop
            follows = peek()
            if follows == end:
                break
            if comma and follows != comma:
                raise broken("neither a comma nor the end of the list after a record", begin + at)
            at += len(comma)
        at += len(end)
        if peek():
            raise broken("something follows the end of the list", begin + at)
