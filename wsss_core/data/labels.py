"""The text files a person writes: the label list, the tag table and the list of each split.

Readers hand each fault to a `Fault`: `refuse` stops at the first, a list's `append` collects them
all (`conta data check`). Each fault is one line that names the file, its line, the value and the
next step.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NoReturn

from wsss_core.config import DataConfig
from wsss_core.errors import DataError

Fault = Callable[[str], None]

BACKGROUND = "background"
TRAIN = "train"
"""The training split, whatever its list is called."""
LABELS_FILE = "labels.txt"
# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)
# fmt: on
"""The foreground classes of PASCAL VOC: mask label 1 is aeroplane, 20 is tvmonitor."""

_MAX_CLASSES = 254  # 0 is the background, 255 is ignored


@dataclass(frozen=True)
class TagRow:
    """One row of a tag table.

    Attributes:
        where: File and line, as faults name them.
        filename: The photo's file, relative, with `/`; safe to join to a folder.
        names: Its tags as written, duplicates dropped.
    """

    where: str
    filename: str
    names: tuple[str, ...]

    @property
    def id(self) -> str:
        """The photo's id: its file name without suffix."""
        return photo_id(self.filename)


@dataclass(frozen=True)
class Listed:
    """One entry of a split's list.

    Attributes:
        where: File and line, as faults name them.
        name: A photo's id or file name, as written.
    """

    where: str
    name: str


def split_names(config: DataConfig) -> dict[str, str]:
    """The list of each split: `config.train` for `train`, the list of its own name for others."""
    return {TRAIN: config.train, **{name: name for name in config.val if name != TRAIN}}


def refuse(message: str) -> NoReturn:
    """Stop at a fault.

    Raises:
        DataError: Always.
    """
    raise DataError(message)


def photo_id(filename: str) -> str:
    """A photo's id: its relative path without suffix, with `/` on every system."""
    return PurePosixPath(filename).with_suffix("").as_posix()


def read_labels(path: Path, *, fault: Fault = refuse) -> tuple[str, ...]:
    """The foreground classes of a label list, which names one a line and `background` first."""
    text = _read_text(path, fault=fault)
    if text is None:
        return ()
    lines = enumerate(text.splitlines(), start=1)
    names = [(number, line.strip()) for number, line in lines if line.strip()]
    if not names or names[0][1] != BACKGROUND:
        first = names[0][1] if names else ""
        fault(f"{path} begins with {first!r}; expected a list of classes with 'background' first")
    first_line: dict[str, int] = {}
    for number, name in names:
        if re.search(r"[\s;,]", name):
            fault(
                f"{path} line {number}: {name!r} holds a space, ';' or ',', which separate tags; "
                "use '_'"
            )
        if name in first_line:
            fault(f"{path} line {number}: {name!r} was already on line {first_line[name]}")
        first_line.setdefault(name, number)
    classes = tuple(name for name in first_line if name != BACKGROUND)
    check_class_count(classes, where=str(path), fault=fault)
    return classes


def check_class_count(classes: Sequence[str], *, where: str, fault: Fault) -> None:
    """Masks have room for 254 classes and training needs one."""
    if not 1 <= len(classes) <= _MAX_CLASSES:
        fault(f"{where} names {len(classes)} classes; expected 1 to {_MAX_CLASSES}")


def read_tag_table(path: Path, *, fault: Fault = refuse) -> list[TagRow]:
    """The rows of a csv with the columns `filename,tags`.

    Tags are separated by spaces, `;` or, within quotes, by `,`. Other columns are passed over. Rows
    that are faulty as such (an unsafe or repeated file name, a wrong number of cells) are left out;
    what a tag means is not looked at.
    """
    text = _read_text(path, fault=fault)
    if text is None:
        return []
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: dict[str, TagRow] = {}
    try:
        header = [cell.strip() for cell in next(lines, [])]
        if not {"filename", "tags"} <= set(header):
            found = f"the columns {','.join(header)[:80]!r}" if any(header) else "nothing"
            fault(f"{path} line 1: holds {found}; expected the columns `filename,tags`")
            return []
        for cells in lines:
            if any(cell.strip() for cell in cells):
                where = f"{path} line {lines.line_num}"
                row = _read_row(cells, header=header, where=where, fault=fault)
                if row is not None and _is_new(row, rows, fault=fault):
                    rows[row.id] = row
    except csv.Error as error:
        fault(f"{path} line {lines.line_num}: {error}; quote cells as a spreadsheet's csv does")
    if not rows:
        fault(f"{path} holds no photo; expected one row `filename,tags` for each")
    return list(rows.values())


def read_list(path: Path, *, fault: Fault = refuse) -> list[Listed]:
    """The entries of a split's list, one a line."""
    text = _read_text(path, fault=fault)
    if text is None:
        return []
    entries: dict[str, Listed] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        name, where = line.strip(), f"{path} line {number}"
        if name in entries:
            fault(f"{where}: {name!r} was already named; take one of the two out")
        elif name and is_safe(name, where=where, fault=fault):
            entries[name] = Listed(where, name)
    if not entries:
        fault(f"{path} names no photo; expected one id or file name a line")
    return list(entries.values())


def number_tags(
    names: Iterable[str], *, classes: Sequence[str], where: str, fault: Fault = refuse
) -> tuple[int, ...]:
    """The 0-based classes of tags, ascending; an unknown one is a fault that names the nearest."""
    numbers = {name: number for number, name in enumerate(classes)}
    for name in names:
        if name not in numbers:
            fault(f"{where}: unknown class {name!r} ({_suggest(name, classes)})")
    return tuple(sorted({numbers[name] for name in names if name in numbers}))


def is_safe(filename: str, *, where: str, fault: Fault) -> bool:
    """Whether a file name stays below the folder it is joined to; a fault if not."""
    path = PurePosixPath(filename)
    windows = PureWindowsPath(filename)
    if path.is_absolute() or windows.is_absolute() or windows.drive:
        fault(f"{where}: {filename!r} is an absolute path; write it relative to the data folder")
        return False
    if ".." in path.parts or ".." in windows.parts:
        fault(f"{where}: {filename!r} leaves the data folder; move the photo below it")
        return False
    if "\0" in filename or max((len(part.encode()) for part in path.parts), default=0) > 255:
        fault(f"{where}: {filename[:40]!r}... is no file name; look for a quote that is not closed")
        return False
    return True


def find_file(root: Path, name: str) -> Path:
    """The file of a composed (NFC) name below a folder, where its last part may be in any form."""
    for form in ("NFC", "NFD"):
        path = root / unicodedata.normalize(form, name)
        if path.is_file():
            return path
    folder = (root / name).parent
    if name.isascii() or not folder.is_dir():
        return root / name
    wanted = unicodedata.normalize("NFC", Path(name).name)
    same = (p for p in folder.iterdir() if unicodedata.normalize("NFC", p.name) == wanted)
    return next(same, root / name)


def _read_text(path: Path, *, fault: Fault) -> str | None:
    """The text of a file, without the mark that spreadsheets put first; None after a fault."""
    try:
        # a Mac writes an umlaut as two characters, and tags are compared
        return unicodedata.normalize("NFC", path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        fault(f"{path} does not exist; write it, or name another file")
    except UnicodeDecodeError:
        fault(f"{path} is not UTF-8 text; save it as UTF-8")
    except OSError as error:
        fault(f"{path} cannot be read ({error.strerror}); check it and its permissions")
    return None


def _read_row(cells: list[str], *, header: list[str], where: str, fault: Fault) -> TagRow | None:
    if len(cells) != len(header):
        fault(
            f"{where}: has {len(cells)} cells, the header has {len(header)}; separate tags by "
            "spaces or ';'"
        )
        return None
    filename = PurePosixPath(cells[header.index("filename")].strip())
    if not is_safe(str(filename), where=where, fault=fault):
        return None
    if not filename.name:
        fault(f"{where}: the file name is empty; write it, or delete the row")
        return None
    names = dict.fromkeys(re.split(r"[;,\s]+", cells[header.index("tags")]))
    return TagRow(where, filename.as_posix(), tuple(name for name in names if name))


def _is_new(row: TagRow, rows: dict[str, TagRow], *, fault: Fault) -> bool:
    former = rows.get(row.id)
    if former is None:
        return True
    line = former.where.rpartition(" ")[2]
    if former.filename == row.filename:
        fault(
            f"{row.where}: {row.filename!r} was already on line {line}; join their tags in one row"
        )
    else:
        fault(
            f"{row.where}: {row.filename!r} and {former.filename!r} of line {line} would share "
            f"the id {row.id!r}; rename one"
        )
    return False


def _suggest(name: str, classes: Sequence[str]) -> str:
    if name == BACKGROUND:
        return "it is in every photo and is no tag"
    lowered = {known.lower(): known for known in classes}
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    if near:
        return f"did you mean {lowered[near[0]]!r}?"
    known = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    return f"known: {known}"
