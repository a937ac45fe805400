"""The command line as a user runs it: what it prints, what it writes, how it fails.

Most runs are in this process; those where the process itself matters (pipes, signals, encodings) are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from walking import network

import onnxcam
from onnxcam.cli import main
from small_nets import resnet

RNG = np.random.default_rng(4)
W, V = RNG.normal(size=(4, 3, 3, 3)).astype(np.float32), RNG.normal(size=(4, 5)).astype(np.float32)
FEATURES = "c = Conv(x, w) r = Relu(c)"
POOLED = f"{FEATURES} g = GlobalAveragePool(r) f = Flatten(g)"


def save(name: str, body: str, signature: str = "(float[N,3,16,16] x) => (float[N,5] y)", w: np.ndarray = W) -> None:
    onnx.save(network(f"{signature} {{ {body} }}", w=w, v=V), name)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder with models and pictures, good and bad; tests write to folders of their own."""
    place = tmp_path_factory.mktemp("cli")
    here = Path.cwd()
    os.chdir(place)
    onnx.save(resnet(), "good.onnx")
    Path("truncated.onnx").write_bytes(Path("good.onnx").read_bytes()[:500])
    Path("text.onnx").write_text("layer { name: 'conv1' }\n")
    Path("empty.onnx").touch()
    save("flat.onnx", "y = Gemm(x, v)", "(float[N,4] x) => (float[N,5] y)")
    wide = RNG.normal(size=(4, 4, 3, 3)).astype(np.float32)
    save("four-channels.onnx", f"{POOLED} y = Gemm(f, v)", "(float[N,4,16,16] x) => (float[N,5] y)", wide)
    save(
        "two-inputs.onnx",
        f"x = Add(a, b) {POOLED} y = Gemm(f, v)",
        "(float[N,3,9,9] a, float[N,3,9,9] b) => (float[N,5] y)",
    )
    save(
        "facts.onnx",
        "c = Conv(x, w) r = Relu(c) g = GlobalAveragePool(r) f = Flatten(g) j = Add(f, m) q = Where(is_training, f, j) "
        "y = Gemm(q, v) z = Softmax(y)",
        "(float[N,3,16,16] x, float[N,4] m, bool[1] is_training) => (float[N,5] y, float[N,5] z)",
    )
    np.save("rows.npy", RNG.normal(size=(3, 4)))
    np.save("row.npy", RNG.normal(size=(1, 4)))
    np.save("images.npy", RNG.normal(size=(2, 3, 16, 16)))
    np.savez("both.npz", x=RNG.normal(size=(2, 3, 16, 16)), m=RNG.normal(size=(2, 4)))
    np.savez("one.npz", RNG.normal(size=(3, 4)))
    np.save("objects.npy", np.array([{}]), allow_pickle=True)
    save("det.onnx", f"{FEATURES} d = Det(r) y = Gemm(d, v)")
    save("places.onnx", f"{POOLED} z = Gemm(f, v) y = NonZero(z)", "(float[N,3,16,16] x) => (int64[2,K] y)")
    save("maps.onnx", "c = Conv(x, w) y = Relu(c)", "(float[N,3,16,16] x) => (float[N,4,14,14] y)")
    picture = Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for name in ("a.png", "b.png", "one/a.png", "two/a.png"):
        Path(name).parent.mkdir(exist_ok=True)
        picture.save(name)
    Path("one/notes.txt").write_text("no picture")
    Path("no-pictures").mkdir()
    Path("broken.png").write_bytes(Path("a.png").read_bytes()[:200])
    Path("text.png").write_text("no picture")
    Path("labels.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    Path("file").touch()
    os.chdir(here)
    return place


@pytest.fixture
def place(workplace, monkeypatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def run(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as stopped:  # from argparse
        return int(stopped.code or 0)


def tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


GOOD = ("explain", "good.onnx", "a.png")

# arguments, exit code, what the message says
MISTAKES = [
    (("explain", "none.onnx", "a.png"), 2, ["none.onnx", "no such file"]),
    (("explain", "truncated.onnx", "a.png"), 3, ["truncated.onnx", "cut short"]),
    (("explain", "text.onnx", "a.png"), 2, ["text.onnx is a text file, not an ONNX model"]),
    (("explain", "empty.onnx", "a.png"), 2, ["empty.onnx is empty"]),
    (("explain", "one", "a.png"), 2, ["one is a directory"]),
    (("explain", "flat.onnx", "a.png"), 2, ["has 2 dimensions; an image needs 4", "--input FILE.npy"]),
    (("explain", "four-channels.onnx", "a.png"), 2, ["4 channels", "a picture has 1 or 3"]),
    (
        ("explain", "two-inputs.onnx", "a.png"),
        2,
        ["has 2 inputs, a (N, 3, 9, 9), b (N, 3, 9, 9): input 'b' (N, 3, 9, 9) is missing", "--input b=FILE.npy"],
    ),
    (
        ("explain", "det.onnx", "a.png"),
        3,
        ["node 'Det_0'", "for Det at opset 17", "docs/add-an-operator.md"],
    ),
    (("explain", "places.onnx", "a.png"), 3, ["the logits ('y') are int64"]),
    (("explain", "maps.onnx", "a.png"), 3, ["(N, 4, 14, 14)", "onnxcam explains classifiers"]),
    ((*GOOD, "--layer", "R5"), 2, ["no layer is called 'R5'", "the nearest names are r"]),
    ((*GOOD, "--layer", "-9"), 2, ["-1 to -2"]),
    ((*GOOD, "--layer", "99"), 2, ["0 to 7"]),
    ((*GOOD, "--layer", "z*"), 2, ["no layer matches 'z*'"]),
    ((*GOOD, "--target", "5"), 2, ["there is no class 5: classes run from 0 to 4"]),
    ((*GOOD, "--target", "cat"), 2, ["give a number, or a file with --labels"]),
    ((*GOOD, "--target", "cow", "--labels", "labels.txt"), 2, ["no class is called 'cow'"]),
    ((*GOOD, "--target", "top9"), 2, ["the model has 5 classes"]),
    ((*GOOD, "--labels", "none.txt"), 2, ["no such labels file: none.txt"]),
    ((*GOOD, "--labels", "a.png"), 2, ["not UTF-8 text"]),
    ((*GOOD, "--preprocess", "imagnet"), 2, ["there is no preprocessing 'imagnet'; there is imagenet"]),
    ((*GOOD, "--method", "gradcam"), 2, ["no method named 'gradcam'"]),
    ((*GOOD, "--composite", "epsilon"), 2, ["no composite named 'epsilon'"]),
    ((*GOOD, "--start", "logits"), 2, ["did you mean logit?"]),
    ((*GOOD, "--output", "z"), 2, ["no output is called 'z': there are y"]),
    ((*GOOD, "--provider", "abacus"), 2, ["execution provider abacus is not available", "CPUExecutionProvider"]),
    ((*GOOD, "--size", "0"), 2, ["'0' is no size such as 224"]),
    ((*GOOD, "--size", "2x3x4"), 2, ["no size"]),
    ((*GOOD, "--size", "32"), 2, ["fixed to 16x16"]),
    ((*GOOD, "--mean", "a,b,c"), 2, ["'a,b,c' is not one number or a list"]),
    ((*GOOD, "--mean", "1,2"), 2, ["one finite number or three"]),
    ((*GOOD, "--std", "0"), 2, ["other than 0"]),
    ((*GOOD, "--scale", "1/0"), 2, ["'1/0' is no number"]),
    ((*GOOD, "--scale", "nan"), 2, ["scale must be"]),
    ((*GOOD, "--resize", "squeeze"), 2, ["there is no resize 'squeeze'; there is warp, crop, pad, exact"]),
    ((*GOOD, "--channel-order", "gbr"), 2, ["there is no channel order 'gbr'"]),
    ((*GOOD, "--batch-size", "0"), 2, ["'0' is no number of pictures"]),
    ((*GOOD, "--engine", "abacus"), 2, ["invalid choice: 'abacus'"]),
    ((*GOOD, "--colours", "red"), 2, ["invalid choice: 'red'"]),
    (("explain", "good.onnx"), 2, ["input 'x' (N, 3, 16, 16) is missing; give pictures, or an array by --input x="]),
    (("explain", "good.onnx", "none.png"), 2, ["no such picture: none.png"]),
    (("explain", "good.onnx", "broken.png"), 2, ["broken.png is damaged"]),
    (("explain", "good.onnx", "text.png"), 2, ["not a picture"]),
    (("explain", "good.onnx", "a.png", "text.png"), 2, ["text.png is not a picture"]),
    (("explain", "good.onnx", "no-pictures"), 2, ["folder no-pictures holds no picture"]),
    (("explain", "flat.onnx", "--input", "rows.npy"), 2, ["no layer of this model has a map", "--method lrp"]),
    (("explain", "flat.onnx", "--input", "none.npy"), 2, ["--input none.npy: no such file"]),
    (("explain", "flat.onnx", "--input", "text.onnx"), 2, ["text.onnx is not a picture"]),
    (("explain", "flat.onnx", "--input", "broken.png"), 2, ["broken.png is damaged"]),
    (("explain", "flat.onnx", "--input", "nothing"), 2, ["--input nothing: no such file, and no number"]),
    (("explain", "flat.onnx", "--input", "objects.npy"), 2, ["objects.npy cannot be read as an array"]),
    (("explain", "flat.onnx", "--input", "images.npy"), 2, ["shape (2, 3, 16, 16), but input 'x' wants (N, 4)"]),
    (("explain", "flat.onnx", "--input", "rows.npy", "--input", "x=rows.npy"), 2, ["input 'x' is given twice"]),
    (("explain", "flat.onnx", "--input", "q=rows.npy"), 2, ["no input 'q'; its inputs are x (N, 4)"]),
    (("explain", "flat.onnx", "--input", "x=both.npz"), 2, ["holds 2 arrays (x, m): one is wanted"]),
    ((*GOOD, "--input", "images.npy"), 2, ["'x' is given twice, by IMAGE and by --input"]),
    (("explain", "facts.onnx", "a.png"), 2, ["input 'm' (N, 4) is missing; give it by --input m=FILE.npy"]),
    (("explain", "facts.onnx", "--input", "m=row.npy"), 2, ["input 'x' (N, 3, 16, 16) is missing; give pictures"]),
    (("explain", "facts.onnx", "a.png", "--input", "m=rows.npy"), 2, ["'m' was given 3 rows for 1 images"]),
    (("compile", "facts.onnx", "-o", "none.onnx", "--input", "m=row.npy"), 2, ["'m' goes image by image"]),
    (("frobnicate",), 2, ["invalid choice: 'frobnicate'"]),
    ((), 2, ["required: COMMAND"]),
    (("layers", "none.onnx"), 2, ["no such file"]),
    (("check", "good.onnx", "--composite", "x"), 2, ["no composite named 'x'"]),
]


@pytest.mark.parametrize(("arguments", "code", "says"), MISTAKES, ids=[" ".join(m[0]) or "none" for m in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(place, tmp_path, capsys, arguments, code, says):
    out = tmp_path / "out"
    extra = ("--out", str(out)) if arguments[:1] == ("explain",) else ()
    before = tree(place)
    assert run(*arguments, *extra) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("onnxcam: error: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    for words in says:
        assert words in printed.err
    assert not out.exists()
    assert tree(place) == before


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_an_output_folder_that_cannot_be_is_found_before_the_work(place, capsys, out):
    assert run(*GOOD, "--out", out) == 2
    assert f"cannot write to folder {out}" in capsys.readouterr().err


def test_the_engine_cupy_needs_cupy(place, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    if "cupy" in sys.modules or _installed("cupy"):
        pytest.skip("CuPy is installed here")
    assert run(*GOOD, "--engine", "cupy", "--out", str(tmp_path / "out")) == 2
    assert "pip install 'onnxcam[gpu]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def test_what_nobody_foresaw_is_called_a_bug(place, capsys, monkeypatch):
    monkeypatch.setattr("onnxcam.cli.layers.load_model", lambda _: 1 / 0)
    monkeypatch.delenv("ONNXCAM_DEBUG", raising=False)
    assert run("layers", "good.onnx") == 1
    err = capsys.readouterr().err
    assert "this is a bug in onnxcam, please report it: ZeroDivisionError" in err
    assert err.count("\n") == 1


# -- explain ---------------------------------------------------------------------------------------------------------


def test_explain_writes_what_the_api_computes(place, tmp_path, capsys):
    assert (
        run(*GOOD, "-l", "A2", "-l", "auto", "-t", "1", "-t", "top2", "--preprocess", "unit", "-o", str(tmp_path)) == 0
    )
    e = onnxcam.load("good.onnx", preprocess="unit").explain("a.png", ["A2", "auto"], ["1", "top2"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    names = set()
    for t, c in enumerate(e.targets[0]):
        for name, node in (("A2", "A2"), ("auto", "A4")):
            stem = f"a/class-{c}-layer-{node}"
            np.testing.assert_array_equal(np.load(tmp_path / f"{stem}.npy"), e.maps[name][0, t])
            names |= {f"{stem}.npy", f"{stem}-overlay.png"}
    assert tree(tmp_path) == names | {"a", "manifest.json"}
    assert manifest["schema_version"] == 1
    assert manifest["model"]["sha256"] == hashlib.sha256(Path("good.onnx").read_bytes()).hexdigest()
    printed = capsys.readouterr()
    assert printed.err == ""
    for words in (
        "class 1",
        "A2 (16x16), auto = A4 (8x8)",
        "relevance-cam",
        "preprocessing unit (asked for)",
        "conservation",
    ):
        assert words in printed.out
    assert f"{len(names) + 1} files in {tmp_path}" in printed.out


def test_json_is_the_manifest_and_nothing_else(place, tmp_path, capsys):
    assert run(*GOOD, "--json", "--no-overlay", "--out", str(tmp_path)) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "manifest.json").read_text())
    assert "warning: guessed imagenet" in printed.err
    assert not [name for name in tree(tmp_path) if name.endswith(".png")]


def test_folders_and_pictures_of_the_same_name(place, tmp_path, capsys):
    assert run("explain", "good.onnx", "one", "two/a.png", "b.png", "--out", str(tmp_path), "--no-overlay") == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [(i["name"], i["folder"]) for i in manifest["images"]] == [
        (str(Path("one/a.png")), "a"),
        ("two/a.png", "a-2"),
        ("b.png", "b"),
    ]
    assert {"a", "a-2", "b"} <= tree(tmp_path)


@pytest.mark.parametrize(
    ("layer", "node"),
    [("C1", "C1"), ("c1", "C1"), ("Conv_1", "C1"), ("-1", "A4"), ("0", "C0"), ("auto", "A4"), ("A[2]", "A2")],
)
def test_a_layer_is_named_in_any_way(place, tmp_path, layer, node):
    assert run(*GOOD, "-l", layer, "-t", "0", "-o", str(tmp_path), "--no-overlay") == 0
    assert f"a/class-0-layer-{node}.npy" in tree(tmp_path)


@pytest.mark.parametrize(("layer", "count"), [("suggested", 2), ("all", 8), ("C*", 5)])
def test_one_name_may_mean_many_layers(place, tmp_path, layer, count):
    assert run(*GOOD, "-l", layer, "-o", str(tmp_path), "--no-overlay") == 0
    assert len([name for name in tree(tmp_path) if name.endswith(".npy")]) == count


def test_labels_are_shown_and_understood(place, tmp_path, capsys):
    assert run(*GOOD, "--labels", "labels.txt", "-t", "bee", "-o", str(tmp_path)) == 0
    assert "1 bee" in capsys.readouterr().out


def test_a_layer_that_can_be_negative_is_warned_about(place, tmp_path, capsys):
    assert run(*GOOD, "-l", "C4", "--preprocess", "unit", "-o", str(tmp_path)) == 0
    err = capsys.readouterr().err
    assert err == (
        "onnxcam: warning: layer C4 can be negative, where channel-weighted maps mean little; "
        "--layer C3 at the same resolution cannot be\n"
    )


def test_flags_refine_a_preset(place, tmp_path, capsys):
    options = ("--preprocess", "unit", "--mean", "0.5", "--std", "0.5,0.4,0.3", "--scale", "1/255", "--resize", "pad")
    assert run(*GOOD, *options, "-o", str(tmp_path), "--json") == 0
    how = json.loads(capsys.readouterr().out)["preprocess"]
    assert (how["mean"], how["std"], how["scale"], how["resize"]) == ([0.5], [0.5, 0.4, 0.3], 1 / 255, "pad")


def test_methods_composites_starts_and_precision_can_be_chosen(place, tmp_path, capsys):
    options = (
        "--method",
        "lrp",
        "--composite",
        "epsilon_plus",
        "--start",
        "logit",
        "--engine",
        "numpy",
        "--dtype",
        "float64",
        "--json",
    )
    assert run(*GOOD, *options, "-o", str(tmp_path)) == 0
    chosen = json.loads(capsys.readouterr().out)["options"]
    assert (chosen["method"], chosen["composite"], chosen["start"], chosen["dtype"]) == (
        "lrp",
        "epsilon_plus",
        "logit",
        "float64",
    )


def test_colours_change_the_picture_and_not_the_map(place, tmp_path):
    for colours in ("positive", "minmax"):
        assert run(*GOOD, "--colours", colours, "-t", "0", "-o", str(tmp_path / colours)) == 0
    one, other = (next((tmp_path / c / "a").glob("*.png")).read_bytes() for c in ("positive", "minmax"))
    assert one != other
    one, other = (next((tmp_path / c / "a").glob("*.npy")).read_bytes() for c in ("positive", "minmax"))
    assert one == other


# -- arrays and several inputs ---------------------------------------------------------------------------------------


def test_features_are_written_and_the_first_of_them_listed(place, tmp_path, capsys):
    assert run("explain", "flat.onnx", "--input", "rows.npy", "-m", "lrp", "-t", "2", "-o", str(tmp_path)) == 0
    printed = capsys.readouterr()
    e = onnxcam.load("flat.onnx").explain(np.load("rows.npy"), targets=2, method="lrp")
    for i in range(3):
        np.testing.assert_array_equal(np.load(tmp_path / f"array-{i}/class-2-layer-x.npy"), e.maps["auto"][i, 0])
    assert printed.err == ""
    assert "features of auto = x (4), by relevance:" in printed.out
    feature, relevance = e.top_features(image=1)[0]
    rows = [line.split() for line in printed.out.splitlines()]
    assert ["array-1", "class", "2", str(feature), f"{relevance:+.4g}"] in rows
    assert "not drawn" not in printed.out  # there is no map that could be
    assert run("explain", "flat.onnx", "--input", "one.npz", "-m", "lrp", "-t", "2", "-o", str(tmp_path / "z")) == 0


def test_arrays_of_pictures_have_maps_and_no_overlays(place, tmp_path, capsys):
    assert run("explain", "good.onnx", "--input", "x=images.npy", "-o", str(tmp_path)) == 0
    assert capsys.readouterr().out.count("maps are written as .npy and not drawn: the input is an array") == 1
    assert {p.suffix for p in tmp_path.rglob("*.*")} == {".npy", ".json"}


@pytest.mark.parametrize("inputs", [("a.png", "--input", "m=row.npy"), ("--input", "both.npz")])
def test_a_picture_and_an_array_are_explained_together(place, tmp_path, capsys, inputs):
    options = ("-l", "r", "-l", "m", "-m", "lrp", "-t", "1", "--preprocess", "unit", "-o", str(tmp_path))
    assert run("explain", "facts.onnx", *inputs, *options) == 0
    printed = capsys.readouterr()
    assert "onnxcam: warning: input 'is_training' was set to False" in printed.err
    names = {p.name for p in tmp_path.rglob("*.npy")}
    assert names == {"class-1-layer-Conv_0.npy", "class-1-layer-m.npy"}
    assert "features of m (4), by relevance:" in printed.out
    assert bool(list(tmp_path.rglob("*.png"))) == (inputs[0] == "a.png")


def test_a_switch_is_set_by_its_value(place, tmp_path, capsys):
    options = ("a.png", "--input", "m=row.npy", "--preprocess", "unit", "--no-overlay")
    for i, value in enumerate(("true", "false", "1")):
        out = str(tmp_path / str(i))
        assert run("explain", "facts.onnx", *options, "--input", f"is_training={value}", "-o", out) == 0
    assert "is_training" not in capsys.readouterr().err
    on, off, one = (next((tmp_path / str(i)).rglob("*.npy")).read_bytes() for i in range(3))
    assert on == one != off


def test_what_else_a_model_has_is_listed(place, capsys):
    for command in ("layers", "check"):
        assert run(command, "facts.onnx") == 0
        out = capsys.readouterr().out
        assert "input x (N, 3, 16, 16); to be given by --input NAME=FILE.npy: m (N, 4), is_training (1) = False" in out
        assert "output y; others, by --output NAME: z" in out


# -- layers and check ------------------------------------------------------------------------------------------------


def test_layers_lists_names_that_can_be_copied(place, capsys):
    assert run("layers", "good.onnx") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = onnxcam.load("good.onnx").layers()
    assert len(lines) == len(rows) + 4  # a header, three lines of legend
    for line, row in zip(lines[1:], rows, strict=False):
        assert line.startswith("*") == row.suggested
        assert {str(row.index), row.node, row.op, row.tensor, row.sign} <= set(line.split())


def test_long_names_are_not_broken_where_they_are_piped(tmp_path, capsys):
    proto = resnet()
    long = "/".join(["module"] * 40)
    proto.graph.node[0].name = long
    onnx.save(proto, tmp_path / "long.onnx")
    assert run("layers", str(tmp_path / "long.onnx")) == 0
    assert long in capsys.readouterr().out.split()


def test_layers_as_json_are_the_apis(place, capsys):
    assert run("layers", "good.onnx", "--suggested", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["node"], row["suggested"]) for row in rows] == [("A2", True), ("A4", True)]
    assert rows[0]["shape"] == ["N", 8, 16, 16]


def test_a_model_without_maps_has_no_layers_and_says_so(place, capsys):
    assert run("layers", "flat.onnx") == 0
    assert "no layer has a map" in capsys.readouterr().out
    assert run("layers", "flat.onnx", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_check_says_that_a_model_can_be_explained(place, capsys):
    assert run("check", "good.onnx") == 0
    out = capsys.readouterr().out
    assert "every node on the way can be explained" in out
    assert "MMAC" in out


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("det.onnx", "no operator for Det at opset 17"),
        ("places.onnx", "are int64"),
        ("maps.onnx", "explains classifiers"),
    ],
)
def test_check_says_why_a_model_cannot(place, capsys, model, says):
    assert run("check", model) == 3
    assert says in capsys.readouterr().out
    assert run("check", model, "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["explainable"] is False
    assert any(node["reason"] and says in node["reason"] for node in found["nodes"])


@pytest.mark.parametrize("arguments", [("--help",), ("explain", "--help"), ("layers", "--help"), ("check", "--help")])
def test_help_is_there(capsys, arguments):
    assert run(*arguments) == 0
    assert "usage: onnxcam" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"onnxcam {onnxcam.__version__}\n"


# -- as a process ----------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "onnxcam"]


def process(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ONNXCAM_DEBUG": ""} | options.pop("env", {})
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, env=environment, **options
    )


def test_a_process_explains(place, tmp_path):
    done = process(*GOOD, "--out", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)  # the guess is said aloud
    assert (tmp_path / "manifest.json").is_file()


def test_a_process_fails_with_the_code_of_the_error(place):
    assert process("layers", "none.onnx").returncode == 2
    assert process("check", "det.onnx").returncode == 3


def test_names_that_the_terminal_cannot_show_are_no_obstacle(place, tmp_path):
    (tmp_path / "labels.txt").write_text("Größe\nネコ\nc\nd\ne\n", encoding="utf-8")
    options = ("--labels", str(tmp_path / "labels.txt"), "-t", "0", "-t", "1", "-o", str(tmp_path / "out"))
    done = process(*GOOD, *options, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0
    assert "Gr\\xf6\\xdfe" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE and no /dev/full")
def test_a_reader_that_leaves_is_no_error(place):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody:
        for arguments in (("layers", "good.onnx"), ("layers", "good.onnx", "--json"), ("check", "good.onnx")):
            done = subprocess.run([*COMMAND, *arguments], stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=120)
            assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_behind_standard_output_is_no_bug(place):
    with open("/dev/full", "w") as full:
        command = [*COMMAND, "layers", "good.onnx"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "onnxcam: error: standard output: No space left on device\n")


# The command line with a rest after each file, so that a signal arrives between two of them on any machine.
SLOWLY = """
import sys, time
from onnxcam import cli, explanation
write = explanation.write_atomically
explanation.write_atomically = lambda *a: (write(*a), time.sleep(30 if a[0].suffix == '.png' else 0))[0]
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals work otherwise on Windows")
def test_control_c_stops_with_whole_files_only(place, tmp_path):
    """What is there is whole, nothing temporary stays, no manifest speaks of the rest."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOWLY, *GOOD, "-l", "all", "-t", "top5", "--out", str(out)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(out.rglob("*.png")) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, "onnxcam: error: interrupted\n")
    files = [p for p in out.rglob("*") if p.is_file()]
    assert all(p.name.startswith("class-") for p in files)
    for path in files:
        if path.suffix == ".npy":
            assert np.load(path).dtype == np.float32
        else:
            Image.open(path).load()


# -- methods, compare, segments --------------------------------------------------------------------------------------


def test_methods_are_listed_with_what_they_need(capsys):
    assert run("methods") == 0
    printed = capsys.readouterr().out
    for name in onnxcam.METHODS:
        assert f"\n{name} " in printed
    assert run("methods", "rise", "grad-cam", "--json") == 0
    rise, grad_cam = json.loads(capsys.readouterr().out)
    assert (rise["needs"], rise["cost"], rise["options"]["samples"]) == ("nothing", "1000 forwards", 1000)
    assert (grad_cam["needs"], grad_cam["compiles"], grad_cam["options"]) == ("operators", True, {})
    assert run("methods", "--black-box", "--json") == 0
    assert {"rise", "occlusion"} <= {m["name"] for m in json.loads(capsys.readouterr().out)}
    assert run("methods", "gradcam") == 2
    assert "did you mean grad-cam" in capsys.readouterr().err


def test_a_model_with_an_op_that_nobody_knows_is_explained_as_a_black_box(place, tmp_path, capsys):
    assert run("explain", "det.onnx", "a.png", "-o", str(tmp_path)) == 3
    assert "--black-box" in capsys.readouterr().err
    asked = ("explain", "det.onnx", "a.png", "--black-box", "-o", str(tmp_path), "--preprocess", "unit", "--json")
    assert run(*asked, "--set", "samples=6") == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert (options["method"], options["composite"], options["start"]) == ("rise", None, None)
    assert options["method_options"]["samples"] == 6
    assert run(*asked, "-m", "occlusion", "--set", "stride=0.5") == 0
    capsys.readouterr()
    assert run(*asked, "-m", "grad-cam") == 2
    assert "method grad-cam looks into the model: with --black-box there are occlusion, rise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "samples"), "write NAME=VALUE"),
        (("--set", "samples=3"), "method relevance-cam has no option 'samples'"),
        (("--concept", "A2"), "write LAYER=CHANNEL"),
        (("--concept", "A2=x"), "write LAYER=CHANNEL"),
        (("--concept", "A2=99"), "layer 'A2' has channels 0 to"),
        (("--segment", "half"), "mean-std or a quantile"),
        (("--segment", "-m", "channel-relevance"), "there is no map to segment at layer 'auto'"),
    ],
)
def test_options_of_methods_that_mean_nothing_are_refused(place, tmp_path, capsys, arguments, message):
    assert run(*GOOD, *arguments, "-o", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err


def test_relevance_through_some_channels_is_said_and_written(place, tmp_path, capsys):
    options = ("-l", "A2", "--concept", "A2=0,2", "--preprocess", "unit", "--json", "-o", str(tmp_path))
    assert run(*GOOD, "-m", "lrp", *options) == 0
    assert json.loads(capsys.readouterr().out)["options"]["concepts"] == {"A2": [0, 2]}
    assert run(*GOOD, "-m", "channel-relevance", "-l", "A2", "--preprocess", "unit", "-o", str(tmp_path)) == 0
    assert "features of A2" in capsys.readouterr().out


def test_segments_are_written_beside_the_maps(place, tmp_path, capsys):
    pytest.importorskip("contourpy")
    assert run(*GOOD, "-t", "1", "--segment", "q0.7", "--no-overlay", "--json", "-o", str(tmp_path)) == 0
    files = json.loads(capsys.readouterr().out)["images"][0]["targets"][0]["maps"]["auto"]
    found = json.loads((tmp_path / files["segment"]).read_text())
    mask = np.asarray(Image.open(tmp_path / files["mask"])) > 0
    assert found["class"] == 1 and found["area"] == mask.sum() and found["size"] == list(mask.shape)
    assert 0.2 < mask.mean() < 0.35


def test_an_array_is_not_segmented(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("explain", "good.onnx", "--input", "images.npy", "--segment", "-o", str(out)) == 2
    assert "there is no picture to segment: the input was an array" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_comparison_is_drawn(place, tmp_path, capsys, suffix):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"figure.{suffix}"
    asked = ("compare", "good.onnx", "a.png", "-m", "grad-cam,relevance-cam", "-m", "saliency", "--preprocess", "unit")
    assert run(*asked, "-o", str(out)) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "5 maps of 3 rows and 3 layers" in printed.out
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert out.read_bytes().startswith(begins)
    if suffix == "svg":
        assert "relevance-cam" in out.read_text()  # text stays text


def test_classes_are_compared_by_one_method(place, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    asked = ("compare", "good.onnx", "a.png", "-m", "lrp", "-l", "A2", "-t", "0", "-t", "3", "--preprocess", "unit")
    assert run(*asked, "-o", str(tmp_path / "classes.png"), "--dpi", "60") == 0
    assert "2 maps of 2 rows and 1 layers" in capsys.readouterr().out


def test_layers_that_no_method_has_a_map_of_are_left_out_of_a_comparison(place, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    asked = ("compare", "good.onnx", "a.png", "-m", "saliency", "--preprocess", "unit", "-o", str(tmp_path / "f.png"))
    assert run(*asked) == 0
    assert "1 maps of 1 rows and 1 layers" in capsys.readouterr().out


def test_what_means_nothing_at_a_layer_is_left_out_of_a_comparison_and_said(place, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    asked = ("compare", "good.onnx", "a.png", "-m", "cam,grad-cam", "--preprocess", "unit")
    assert run(*asked, "-o", str(tmp_path / "figure.png")) == 0
    printed = capsys.readouterr()
    assert "warning: cam at A2" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "figure.jpg"), "figures are written as .png, .pdf, .svg"),
        (("--dpi", "0"), "--dpi is a number from 30"),
        (("-m", "nothing"), "no method named 'nothing'"),
        (("--set", "samples=3"), "say of which method"),
    ],
)
def test_a_comparison_that_cannot_be_drawn_is_refused_before_the_work(place, tmp_path, capsys, arguments, message):
    before = tree(place)
    assert run("compare", "good.onnx", "a.png", *arguments) == 2
    assert message in capsys.readouterr().err
    assert tree(place) == before
