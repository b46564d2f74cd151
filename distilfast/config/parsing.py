"""Read a `Config` from YAML files and the command line, which take the same keys, and format it."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from distilfast.config.schema import Config, SourceSpec, TeacherSpec
from distilfast.errors import ConfigError, expect

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
    parser.add_argument("--config", action="config", help="a YAML file with these keys")
    parser.add_argument("--print_config", action="store_true", help="print the result and exit")
    parser.add_argument("--local_rank", type=int, default=0, help=jsonargparse.SUPPRESS)
    parser.add_class_arguments(Config, None, fail_untyped=True, sub_configs=False)
    # The parser reads the defaults from a BatchConfig(), whose sequences is 4096. A run with
    # batch.tokens must not get that default.
    parser.set_defaults({"batch.sequences": None})
    files, others = _split(arguments)
    for file in files:
        _check_file(Path(file))
    for argument in others:
        key, _, value = argument.removeprefix("--").partition("=")
        if key in ("teacher", "data.source") and value.startswith("["):
            with contextlib.suppress(yaml.YAMLError):
                _check_entries("the command line", key, yaml.safe_load(value))
    try:
        namespace = parser.parse_args([*(f"--config={file}" for file in files), *others])
        for key, value in namespace.as_flat().__dict__.items():
            expect(value is not None or key in _OPTIONAL, key, "a value", None)
        made = parser.instantiate(namespace)
        config = Config(**{f.name: made[f.name] for f in fields(Config)})
    except ConfigError:
        raise
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(_explain(str(error))) from error
    if namespace.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


# The keys that may be null.
_OPTIONAL = {
    *("config", "steps", "epochs", "student.dropout", "data.source", "data.prepared"),
    *("batch.sequences", "batch.tokens", "batch.warmup_from", "evaluate.max_examples"),
}


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files after --config, and everything else."""
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == "--config":
            files.append(value if equals else next(rest, ""))
        else:
            others.append(argument)
    return files, others


def _check_file(path: Path) -> None:
    """Check that a file is YAML with known keys. The parser's own messages for this are obscure."""
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ConfigError(
            f"--config: expected a YAML file, got {str(path)!r}; recipes in {RECIPES}: {known}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected YAML, got {' '.join(str(error).split())}") from None
    _check_keys(path, "", content, Config)
    for section in fields(Config):
        if is_dataclass(section.default_factory) and section.name in content:
            _check_keys(path, section.name, content[section.name], section.default_factory)
    _check_entries(str(path), "teacher", content.get("teacher"))
    _check_entries(str(path), "data.source", content.get("data", {}).get("source"))


def _check_entries(where: str, key: str, value: Any) -> None:
    """Check a list of teachers or sources, where the parser's messages are obscure."""
    for entry in value if isinstance(value, list) else []:
        if isinstance(entry, dict):
            _check_keys(where, key, entry, TeacherSpec if key == "teacher" else SourceSpec)
            expect(bool(entry.get("name")), key, f"an entry with a name in {where}", entry)
            weight = entry.get("weight", 1.0)
            expect(type(weight) in (int, float), f"{key}: weight", "a number", weight)


def _check_keys(path: Path | str, where: str, content: Any, kind: Any) -> None:
    expected = f"a mapping of keys in {path}" if where else "a mapping of keys"
    expect(isinstance(content, dict), where or str(path), expected, content)
    for key in content:
        if key not in {f.name for f in fields(kind)}:
            full = ".".join(filter(None, (where, str(key))))
            near = difflib.get_close_matches(str(key), [f.name for f in fields(kind)], n=1)
            entry = kind in (TeacherSpec, SourceSpec)
            hint = f"; did you mean {near[0]}?" if near and entry else _nearest(full)
            raise ConfigError(f"{full}: unknown key in {path}{hint}")


def _explain(message: str) -> str:
    """Turn the parser's message into one line: "key: expected ..., got ..."."""
    text = " ".join(message.split())
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", text)
    text = re.sub(r"<class '(?:distilfast\.config\.)?(\w+)'>", r"\1", text).replace(
        "NoneType", "null"
    )
    if found := re.match(r"(?:Group '(.*)' does not accept o|O)ption '(.*)'", text):
        key = ".".join(filter(None, found.groups()))
        return f"{key}: unknown key{_nearest(key)}"
    if found := re.match(r"unrecognized arguments: --([\w.]+)", text):
        return f"--{found[1]}: unknown key{_nearest(found[1])}"
    if found := re.match(r'Parser key "(.*?)": Expected an? (.*)\. Got value: (.*)', text):
        return f"{found[1]}: expected {found[2]}, got {found[3]}"
    if found := re.match(r"""Parser key "(.*?)": Unable to load config '(.*?)'""", text):
        return f"{found[1]}: expected a mapping of keys, got {found[2]}"
    union = r'Parser key "(.*?)": .*Subtypes: \[(.*?)\] Errors.*Given value: (.*)'
    if found := re.match(union, text):
        return f"{found[1]}: expected {found[2]}, got {found[3]}"
    return text


def _nearest(key: str) -> str:
    top = [f.name for f in fields(Config)]
    nested: list[str] = []
    for section in fields(Config):
        if is_dataclass(section.default_factory):
            nested += [f"{section.name}.{f.name}" for f in fields(section.default_factory)]
    close = difflib.get_close_matches(key, [*top, *nested], n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(top)}"


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
