"""Parses class-name files. This is the only parser, for every command that takes such a file.

Text is UTF-8 (with or without a byte-order mark), or UTF-16/32 with a byte-order mark. Lines end
with LF, CRLF or CR; blank lines at the end are ignored. Columns are separated by a TAB, a comma
(CSV, with quotes) or the first space. JSON is a list of names, or an object from id or number to a
name or to ``[id, name]`` (``imagenet_class_index.json``).

Two functions read a file: ``names_by_id`` returns the name of each class by its id (folders,
WordNet ids), and ``names_by_label`` the name of each label (the line number, counted from 0, or
numbers in a column). A file that answers neither is an error that names the line; nothing is
guessed.
"""

import codecs
import csv
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError

_MAX_BYTES = 64 * 2**20
_NAMED = 5  # classes or ids that a message lists
_MARKS = (  # UTF-32 first, because its mark starts with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_WORDNET_ID = re.compile(r"n[0-9]{8}")
_HEADER = re.compile(
    r"(class|category|label|synset|wnid|index|idx|id)?[ "
    r"_-]?(id|name|label|word|description|class)?s?",
    re.IGNORECASE,
)
_OTHER_SEPARATOR = re.compile(r"""["'\[{(]*([0-9]{1,9})["'\])]*\s*[;:=|.)]+\s*\S.*""")
"""A number and a name with an unsupported separator: ``0;cat``, ``0: cat``, ``{0: 'cat',``, ``0.
cat``.
"""
_OTHER_FORMAT = re.compile(r"""\{.*|.*[{\[]|\[["'].*|[\w-]+:""")
"""First lines of JSON Lines, Python literals, protocol buffers and YAML."""
_CONTROL = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\ud800-\udfff]"
)  # not TAB, which separates columns


@dataclass(frozen=True)
class _Row:
    """Two columns of a line, and their location for messages."""

    where: str
    identity: str
    name: str


@dataclass(frozen=True)
class _Parsed:
    """A parsed file: its rows under each column separator, and its lines as names."""

    by_tab: list[_Row]
    by_comma: list[_Row]
    by_space: list[_Row]
    names: list[str]

    @property
    def candidates(self) -> list[list[_Row]]:
        return [self.by_tab, self.by_comma, self.by_space]


def names_by_id(path: str | Path, class_ids: Sequence[str], raw: bytes | None = None) -> list[str]:
    """Return the name of each class of ``class_ids``, by the first column of a file.

    Rows of other classes are ignored, so that a list of all ImageNet synsets can name a subset. If
    the ids are the numbers 0 to n-1, a plain list of n names is accepted too. ``raw``: the content,
    if the file is in an archive. Classes without a name keep their ids, which is reported on
    stderr; a file that names no class is an error. Raises UserError.
    """
    parsed = _parse(path, _read(path) if raw is None else raw)
    requested = {_normal(identity): identity for identity in class_ids}
    best = max(
        parsed.candidates, key=lambda rows: len({row.identity for row in rows} & requested.keys())
    )
    rows = [row for row in best if row.identity in requested]
    numbers = [str(number) for number in range(len(class_ids))]
    if (
        not any(row.name for row in best)
        and list(class_ids) == numbers
        and len(parsed.names) == len(class_ids)
    ):
        return parsed.names
    if not rows:
        first = next(
            (row.identity for row in parsed.by_space or parsed.by_tab), next(iter(parsed.names), "")
        )
        raise UserError(
            f"{path}: names none of the {len(class_ids)} classes ({_some(class_ids)}); each "
            "line is an id, a TAB, a comma or a space, and a name, but the first line begins "
            f"with {first[:40]!r}"
        )
    if set(class_ids) == set(numbers) and {row.identity for row in best} == {
        str(int(n) + 1) for n in numbers
    }:
        raise UserError(
            f"{path}: numbers its names from 1 to {len(numbers)}, but the classes begin with 0; "
            "number them from 0"
        )
    if not any(row.name for row in best):  # a list of only the ids
        return list(class_ids)
    by_id = {key: row.name for key, row in _unique(path, rows).items()}
    if missing := [identity for identity in class_ids if _normal(identity) not in by_id]:
        print(
            f"convoy: {path}: names {len(by_id)} of the {len(class_ids)} classes; the others "
            "keep their ids as names: "
            f"{_some(missing)}",
            file=sys.stderr,
        )
    return [by_id.get(_normal(identity), identity) for identity in class_ids]


def names_by_label(path: str | Path) -> list[str]:
    """Return the name of each label, counted from 0.

    Numbers 0 to n-1 in the first or second column are the labels. Otherwise the line number is the
    label, and the first column is not part of the name if it holds WordNet ids or is separated by a
    TAB. Raises UserError.
    """
    parsed = _parse(path, _read(path))
    for rows in parsed.candidates:
        if (
            names := _numbered(path, _without_header(rows), is_certain=rows is not parsed.by_space)
        ) is not None:
            return names
    for rows in parsed.candidates:
        if (names := _numbered_second(path, rows)) is not None:
            return names
    if not parsed.names:
        raise UserError(
            f"{path}: its keys are not numbers, so it is unclear which label has which name"
        )
    for rows in parsed.candidates:
        rows = _without_header(rows)
        are_ids = all(_WORDNET_ID.fullmatch(row.identity) for row in rows)
        if any(row.name for row in rows) and (are_ids or rows is parsed.by_tab):
            _unique(path, rows)
            return [row.name for row in rows]
    _check_format(path, parsed.names)
    if _HEADER.fullmatch(parsed.names[0]):
        raise UserError(
            f"{path}: line 1: {parsed.names[0]!r} looks like a header, not like a class; remove it"
        )
    if all(re.fullmatch(r'"([^"]|"")*"', name) for name in parsed.names):
        return [name[1:-1].replace('""', '"') for name in parsed.names]
    return parsed.names


def synsets(path: str | Path, raw: bytes) -> dict[str, str]:
    """Return the name of each WordNet id, in file order (``synset_words.txt``).

    Raises UserError.
    """
    for rows in _parse(path, raw).candidates:
        if rows and all(_WORDNET_ID.fullmatch(row.identity) for row in rows):
            return {identity: row.name for identity, row in _unique(path, rows).items()}
    raise UserError(
        f"{path}: not every line begins with a WordNet id (n01440764) that a space, comma or "
        "TAB follows"
    )


# --- from bytes to lines ------------------------------------------------------------------------


def _read(path: str | Path) -> bytes:
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: the file of class names cannot be read: {reason}") from None
    if len(content) > _MAX_BYTES:
        raise UserError(
            f"{path}: is larger than {_MAX_BYTES:,} bytes, the limit for a file of class names"
        )
    return content


def _parse(path: str | Path, content: bytes) -> _Parsed:
    text = _text(path, content)
    is_json = Path(path).suffix.lower() == ".json"
    if is_json or text.lstrip()[:1] in ("[", "{"):
        try:
            return _parse_json(path, json.loads(text, object_pairs_hook=_Pairs))
        except (ValueError, RecursionError) as error:
            if is_json or isinstance(error, UserError):
                raise (
                    error
                    if isinstance(error, UserError)
                    else UserError(f"{path}: is not valid JSON: {error}")
                ) from None
    lines = _lines(path, text)
    return _Parsed(_rows(lines, _by_tab), _rows(lines, _by_comma), _rows(lines, _by_space), lines)


def _text(path: str | Path, content: bytes) -> str:
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding not in ("utf-8", "utf-8-sig"):
            raise UserError(f"{path}: is not valid {encoding.upper()}; save it as UTF-8") from None
        line = len(re.findall(rb"\r\n|\n|\r", error.object[: error.start])) + 1
        raise UserError(
            f"{path}: line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save "
            "the file as UTF-8 "
            "(from Windows: `iconv -f WINDOWS-1252 -t UTF-8`)"
        ) from None
    if "\0" in text:
        raise UserError(
            f"{path}: contains zero bytes, as UTF-16 without a byte-order mark does; save it as "
            "UTF-8"
        )
    return text


def _lines(path: str | Path, text: str) -> list[str]:
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text)]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path}: is empty, but one line per class is needed")
    for number, line in enumerate(lines, start=1):
        if not line:
            raise UserError(
                f"{path}: line {number}: is blank, so it is unclear which class has which name; "
                "remove it"
            )
        if line.startswith("#"):
            raise UserError(
                f"{path}: line {number}: begins with '#'; comments are not supported, remove it"
            )
        _check_name(path, f"line {number}", line)
    return lines


def _check_name(path: str | Path, where: str, name: str) -> None:
    if not name.strip():
        raise UserError(f"{path}: {where}: the name is empty")
    if _CONTROL.search(name):
        raise UserError(
            f"{path}: {where}: {name[:40]!r} contains a control character or half of a "
            "surrogate pair"
        )


# --- from lines to rows -------------------------------------------------------------------------


def _rows(lines: list[str], split: Callable[[str], tuple[str, str]]) -> list[_Row]:
    parts = [split(line) for line in lines]
    return [
        _Row(f"line {n}", _normal(identity), name.strip())
        for n, (identity, name) in enumerate(parts, start=1)
    ]


def _by_tab(line: str) -> tuple[str, str]:
    identity, _, name = line.partition("\t")
    return identity, name


def _by_space(line: str) -> tuple[str, str]:
    identity, *rest = line.split(None, 1)
    return identity, rest[0] if rest else ""


def _by_comma(line: str) -> tuple[str, str]:
    try:
        identity, *rest = next(csv.reader([line], skipinitialspace=True, strict=True))
    except csv.Error:
        identity, *rest = line.split(",", 1)
    return identity, ", ".join(field.strip() for field in rest)


class _Pairs(list):
    """Items of a JSON object, including repeated keys."""


def _parse_json(path: str | Path, value: object) -> _Parsed:
    names: list[str] = []
    by_key: list[_Row] = []
    by_id: list[_Row] = []
    for number, item in enumerate(value if isinstance(value, list) else ()):
        where = f"item {number}"
        if isinstance(value, _Pairs):
            key, item = item
            where = f"key {key[:40]!r}"
            if (
                isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)
            ):  # imagenet_class_index.json
                by_id.append(_Row(where, _normal(item[0]), str(item[1])))
                item = item[1]
            elif type(item) is int:  # class_to_idx of torchvision's ImageFolder
                key, item = str(item), key
            by_key.append(_Row(where, _normal(key), str(item).strip()))
        names.append(item if isinstance(item, str) else "")
        _check_name(path, where, names[-1])
    if not names:
        raise UserError(
            f"{path}: is neither a JSON list of names nor a JSON object from ids or numbers to "
            "names"
        )
    return _Parsed(by_key, by_id, [], [] if by_key else names)


# --- from rows to names --------------------------------------------------------------------------


def _without_header(rows: list[_Row]) -> list[_Row]:
    """Return the rows without a header row.

    A header is detected by its words, or because the rows below it are numbered.
    """
    if len(rows) < 2 or not rows[0].name or rows[0].where != "line 1":  # JSON has no header
        return rows
    numbers = {row.identity for row in rows[1:]}
    above_numbers = not re.search("[0-9]", rows[0].identity) and numbers == {
        str(n) for n in range(len(numbers))
    }
    if above_numbers or (_HEADER.fullmatch(rows[0].identity) and _HEADER.fullmatch(rows[0].name)):
        del rows[0]
    return rows


def _numbered_second(path: str | Path, rows: list[_Row]) -> list[str] | None:
    """Return the names ordered by the second column if it holds 0 to n-1 (``cat,0``), or None."""
    body = rows[1:] if rows and not rows[0].name.isdecimal() else rows
    if len(body) < 2 or {row.name for row in body} != {str(number) for number in range(len(body))}:
        return None
    _unique(path, body)
    return [row.identity for row in sorted(body, key=lambda row: int(row.name))]


def _check_format(path: str | Path, lines: list[str]) -> None:
    """Reject lines that hold more than names. Raises UserError."""
    matches = [_OTHER_SEPARATOR.fullmatch(line) for line in lines[:3]]
    numbers = [int(match[1]) if match else None for match in matches]
    if any(numbers[i : i + 2] in ([0, 1], [1, 2]) for i in range(2)):
        at = next(i for i, number in enumerate(numbers) if number is not None)
        raise UserError(
            f"{path}: line {at + 1}: {lines[at][:40]!r} is a number and a name, but not "
            "separated by a TAB, a comma or a space"
        )
    if _OTHER_FORMAT.fullmatch(lines[0]) or all(line.startswith("- ") for line in lines):
        raise UserError(
            f"{path}: line 1: {lines[0][:40]!r} looks like YAML, JSON or code; write one name "
            "per line, or a JSON list"
        )


def _numbered(path: str | Path, rows: list[_Row], is_certain: bool) -> list[str] | None:
    """Return the names ordered by the first column, if it numbers them, else None.

    Names may start with numbers ("2012 Tesla"): unless ``is_certain``, one of the numbers must be 0
    or 1.
    """
    wrong = next((row for row in rows if not re.fullmatch("[0-9]{1,9}", row.identity)), None)
    if not any(row.name for row in rows) or (
        wrong and [row.identity for row in rows[:2]] != ["0", "1"]
    ):
        return None
    if wrong:
        raise UserError(f"{path}: {wrong.where}: has no number, unlike the lines before it")
    by_number = [_Row(row.where, str(int(row.identity)), row.name) for row in rows]
    numbers = {row.identity for row in by_number}
    if not is_certain and not numbers & {"0", "1"}:
        return None
    found = _unique(path, by_number)
    if numbers == {str(number) for number in range(1, len(rows) + 1)}:
        raise UserError(
            f"{path}: numbers its names from 1 to {len(rows)}, but labels begin with 0; number "
            "them from 0"
        )
    if missing := [number for number in map(str, range(len(rows))) if number not in numbers]:
        raise UserError(
            f"{path}: has {len(rows)} numbered names, but none for label {_some(missing)}"
        )
    return [found[str(number)].name for number in range(len(rows))]


def _unique(path: str | Path, rows: list[_Row]) -> dict[str, _Row]:
    """Return the rows by id. Raises UserError for a duplicate id and for an id without a name."""
    found: dict[str, _Row] = {}
    for row in rows:
        if not row.name:
            raise UserError(f"{path}: {row.where}: {row.identity!r} has no name")
        if "\t" in row.name:
            raise UserError(
                f"{path}: {row.where}: has more than two columns; an id and a name are needed"
            )
        if row.identity in found:
            raise UserError(
                f"{path}: {row.where}: {row.identity!r} already has a name, on "
                f"{found[row.identity].where}"
            )
        found[row.identity] = row
    return found


def _normal(identity: str) -> str:
    """Normalize an id for comparison: macOS writes the same name with other code points (NFD)."""
    return unicodedata.normalize("NFC", identity.strip())


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    rest = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    return ", ".join(repr(name) for name in shown[:_NAMED]) + rest
