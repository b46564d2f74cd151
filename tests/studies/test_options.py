"""The applications' flags: their errors are ConfigErrors of one line."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from distilfast.config import ConfigError
from distilfast.studies.flags import Parser, positive


def parser() -> Parser:
    made = Parser("distilfast try", "Tries.")
    made.add_argument("models", nargs="+", metavar="MODEL")
    made.add_argument("--output", required=True)
    made.add_argument("--set", nargs="+", default=[])
    made.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--rate", type=float, default=0.1)
    made.add_argument("--rounds", type=positive, default=3)
    made.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return made


def test_flags_are_read_as_argparse_reads_them() -> None:
    given = "a b --output=o --set x --precision fp32 --no-compile --set y z"
    options = parser().parse_args(given.split())
    assert vars(options) == {
        **{"models": ["a", "b"], "output": "o", "precision": "fp32", "compile": False},
        **{"seed": 0, "rate": 0.1, "rounds": 3, "set": ["x", "y", "z"]},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("a", "--output: expected a value, got none"),
        ("--output o", "MODEL: expected a value, got none"),
        ("a --output", "--output: expected a value, got none"),
        ("a --output o --precision x", "--precision: expected one of fp32, bf16, got 'x'"),
        ("a --output o --seed x", "--seed: expected a whole number, got 'x'"),
        ("a --output o --rate x", "--rate: expected a number, got 'x'"),
        ("a --output o --rounds 0", "--rounds: expected a whole number from 1, got '0'"),
        ("a --output o --rounds -1", "--rounds: expected a whole number from 1, got '-1'"),
        ("a --round 2", "--round: unknown flag; did you mean --rounds?"),
    ],
)
def test_errors_are_one_line_of_flag_expectation_and_value(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parser().parse_args(arguments.split())
    assert str(caught.value) == message


def test_help_is_argparse_s_own(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: distilfast try")
    assert "--no-compile" in out
