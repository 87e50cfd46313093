"""What a reader crosses from a prompt to an image: `python benchmarks/reading.py`.

Traced is one `generate` with loaded modules: the files of the package that it enters, their lines with docstrings, the
lines that ran; and for the denoiser's hot path, the functions that one `step` enters, their lines and branches (if,
conditional expression, while, try, assert).
"""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import eridiff
from eridiff.request import Request

PACKAGE = str(Path(eridiff.__file__).parent)
BRANCHES = (ast.If, ast.IfExp, ast.While, ast.Try, ast.Assert)


def traced(work: Callable[[], object]) -> tuple[set[tuple[str, int]], set[tuple[str, int, str]]]:
    """Executed (file, line) and entered (file, first line, name) of the package."""
    lines: set[tuple[str, int]] = set()
    functions: set[tuple[str, int, str]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        if event == "call":
            functions.add((code.co_filename, code.co_firstlineno, code.co_name))
        lines.add((code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return lines, functions


def size(file: str, first: int, name: str) -> tuple[int, int]:
    """Lines (without the docstring) and branches of a function."""
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if (
            isinstance(node, ast.FunctionDef)
            and node.name == name
            and first in (node.lineno, *(d.lineno for d in node.decorator_list))
        ):
            docstring = node.body[0] if ast.get_docstring(node) else None
            spent = docstring.end_lineno - docstring.lineno + 1 if docstring else 0  # type: ignore[operator]
            return node.end_lineno - node.lineno + 1 - spent, sum(isinstance(n, BRANCHES) for n in ast.walk(node))  # type: ignore[operator]
    return 0, 0  # a generator expression inside a function that is counted


def main() -> None:
    model = eridiff.load(device="cpu", progress=False)
    lines, _ = traced(lambda: model.generate("a swan on mars", seed=0))
    files = sorted({file for file, _ in lines})
    total = 0
    for file in files:
        length = len(Path(file).read_text().splitlines())
        total += length
        print(f"{Path(file).relative_to(PACKAGE)!s:28} {length:5} lines, {sum(f == file for f, _ in lines):4} ran")
    print(f"{len(files)} files, {total} lines, {len(lines)} ran")

    prompt = model.encode_prompt("a swan on mars")
    noise = model.noise([0], 64, 64)
    schedule = model.schedule(8, 64, 64)
    predict = model.predictor(prompt, schedule, Request(seed=0).checked(model))
    _, functions = traced(lambda: predict(noise, 0))
    counted = [size(*function) for function in sorted(functions)]
    counted = [c for c in counted if c[0]]
    print(
        f"hot path of one step: {len(counted)} functions, {sum(c[0] for c in counted)} lines, {sum(c[1] for c in counted)} branches"
    )


if __name__ == "__main__":
    main()
