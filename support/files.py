"""Files: each is opened here, whole or not at all when it is written, and never over what is not ours."""

import codecs
import fcntl
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from support.errors import BadInput, is_utf8

# ---------------------------------------------------------------- reading


def open_file(file: Path) -> IO[bytes]:
    """A regular file, for reading. OSError: it is not there, or no regular file.

    To open a pipe, as `--data <(command)` gives it, would be to wait for whoever writes to it.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):
        kind = "a folder" if os.path.isdir(file) else "a pipe or a device"
        raise OSError(0, f"it is {kind}, not a regular file", str(file))
    return open(file, "rb")


def digest(file: IO[bytes]) -> str:
    """Of all that is in an open file, a block at a time."""
    state = hashlib.sha256()
    while block := file.read(1 << 24):
        state.update(block)
    return state.hexdigest()


def read_bytes(file: Path, remedy: str = "") -> bytes:
    """What is in a file, without a byte order mark. BadInput, which ends in `remedy`: it cannot be read."""
    try:
        with open_file(file) as handle:
            return handle.read().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise BadInput(f"{file} is missing or cannot be read ({error.strerror}){remedy}") from None


def read_text(file: Path, remedy: str = "") -> str:
    """A text file, UTF-8. BadInput, which ends in `remedy`: it is none."""
    try:
        return read_bytes(file, remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}){remedy}") from None


def parse_json(text: str | bytes, where: object, remedy: str = "") -> Any:
    """JSON; two equal keys in an object are an error, of which Python would silently keep the last."""

    def once(pairs: list[tuple[str, Any]]) -> dict:
        if len(content := dict(pairs)) != len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"{key!r} is there twice")
        return content

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # ValueError also: a number of 5,000 digits
        raise BadInput(f"{where} is not valid JSON ({error}){remedy}") from None


def read_json(file: Path, kind: type = dict, remedy: str = "; fetch or write it again") -> Any:
    """A JSON file that holds a `kind`; anything else is one sentence about that file."""
    content = parse_json(read_text(file, remedy), file, remedy)
    if not isinstance(content, kind):
        raise BadInput(f"{file} holds a {type(content).__name__}, not a {kind.__name__}{remedy}")
    return content


def field(record: Any, name: str, kind: type, where: object) -> Any:
    """record[name], which must be a `kind` (float: any number) and, if a text, not blank."""
    value = record.get(name) if isinstance(record, dict) else None
    right = isinstance(value, (int, float) if kind is float else kind)
    if not right or isinstance(value, bool) != (kind is bool):
        raise BadInput(f"{where}: {name} is {f'{value!r}':.60}, not a {kind.__name__}")
    if isinstance(value, str) and not value.strip():
        raise BadInput(f"{where}: {name} is empty")
    if isinstance(value, str) and not is_utf8(value):
        raise BadInput(f"{where}: {name} has a lone surrogate, {f'{value!r}':.60}, which is no text")
    return value


def texts(record: Any, where: object, *names: str) -> list[str]:
    """Several fields that are texts."""
    return [field(record, name, str, where) for name in names]


# ---------------------------------------------------------------- writing


@contextmanager
def temporary_beside(path: Path, folder: bool) -> Iterator[Path]:
    """An empty file or folder beside `path`, under a name that no other process has, to be renamed to it.

    It is locked while its process lives. What the dead have left for the same path is removed before, and
    this one at the end unless it was renamed.
    """
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.writing"):
        with suppress(OSError), locked(old):  # another has it; or a file system without locks
            remove(old)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")  # nobody looks for it until it is locked
    new.mkdir() if folder else new.touch(exist_ok=False)
    temporary = new.with_suffix(".writing")
    try:
        with ExitStack() as stack:
            with suppress(OSError):
                stack.enter_context(locked(new))
            new.rename(temporary)
            yield temporary
    finally:
        remove(new)
        remove(temporary)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Have a file or folder for this process alone, until it ends. OSError: that cannot be."""
    number = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder to write into, which takes the name `folder` at the end: all of it or nothing.

    A folder that exists and is not empty is an error: nothing already saved is ever overwritten.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} exists already and is not empty; choose another --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(folder, folder=True) as temporary:
        yield temporary
        os.replace(temporary, folder)  # replaces an empty folder, too


def sync(file: Path) -> None:
    """Wait until a file is on disk: before its name is, or a power cut would leave an empty one."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def write_atomically(file: Path, content: str | bytes) -> None:
    """Replace a file: after a crash the old one or the new one is there, whole."""
    with temporary_beside(file, folder=False) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        sync(temporary)
        os.replace(temporary, file)


def check_writable(folder: Path) -> None:
    """One sentence, before any work, for a folder that cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror}); choose another folder") from None


def check_output(file: Path, mark: bytes, inputs: Iterable[Path | None] = ()) -> None:
    """One sentence, before any work, where `file` must not be replaced.

    It may not be read by the same command, nor be a folder or a device, nor have something in it that is not
    of this program's making, which has `mark` near its beginning (or was cut within it).
    """
    check_writable(file.parent)
    inputs = [path for path in inputs if path]
    linked = [path for path in inputs if path.exists() and file.exists() and path.samefile(file)]
    if linked or os.path.realpath(file) in map(os.path.realpath, inputs):
        raise BadInput(f"{file} is read by this command, which would write over it; choose another name")
    if not file.exists():
        return
    if not file.is_file():
        raise BadInput(f"{file} is a folder or a device, not a file; choose another name")
    with open_file(file) as handle:
        head = handle.read(200)
    if mark not in head and not mark.startswith(head):
        raise BadInput(f"{file} was not written by this program; choose another name")


def lock_file(file: IO, how: int, taken: str) -> None:
    """Lock an open file (fcntl.LOCK_EX, LOCK_SH) until it is closed, however the process ends.

    Where another process has it, BadInput with the sentence `taken`.
    """
    try:
        fcntl.lockf(file, how | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BadInput(taken) from None
    except OSError:
        pass  # a file system without locks
