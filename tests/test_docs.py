"""The documentation tells the truth: its Python runs, its links lead somewhere, the messages it explains exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def python_in(page: Path) -> str:
    """The blocks of a page, each at the line where it stands, so that a failure names the page's own line."""
    text = page.read_text(encoding="utf-8")
    code, at = "", 0
    for block in BLOCK.finditer(text):
        code += "\n" * text.count("\n", at, block.start(1)) + block[1]
        at = block.end(1)
    return code


@pytest.mark.parametrize("page", [p for p in PAGES if python_in(p)], ids=lambda p: p.stem)
def test_the_python_of_a_page_runs_as_it_stands(page, tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(ROOT / "models", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    from onnxcam.operators import registry

    monkeypatch.setattr(registry, "_ENTRIES", {key: list(entries) for key, entries in registry._ENTRIES.items()})
    exec(compile(python_in(page), str(page), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.stem)
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, link


def test_messages_that_are_explained_exist():
    """Each quoted message, piece by piece between its gaps, stands somewhere in the source."""
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "onnxcam").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings over several lines
    source = re.sub(r"\{[^{}]*\}", "...", source)
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:warning: )?(`.+?) \| ", text, re.MULTILINE)
    assert len(rows) > 20
    for message in re.findall(r"`([^`]+)`", " ".join(rows)):
        for piece in re.split(r"\.\.\.|[()'\"]", message):
            assert piece.strip(" :;,%").removeprefix("is ") in source, message


def test_the_page_that_an_error_points_to_exists():
    for page in re.findall(r"docs/add-[\w-]+\.md", "".join(p.read_text() for p in (ROOT / "onnxcam").rglob("*.py"))):
        assert (ROOT / page).is_file()
