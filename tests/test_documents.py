"""The links of the documents lead somewhere, and the site shows every page."""

import json
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image, ImageChops, ImageStat

from benchmarks import cpu
from docs import figures, one_image

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def prose(path: Path) -> str:
    """The text without code, in which brackets are not links."""
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The names that a page's headings have as targets of links."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def links(path: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)) if not link.startswith("https://")]


@pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), link
        assert not anchor or anchor in anchors(file), link


def test_links_are_found_and_wrong_ones_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# What `adopt` does, now\n\n[a](no.md) `[b](x)` [c](#what-adopt-does-now) [d](https://x.org)\n")
    assert links(page) == ["no.md", "#what-adopt-does-now"] and anchors(page) == {"what-adopt-does-now"}


UNRESOLVED = """
import eridiff, importlib, sys
for name in sys.stdin.read().split():
    thing = eridiff
    try:
        for part in name.split(".")[1:]:
            thing = getattr(thing, part)
    except AttributeError:
        try:
            importlib.import_module(name)
        except ImportError:
            print(name)
"""


def test_every_name_of_eridiff_in_the_documents_is_there_after_importing_it() -> None:
    """`eridiff.a.b` as it is written, or the module of that name; without what another test has imported."""
    pages = [page for page in PAGES if page.name != "CHANGELOG.md" and page.parent.name != "adr"]
    names = {name for page in pages for name in re.findall(r"`(eridiff(?:\.[A-Za-z_]\w*)+)", page.read_text(), re.M)}
    assert len(names) > 20
    ran = subprocess.run([sys.executable, "-c", UNRESOLVED], input="\n".join(names), capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.split() == [], ran.stderr


def entries(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in entries(part)]  # type: ignore[attr-defined]


def test_the_site_shows_every_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = {str(path.relative_to(ROOT / "docs")) for path in PAGES if path.is_relative_to(ROOT / "docs")}
    assert set(entries(site["nav"])) == {page for page in pages if not page.startswith("adr/")}


def test_the_figures_are_those_that_the_script_writes() -> None:
    for figure in figures.FIGURES:
        assert (figures.FOLDER / f"{figure.name}.svg").read_text() == figure.svg(), "run python docs/figures.py"
    rows = json.loads(cpu.RESULTS.read_text())["rows"]
    assert cpu.FIGURE.read_text() == cpu.figure(rows), "run python -m benchmarks.cpu"
    names = {f"{figure.name}.svg" for figure in figures.FIGURES} | {cpu.FIGURE.name}
    assert names == {path.name for path in figures.FOLDER.glob("*.svg")}


@pytest.mark.parametrize("figure", figures.FIGURES, ids=lambda figure: figure.name)
def test_a_figure_is_well_formed_and_its_words_are_inside(figure: figures.Figure) -> None:
    root = ElementTree.fromstring(figure.svg())
    places = [
        (float(text.attrib["x"]), float(text.attrib["y"])) for text in root.iter("{http://www.w3.org/2000/svg}text")
    ]
    assert places and all(0 < x < figures.WIDTH and 0 < y < figure.height for x, y in places)


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/api/*.md")), ids=lambda page: page.stem)
def test_every_name_of_the_reference_exists_and_is_documented(page: Path) -> None:
    names = re.findall(r"^::: (\S+)$(?:\n    options:\n      members: \[(.*)\])?", page.read_text(), re.MULTILINE)
    assert names
    for name, members in names:
        found = pkgutil.resolve_name(name)
        assert found.__doc__ or isinstance(found, types.UnionType), name
        for member in filter(None, members.split(", ")):
            assert getattr(found, member).__doc__, f"{name}.{member}"


@pytest.fixture(scope="module")
def numbers() -> one_image.Numbers:
    return one_image.Numbers()


def values(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<=\| )-?\d+\.\d+(?= \|)", text)]


def test_the_numbers_of_the_page_are_those_of_a_new_run(numbers: one_image.Numbers) -> None:
    """Within the last printed place or a hundredth of the value: other processors round otherwise."""
    page = one_image.DOCUMENT.read_text()
    found, printed = values(one_image.written(page, numbers)), values(page)
    assert len(found) == len(printed) > 80, "run python docs/one_image.py"
    assert found == pytest.approx(printed, abs=0.011, rel=0.01), "run python docs/one_image.py"


def test_the_images_of_the_page_are_those_of_a_new_run(numbers: one_image.Numbers) -> None:
    for name, image in one_image.made(numbers).items():
        with Image.open(one_image.FOLDER / name) as shown:
            assert shown.size == image.size
            difference = ImageStat.Stat(ImageChops.difference(shown.convert("RGB"), image))
        assert max(difference.mean) < 1.0, f"{name}: run python docs/one_image.py"
