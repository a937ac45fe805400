"""Class names are read from every format people have lying about, and what a user types finds the class meant."""

import json

import pytest

from onnxcam.errors import UsageError
from onnxcam.labels import KEY, Labels, labels_from_metadata, labels_to_metadata, read_labels

PETS = Labels.of(
    ["tench, Tinca tinca", "tabby, tabby cat", "Egyptian cat", "great_white_shark", "crane", "crane", "tabby"]
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "tench\ngoldfish\nshark\n"),
        ("a.txt", "tench\r\ngoldfish\r\nshark\r\n\r\n"),
        ("a.txt", "\ufefftench\ngoldfish\nshark"),
        ("a.txt", "0: tench\n1: goldfish\n2: shark\n"),
        ("a.txt", "0  tench\n1  goldfish\n2  shark\n"),
        ("a.txt", "n01440764 tench\nn01443537 goldfish\nn01484850 shark\n"),
        ("a.txt", "{0: 'tench',\n 1: 'goldfish',\n 2: 'shark'}"),
        ("labels", '["tench", "goldfish", "shark"]'),
        ("a.json", '["tench", "goldfish", "shark"]'),
        ("a.json", '{"0": "tench", "1": "goldfish", "2": "shark"}'),
        ("a.json", '{"2": "shark", "0": "tench", "1": "goldfish"}'),
        ("a.json", '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"], "2": ["n01484850", "shark"]}'),
        ("a.json", '{"tench": 0, "goldfish": 1, "shark": 2}'),
        ("config.json", '{"model_type": "resnet", "id2label": {"0": "tench", "1": "goldfish", "2": "shark"}}'),
        ("a.csv", "0,tench\n1,goldfish\n2,shark\n"),
        ("a.csv", 'index,name\n0,tench\n2,"shark"\n1,goldfish\n'),
        ("a.csv", "index;name\n0;tench\n1;goldfish\n2;shark\n"),
        ("a.csv", "tench\ngoldfish\nshark\n"),
        ("a.tsv", "0\ttench\n1\tgoldfish\n2\tshark\n"),
    ],
)
def test_labels_are_read_in_every_common_format(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert list(read_labels(tmp_path / name)) == ["tench", "goldfish", "shark"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", "tench\n", "not valid JSON"),
        ("a.json", '{"a": "b"}', "not a class number"),
        ("a.json", "3", "expected a list"),
        ("a.json", '[{"a": 1}]', "not a name"),
        ("a.csv", "0,tench\nx,shark\n", "does not start with a class number"),
        ("a.txt", "\n\n", "names no classes"),
        ("a.json", "[]", "names no classes"),
    ],
)
def test_a_broken_labels_file_is_named_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        read_labels(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_binary_labels_files_are_told_apart(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00\xd8")
    for path, message in [(tmp_path / "no.txt", "no such labels"), (tmp_path / "b.txt", "UTF-8"), (tmp_path, "read")]:
        with pytest.raises(UsageError, match=message):
            read_labels(path)


def test_numbers_alone_are_names_of_digits(tmp_path):
    (tmp_path / "digits.txt").write_text("\n".join("0123456789"))
    assert read_labels(tmp_path / "digits.txt").name(7) == "7"


def test_an_empty_line_keeps_its_number(tmp_path):
    (tmp_path / "a.txt").write_text("a\n\nc\n")
    labels = read_labels(tmp_path / "a.txt")
    assert [labels.name(i) for i in range(4)] == ["a", "class 1", "c", "class 3"]


def test_a_class_without_a_name_is_called_by_its_number():
    assert Labels().name(281) == "class 281" and PETS.name(99) == "class 99" and PETS.name(1) == "tabby, tabby cat"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("281", [281]),
        (" 3 ", [3]),
        ("tabby, tabby cat", [1]),
        ("Tabby Cat", [1]),
        ("TINCA TINCA", [0]),
        ("great white shark", [3]),
        ("great_white_shark", [3]),
        ("shark", [3]),
        ("egypt", [2]),
        ("crane", [4, 5]),  # two classes bear this very name
        ("tabby", [6]),  # a full name goes before a synonym
    ],
)
def test_text_finds_its_classes(text, expected):
    assert PETS.find(text) == expected


def test_text_that_fits_many_names_lists_them_whole_words_first():
    labels = Labels.of(["catamaran", "tiger cat", "Persian cat"])
    with pytest.raises(UsageError, match="fits 3 classes: 1 tiger cat; 2 Persian cat; 0 catamaran"):
        labels.find("cat")


def test_a_long_list_of_matches_is_cut():
    with pytest.raises(UsageError, match=r"fits 50 classes: 0 dog 0; .*7 dog 7; \.\.\."):
        Labels.of([f"dog {i}" for i in range(50)]).find("dog")


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(UsageError, match="no class is called 'egiptian cat'; the nearest: 2 Egyptian cat"):
        PETS.find("egiptian cat")
    with pytest.raises(UsageError, match="start with 0 tench"):
        PETS.find("qqqqqq")


@pytest.mark.parametrize("text", ["1000", "-1", "+1000"])
def test_a_number_out_of_range_is_an_error(text):
    with pytest.raises(UsageError, match=r"no class .*from 0 to 999"):
        PETS.find(text, classes=1000)


def test_a_number_out_of_range_may_still_be_a_name():
    assert Labels.of(["0", "90", "180", "270"]).find("90", classes=4) == [1]


def test_a_name_needs_labels():
    with pytest.raises(UsageError, match="--labels"):
        Labels().find("cat")
    assert Labels().find("7", classes=10) == [7]


def test_an_empty_text_finds_nothing():
    with pytest.raises(UsageError):
        PETS.find("  ")


def test_labels_of_another_model_are_noticed():
    with pytest.raises(UsageError, match="another model"):
        PETS.find("great white shark", classes=2)
    assert PETS.mismatch(7) is None and Labels().mismatch(5) is None
    assert "background" in (PETS.mismatch(8) or "") and "background" not in (PETS.mismatch(80) or "background")


def test_labels_written_into_metadata_are_read_back():
    labels = Labels({0: "tench", 2: "Schäferhund, 犬"})
    assert labels_from_metadata(labels_to_metadata(labels)) == labels


@pytest.mark.parametrize("text", ["cat\ndog", '["cat", "dog"]', '{"0": "cat", "1": "dog"}'])
def test_our_metadata_may_be_json_or_lines(text):
    assert list(labels_from_metadata({KEY: text}) or ()) == ["cat", "dog"]


@pytest.mark.parametrize("text", ["{", "[1, {}]", '{"a": "b"}'])
def test_malformed_metadata_of_ours_names_the_key(text):
    with pytest.raises(UsageError, match=r"metadata 'onnxcam\.labels'"):
        labels_from_metadata({KEY: text})


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"names": "{0: 'person', 1: \"o'clock\"}"}, ["person", "o'clock"]),
        ({"names": "['person', 'car']"}, ["person", "car"]),
        ({"character": "0\n90\n180\n270"}, ["0", "90", "180", "270"]),
        ({"names": "{broken"}, None),
        ({"names": "__import__('os')"}, ["__import__('os')"]),
        ({"producer": "pytorch"}, None),
        ({}, None),
    ],
)
def test_labels_of_other_exporters_are_read_and_never_run(metadata, expected):
    found = labels_from_metadata(metadata)
    assert (list(found) if found else None) == expected


def test_labels_of_other_exporters_count_only_if_their_number_fits():
    metadata = {"names": json.dumps(["a", "b"])}
    assert labels_from_metadata(metadata, classes=2) is not None and labels_from_metadata(metadata, classes=3) is None
