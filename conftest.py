"""The environment of every test; and every block of Python in README.md and docs/ is a test.

Blocks run in an empty folder, each document from top to bottom.
"""

import locale
import os
import tempfile
from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

# What the caller's environment says must change no result. It is set here, because huggingface_hub reads it on import;
# processes that tests start inherit it.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_CACHE": os.path.join(tempfile.gettempdir(), "eridiff-tests-know-no-model"),
    "TORCHINDUCTOR_CACHE_DIR": os.path.join(tempfile.gettempdir(), "eridiff-tests-compiled"),
    "COLUMNS": "80",
    "PYTHONUTF8": "1",
}
for name in (
    "FORCE_COLOR", "NO_COLOR", "PYTHON_COLORS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
):  # fmt: skip
    os.environ.pop(name, None)
locale.setlocale(locale.LC_CTYPE, "C.UTF-8")  # in which this process reads files, which PYTHONUTF8 comes too late for


def enter_empty_folder(namespace: dict[str, Any]) -> None:
    import tempfile

    namespace["_home"] = os.getcwd()
    namespace["_folder"] = tempfile.TemporaryDirectory()
    os.chdir(namespace["_folder"].name)


def leave(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_home"])
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    setup=enter_empty_folder,
    teardown=leave,
).pytest()
