"""Class-name files in common formats and encodings."""

from pathlib import Path

import pytest
from support.helpers import RunText

from pipelines.datasets.class_names import names_by_id, names_by_label, synsets
from pipelines.datasets.sources.list_source import ListOptions, list_source
from trainer.errors import UserError

IDS = ["cat", "dog"]
TENCH = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n"


def file(folder: Path, content: str | bytes, name: str = "names.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [" ", "\t", ",", ", "])
def test_encodings_line_ends_and_separators_give_the_same_names(
    separator: str, end: str, encoding: str, tmp_path: Path
) -> None:
    text = end.join([f"dog{separator}hünd", f"cat{separator}domestic cat", "", "  ", ""])
    assert names_by_id(file(tmp_path, text.encode(encoding)), IDS) == ["domestic cat", "hünd"]
    labels = end.join([f"0{separator}domestic cat", f"1{separator}hünd", ""])
    assert names_by_label(file(tmp_path, labels.encode(encoding))) == ["domestic cat", "hünd"]


@pytest.mark.parametrize(
    ("content", "ids", "names"),
    [
        (
            TENCH + "n02119789 fox\n",
            ["n01443537", "n01440764"],
            ["goldfish, Carassius auratus", "tench, Tinca tinca"],
        ),
        ('id,name\ncat,"cat, domestic"\ndog,hound', IDS, ["cat, domestic", "hound"]),
        ("guinea pig\tCavia\ndog\thound", ["dog", "guinea pig"], ["hound", "Cavia"]),
        ("cat\ndog\nowl", IDS, IDS),
        ("shirt\ntrouser, long", ["0", "1"], ["shirt", "trouser, long"]),
        ("cafe\u0301 coffee", ["caf\u00e9"], ["coffee"]),
        (
            '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}',
            ["n01443537", "n01440764"],
            ["goldfish", "tench"],
        ),
    ],
)
def test_names_are_found_by_id(
    content: str, ids: list[str], names: list[str], tmp_path: Path
) -> None:
    assert names_by_id(file(tmp_path, content), ids) == names


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("tench, Tinca tinca\ngoldfish\n", ["tench, Tinca tinca", "goldfish"]),
        (TENCH, ["tench, Tinca tinca", "goldfish, Carassius auratus"]),
        ("1 dog\n0 cat", ["cat", "dog"]),
        ('label,name\n1,dog\n0,"cat, domestic"', ["cat, domestic", "dog"]),
        ("wnid,name\nn01440764,tench", ["tench"]),
        ("2012 Tesla\n2012 BMW", ["2012 Tesla", "2012 BMW"]),
        ("0\n1\n2", ["0", "1", "2"]),
        ("crane\ncrane\n", ["crane", "crane"]),
        ('"a, b"\n"c"', ["a, b", "c"]),
        ('{"1": ["n01443537", "goldfish"], "0": ["n01440764", "tench"]}', ["tench", "goldfish"]),
        ('{"dog": 1, "cat": 0}', ["cat", "dog"]),
        ('["cat", "dog"]', ["cat", "dog"]),
        ("Class Index,Class Name\n0,cat\n1,dog", ["cat", "dog"]),
        ("ClassId,SignName\n0,Speed limit (20km/h)\n1,Stop", ["Speed limit (20km/h)", "Stop"]),
        ("label\ttext\n0\tcat\n1\tdog", ["cat", "dog"]),
        ("cat,1\ndog,0", ["dog", "cat"]),
        ("cat\t0\ndog\t1", ["cat", "dog"]),
        ("-1 background\n0 cat", ["-1 background", "0 cat"]),
        ("Big Cat\n2012 Tesla\n2013 BMW", ["Big Cat", "2012 Tesla", "2013 BMW"]),
    ],
)
def test_names_are_found_by_label(content: str, names: list[str], tmp_path: Path) -> None:
    assert (
        names_by_label(file(tmp_path, content, "names.json" if content[0] in "[{" else "names.txt"))
        == names
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        (b"\xef\xbb\xbf\r\n", "is empty"),
        ("cat a\n\ndog b\n", "line 2: is blank"),
        ("cat a\n# more\ndog b\n", "line 2: begins with '#'"),
        (b"cat a\ncaf\xe9 b\n", "line 2: byte 0xe9 is not UTF-8"),
        ("cat a\ndog b".encode("utf-16-le"), "UTF-16 without a byte-order mark"),
        (b"\xff\xfec\x00a", "not valid UTF-16"),
        ("cat a\x0bb\ndog b", "line 1: 'cat a\\x0bb' contains a control character"),
        ("cat a\ncat b\ndog c", "line 2: 'cat' already has a name, on line 1"),
        ("cat a\ndog", "line 2: 'dog' has no name"),
        ("owl a\nbee b", "names none of the 2 classes ('cat', 'dog')"),
        ("cat\ta\tb\ndog\tc", "more than two columns"),
    ],
)
def test_invalid_files_of_names_by_id_are_errors(
    content: str | bytes, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        names_by_id(file(tmp_path, content), IDS)
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/names.txt: ")
    assert "\n" not in str(caught.value)


def test_names_numbered_from_1_do_not_match_classes_numbered_from_0(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="numbers its names from 1 to 3, but the classes begin with 0"
    ):
        names_by_id(file(tmp_path, "1 a\n2 b\n3 c"), ["0", "1", "2"])


def test_classes_without_a_name_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert names_by_id(file(tmp_path, "cat domestic cat\nowl b"), IDS) == ["domestic cat", "dog"]
    assert (
        "names 1 of the 2 classes; the others keep their ids as names: 'dog'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("cat\n\ndog\n", "line 2: is blank"),
        ("1 cat\n2 dog\n", "numbers its names from 1 to 2"),
        ("0 cat\n2 dog\n", "none for label '1'"),
        ("0 cat\n0 dog\n", "'0' already has a name"),
        ("0 cat\n1 dog\nowl", "line 3: has no number"),
        ("name\ncat\ndog", "looks like a header"),
        ("0;cat\n1;dog", "line 1: '0;cat' is a number and a name, but not separated"),
        ("0: cat\n1: dog", "line 1: '0: cat' is a number and a name, but not separated"),
        ("names:\n  0: cat\n  1: dog", "line 2: '0: cat' is a number and a name"),
        (
            " {0: 'tench, Tinca tinca',\n 1: 'goldfish'}",
            "is a number and a name, but not separated",
        ),
        ("- cat\n- dog", "looks like YAML"),
        ("item {\n id: 1\n}", "looks like YAML, JSON or code"),
        ('{"cat": -1, "dog": 0}', "its keys are not numbers"),
        ("a\tcat\ndog", "line 2: 'dog' has no name"),
        ('{"cat": "a"}', "its keys are not numbers"),
        ('["cat", 1]', "item 1"),
        ('["\\ud800"]', "surrogate"),
        ("[1", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("{}", "neither a JSON list of names"),
    ],
)
def test_invalid_files_of_names_by_label_are_errors(
    content: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        names_by_label(file(tmp_path, content, "names.json" if content[0] in "[{" else "names.txt"))
    assert reason in str(caught.value)


def test_unreadable_file_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.txt", "a\0b"):
        with pytest.raises(UserError, match="cannot be read"):
            names_by_label(path)


def test_synsets_keep_the_order_of_the_file() -> None:
    assert list(synsets("f", b"\xef\xbb\xbf" + TENCH.replace("\n", "\r\n").encode())) == [
        "n01440764",
        "n01443537",
    ]
    with pytest.raises(UserError, match="WordNet id"):
        synsets("f", b"tench\n")


def test_pack_reads_the_same_files_as_index(
    jpeg_folder: Path, convoy_refuses: RunText, tmp_path: Path
) -> None:
    """The file is passed with ``--class-names``."""
    classes = list_source(str(jpeg_folder)).splits[0].class_ids
    words = "\ufeff" + "".join(f"{identity}\tname of {identity}\r\n" for identity in classes)
    names = file(tmp_path, words)
    packed = list_source(str(jpeg_folder), ListOptions(str(names))).splits[0]
    assert packed.classes == [f"name of {identity}" for identity in classes]
    message = convoy_refuses(
        "pack", jpeg_folder, tmp_path / "out", "--class-names", file(tmp_path, "owl a\n", "owl.txt")
    )
    assert "owl.txt: names none of the" in message
    assert not (tmp_path / "out").exists()
