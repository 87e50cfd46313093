"""YAML with YAML 1.2's scalars, and every mistake in one sentence with its line.

PyYAML reads YAML 1.1, where a prompt `no` is False, `16:9` is 969 and `1e-4` is text; duplicate keys pass silently.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from eridiff.errors import ConfigError


class Reader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema, without aliases, with text keys that stand once."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # its own, not the process's

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(
                f"{_place(self.peek_event())}: '*' begins an alias, which is not supported; quote the text"
            )
        event = self.peek_event()
        if getattr(event, "anchor", None):
            raise ConfigError(f"{_place(event)}: '&' begins an anchor, which is not supported; quote the text")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        result: dict[Hashable, Any] = {}
        lines: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{_place(key_node)}: a key must be a word")
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in result:
                raise ConfigError(f"{_place(key_node)}: the key '{key}' is repeated, first in line {lines[key]}")
            result[key], lines[key] = self.construct_object(value_node, deep=True), line
        return result


for _tag, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
]:
    Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _number(loader: Reader, node: Any) -> int | float:
    try:
        return (int if node.tag.endswith("int") else float)(loader.construct_scalar(node))
    except ValueError:  # Python's limit
        raise yaml.constructor.ConstructorError(None, None, "a number with too many digits", node.start_mark) from None


Reader.add_constructor("tag:yaml.org,2002:int", _number)
Reader.add_constructor("tag:yaml.org,2002:float", _number)
Reader.add_constructor("tag:yaml.org,2002:map", Reader.construct_mapping)


def read_yaml(text: str) -> Any:
    """What a YAML document says; raises ConfigError with the line of a mistake and what may be meant."""
    try:
        return yaml.load(text, Reader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_explained(error, text)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"a character that YAML does not allow: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError("lists or mappings are nested too deep") from None


def _place(thing: Any) -> str:
    return f"line {thing.start_mark.line + 1}"


def _explained(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark or error.context_mark
    number = mark.line if mark else 0
    lines = text.splitlines()
    line = lines[number].strip() if number < len(lines) else ""
    problem = str(error.problem or error.context)
    if "\t" in problem or "\\t" in problem:
        return f"line {number + 1}: a tab where spaces are needed"
    if "unknown escape" in problem:
        return f"line {number + 1}: a backslash in double quotes begins an escape; use single quotes or '/': {line}"
    if "but found another document" in problem:
        return f"line {number + 1}: a second document begins; one is expected"
    body = re.sub(r"^(- |\w+:\s+)+", "", line)
    found = f"line {min(number, len(lines) - 1) + 1}: {problem}".replace("'<stream end>'", "the end of the file")
    if not body:  # an open bracket or quote before it
        return found
    quoted = f"'{body.replace(chr(39), chr(39) * 2)}'"
    return f"{found}; text with : # [ ] {{ }} & * ! or quotes in it must be quoted, here perhaps {quoted}"
