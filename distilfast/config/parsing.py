"""Read a `Config` from YAML files and the command line, which take the same keys, and format it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from distilfast.config.schema import Config, SourceSpec, TeacherSpec
from distilfast.errors import ConfigError, did_you_mean, expect

PACKAGE = Path(__file__).parent.parent
RECIPES = next(
    folder
    for folder in (PACKAGE / "recipes", PACKAGE.parent / "configs")
    if folder.name == "configs" or folder.is_dir()  # recipes: installed; configs: in a checkout
)


def parse(arguments: Sequence[str], prog: str = "distilfast train") -> Config:
    """Make a checked Config from the command line and its YAML files.

    ``--key.sub value`` overrides the file, before or after ``--config FILE``. ``--help`` and
    ``--print_config`` print and exit.

    Raises:
        ConfigError: any error, in one line.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
        description=f"Recipes: {RECIPES}",
    )
    parser.add_argument(
        "--config", action="config", help="a YAML file with these keys, or a recipe's name"
    )
    parser.add_argument("--print_config", action="store_true", help="print the result and exit")
    parser.add_argument("--local_rank", type=int, default=0, help=jsonargparse.SUPPRESS)
    parser.add_class_arguments(Config, None, fail_untyped=True, sub_configs=False)
    # The parser reads the defaults from a BatchConfig(), whose sequences is 4096. A run with
    # batch.tokens must not get that default.
    parser.set_defaults({"batch.sequences": None})
    files, others = _split(arguments)
    try:
        namespace = parser.parse_args([*(f"--config={file}" for file in files), *others])
        for key, value in namespace.as_flat().__dict__.items():
            kind = kinds().get(key, NoneType)
            expect(value is not None or _optional(kind), key, _described(kind), None)
        made = parser.instantiate(namespace)
        config = _at_home(Config(**{f.name: made[f.name] for f in fields(Config)}))
    except ConfigError:
        raise
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(_explain(str(error))) from error
    if namespace.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _at_home(config: Config) -> Config:
    """Put home folders for ~ and ~user in the paths of the folders that a run makes."""
    paths = {"output": config.output, "data.prepared": config.data.prepared or ""}
    output, prepared = (os.path.expanduser(path) for path in paths.values())
    for key, path in zip(paths, (output, prepared), strict=True):
        expect(not path.startswith("~"), key, "the home folder of a known user", path)
    return replace(config, output=output, data=replace(config.data, prepared=prepared or None))


@functools.cache
def kinds() -> dict[str, Any]:
    """The type of every key by its full name; a section's is its class."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(Config).items():
        found[name] = kind
        if is_dataclass(kind):
            found |= {f"{name}.{key}": inner for key, inner in get_type_hints(kind).items()}
    return found


# --- Checks before the parser's, whose own messages are obscure -----------------------------------


def _split(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files after --config, and every other option as --key=value, all of them checked."""
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in ("--help", "-h", "--print_config") or name.endswith(".help"):
            if equals:
                raise ConfigError(f"{name}: expected no value, got {value!r}")
            others.append(argument)
            continue
        if not name.startswith("--"):
            raise ConfigError(f"expected --key value, got {argument!r}{_meant(argument)}")
        key = name.removeprefix("--").removesuffix("+")
        if key not in (*kinds(), "config", "local_rank"):
            raise ConfigError(f"{name}: unknown key{_nearest(key)}")
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise ConfigError(f"{name}: expected a value, got {value if value[2:] else 'none'}")
        if key == "config":
            files.append(_check_file(value))
            continue
        if key in kinds():
            _check_value(key, value)
        others.append(f"{name}={value}")
    return files, others


def _meant(stray: str) -> str:
    """What was probably meant by a word that stands where an option should."""
    if stray.startswith("-"):
        return did_you_mean(f"-{stray}", (f"--{key}" for key in kinds()), 0.75)
    if Path(stray).suffix in (".yaml", ".yml") or (RECIPES / f"{stray}.yaml").is_file():
        return f"; did you mean --config {stray}?"
    return "; a list is one value, as in --student.layers '[0, 2]'"


def _check_file(given: str) -> Path:
    """The file that --config names, by its path or as a recipe, with known keys."""
    path, recipe = Path(given), RECIPES / f"{Path(given).name}.yaml"
    if not path.is_file() and recipe.name == f"{given}.yaml" and recipe.is_file():
        path = recipe
    if not path.is_file():
        recipes = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        near = [str(p) for p in path.parent.glob("*.y*ml")] if given else []
        hint = did_you_mean(given, [*recipes, *near], 0.75)
        if (path / "config.yaml").is_file():
            hint = f"; did you mean {path / 'config.yaml'}?"
        expected = f"a YAML file or one of the recipes {', '.join(recipes)}"
        got = repr(given) if given else "none"
        raise ConfigError(f"--config: expected {expected}, got {got}{hint}")
    content = _load(str(path), _text(path))
    _check_keys(str(path), "", content, Config)
    for key, kind in kinds().items():
        if is_dataclass(kind) and key in content:
            _check_keys(str(path), key, content[key], kind)
    _check_entries(str(path), "teacher", content.get("teacher"))
    _check_entries(str(path), "data.source", content.get("data", {}).get("source"))
    return path


def _check_value(key: str, value: str) -> None:
    """Check a value of the command line where the parser would take for text what does not fit."""
    kind = kinds()[key]
    expect(value != "null" or _optional(kind), key, _described(kind), None)
    if is_dataclass(kind):
        text = _text(Path(value)) if os.path.isfile(value) else value
        _check_keys(key, key, _load(key, text), kind)
    elif key in _ENTRIES and value.startswith(("[", "{")):
        _check_entries("the command line", key, _load(key, value))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else error.reason
        raise ConfigError(f"{path}: expected YAML in UTF-8, got {said}") from None


# By a part of what the reader of YAML says.
_HINTS = {
    r"'\t'": "; indent with spaces, not tabs",
    "mapping values are not allowed": "; write a space after a key's colon, quotes around a text's",
}


def _load(name: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark and "\n" in text else ""
        hint = next((x for part, x in _HINTS.items() if part in str(error.problem)), "")
        said = f"an error{line}: {error.problem}{hint}"
        raise ConfigError(f"{name}: expected YAML, got {said}") from None
    except yaml.reader.ReaderError as error:
        said = f"the character {chr(error.character)!a} at position {error.position}"
        raise ConfigError(f"{name}: expected YAML, got {said}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice; takes 5e-4 for a number, as the parser does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value} stands twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    [*"-+0123456789"],
)


_ENTRIES = {"teacher": TeacherSpec, "data.source": SourceSpec}


def _check_entries(where: str, key: str, value: Any) -> None:
    """Check a list of teachers or sources."""
    expected = _described(kinds()[key])
    expect(isinstance(value, str | list | None), key, expected, value)
    for entry in value if isinstance(value, list) else []:
        expect(isinstance(entry, str | dict), key, expected, value)
        if isinstance(entry, dict):
            _check_keys(where, key, entry, _ENTRIES[key])
            expect(bool(entry.get("name")), key, f"an entry with a name in {where}", entry)
            for name, kind in get_type_hints(_ENTRIES[key]).items():
                given = entry.get(name)
                fits = isinstance(given, float | int if kind is float else kind)
                ok = name not in entry or (fits and not isinstance(given, bool))
                expect(ok, f"{key}: {name}", _described(kind), given)


def _check_keys(where: str, section: str, content: Any, kind: Any) -> None:
    expected = (
        f"a mapping of keys in {where}" if section not in ("", where) else "a mapping of keys"
    )
    expect(isinstance(content, dict), section or where, expected, content)
    known = [field.name for field in fields(kind)]
    for key in content:
        if key not in known:
            full = ".".join(filter(None, (section, str(key))))
            hint = did_you_mean(str(key), known) if section in _ENTRIES else ""
            place = "" if section == where else f" in {where}"
            raise ConfigError(f"{full}: unknown key{place}{hint or _nearest(full)}")


def _nearest(key: str) -> str:
    section = f"{key.partition('.')[0]}."
    own = [name.removeprefix(section) for name in kinds() if name.startswith(section)]
    known = ", ".join(own or [name for name in kinds() if "." not in name])
    return did_you_mean(key, [*kinds(), "config"]) or f"; known are {known}"


# --- Types in words -------------------------------------------------------------------------------


def _optional(kind: Any) -> bool:
    return kind is NoneType or NoneType in get_args(kind)


def _described(kind: Any, many: bool = False) -> str:
    """A key's type in words, such as "a whole number or null"; ``many``: in the plural."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    plural = {int: "whole numbers", float: "numbers", str: "names"}
    parts, origin = get_args(kind), get_origin(kind)
    if kind in _ENTRIES.values():
        return f"{{{', '.join(field.name for field in fields(kind))}}}"
    if is_dataclass(kind):
        return "a mapping of keys"
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is list:
        return f"a list of {_described(parts[0], True)}"
    if origin is tuple:
        return f"a list of {len(parts)} {_described(parts[0], True)}"
    if parts:
        return " or ".join(_described(part, many) for part in parts)
    return "null" if kind is NoneType else (plural if many else words)[kind]


def _explain(message: str) -> str:
    """Turn the parser's message into one line: "key: expected ..., got ..."."""
    text = " ".join(message.split())
    found = re.search(r'.*Parser key "(.*?)".*(?:Given|Got) value: ?(.*)', text)
    if found:
        kind = kinds().get(found[1], int)  # int: --local_rank
        return f"{found[1]}: expected {_described(kind)}, got {found[2] or 'none'}"
    return text


def to_yaml(config: Config) -> str:
    """Format a configuration as YAML that `parse` reads back to an equal Config."""
    plain = asdict(config)
    plain["optimizer"]["betas"] = list(plain["optimizer"]["betas"])
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes strings such as 7e57: text to PyYAML, but a number to the parser."""


def _quoted(dumper: _Dumper, text: str) -> Any:
    style = '"' if re.fullmatch(r"[-+]?\d+e[-+]?\d+", text, re.IGNORECASE) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)
