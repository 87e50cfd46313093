"""Documents, help, comments and messages are in the field's plain English: none of the patterns that CONTRIBUTING.md rules out."""

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from eridiff.cli import _parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
SOURCES = sorted(
    path
    for folder in ("eridiff", "tests", "examples", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*.py")
    if path != Path(__file__)  # which lists the patterns
)
PATTERNS = {  # what is not written -> what is
    r"draws?(?! (?:noise|random))|drew|drawing": "generate, sample",
    r"(?<!noise is )(?<!noise itself is )drawn(?! in float32| on the CPU| in training)": "generated, sampled",
    r"pictures?": "image",
    r"(?<!there )(?:is|are) no (?!longer)\w+": "is not a",
    r"averages(?! (?:them|what|weights in place))": "EMA weights",
    r"(?:is|are|was|be|been) told(?! apart by)|told of|tells of": "is given, is reported, is detected",
    r"nothing said|when nothing is said|when not said|not said|is said|says nothing|says otherwise": "by default, is given",
    r"stands? (?:in(?! for)|at|beside|for itself|twice|behind|below)|stood": "is in, is at, is next to",
    r"(?:one|once|twice|each) (?!with|that|from|in |prompt)(?:\w+ )?an? (?:step|image|prompt|token|layer|row|network|stage|line|entry|component|command|file)": "per",
    r"bit by bit": "bit for bit",
    r"to the last (?:key|bit)": "every key, bit for bit",
    r"without a word": "silently",
    r"hands? over|handed in|hands? in|gives? back|given back|puts? back|put back": "pass, return, restore",
    r"ours|theirs": "eridiff's, the trainer's",
    r"steers?|steered": "guide, guided",
    r"could not be had|cannot be used|shall": "could not be downloaded, is invalid, must or can",
}  # fmt: skip


def prose(text: str) -> str:
    """The text without code, comments and the addresses of links."""
    return re.sub(r"^```.*?^```$|^    .*?$|`[^`\n]*`|<!--.*?-->|\]\([^)]*\)", "", text, flags=re.MULTILINE | re.DOTALL)


def found(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if "`" not in line or not line.startswith("| wrong")]
    return [
        f"'{match[0]}' in '{line.strip()[:100]}': write {better}"
        for line in lines
        for pattern, better in PATTERNS.items()
        for match in re.finditer(rf"\b(?:{pattern})\b", line, re.IGNORECASE)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_none_of_the_patterns(page: Path) -> None:
    text = page.read_text()
    if page.name == "CONTRIBUTING.md":  # which lists them
        text = re.sub(r"^\| not \|.*?\n\n", "", text, flags=re.MULTILINE | re.DOTALL)
    assert found(prose(text)) == []


def sentences(source: str, messages: bool) -> Iterator[tuple[int, str]]:
    """Comments, docstrings and names of tests of a Python file, and with `messages` every string of several words, by line."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield getattr(node, "lineno", 1), ast.get_docstring(node) or ""
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")
        if messages and isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_has_none_of_the_patterns(path: Path) -> None:
    messages = not re.search(
        "benchmark|docs/tables", str(path.relative_to(ROOT))
    )  # its strings name the rows of results on the disk
    texts = {(line, re.sub("`[^`]*`", "", text)) for line, text in sentences(path.read_text(), messages)}
    assert [f"{line}: {found(text)}" for line, text in sorted(texts) if found(text)] == []


def helps(parser: argparse.ArgumentParser) -> list[str]:
    """Every sentence of the help of a command and of those below it."""
    texts = [parser.description or "", parser.epilog or ""]
    for action in parser._actions:
        texts.append(action.help if isinstance(action.help, str) else "")
        if isinstance(action, argparse._SubParsersAction):
            texts += [text for nested in action.choices.values() for text in helps(nested)]
    return texts


def test_the_help_has_none_of_the_patterns() -> None:
    assert found("\n".join(helps(_parser()))) == []


@pytest.mark.parametrize(
    "text",
    [
        "It draws a picture.",
        "'x' is no sampler",
        "one call a step",
        "The network is told the size.",
        "the averages",
        "is put back",
    ],
)
def test_the_patterns_are_seen(text: str) -> None:
    assert found(text)


@pytest.mark.parametrize(
    "text",
    ["The noise is drawn in float32.", "It is no longer needed.", "There is no other table.", "One call per step."],
)
def test_plain_sentences_pass(text: str) -> None:
    assert found(text) == []
