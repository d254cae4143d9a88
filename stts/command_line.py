"""Functions as commands: the signature gives the options, the docstring the help. The one parser is jsonargparse."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a string below a dataclass field is its help
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


def run(verb: Callable[..., Any], prog: str, args: Sequence[str]) -> int:
    """Call `verb` with what the command line says; print the text or path it returns, or return its exit code.

    A verb that takes `argv` alone parses it itself (`stts fit` has Lightning's parser)."""
    if list(inspect.signature(verb).parameters) == ["argv"]:
        result = verb(list(args))
    else:
        positional, options = parse(verb, prog, args)
        result = verb(*positional, **options)
    if isinstance(result, str | Path):
        said = f"wrote {result}" if isinstance(result, Path) else result
        print(said, flush=True)  # a closed pipe is noticed here, not at exit
    return result if isinstance(result, int) else 0


def parse(verb: Callable[..., Any], prog: str, args: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments for `verb` from a command line. SystemExit with a message for a bad one."""
    values, config = read(verb, prog, args), _config_of(verb)
    if config is not None:
        return [config(**values)], {}
    positional: list[Any] = []
    for name in _loose(verb):
        value = values.pop(name)
        positional += value if isinstance(value, list) else [value]
    return positional, values


def read(verb: Callable[..., Any], prog: str, args: Sequence[str]) -> dict[str, Any]:
    """Values of the parameters of `verb` by name; of the fields, where a dataclass is its only parameter.

    Positional-only parameters have no option name here either (`*names` takes one or more). Fields of a dataclass that
    is a keyword are nested options, as in `--form.grid 4`; where it is the only parameter, its fields are the options,
    and `--config` reads them from a YAML file. `--flag` alone is `--flag true`; `--names a b` is `--names [a,b]`."""
    config, hints = _config_of(verb), get_type_hints(verb)
    if config is not None:
        hints = {item.name: get_type_hints(config)[item.name] for item in fields(config)}
    parser = make_parser(verb, prog)
    values = parser.parse_args(join_words(hints, args))
    if config is None:
        values = parser.instantiate_classes(values)
    by_name: dict[str, Any] = values.as_dict()
    by_name.pop("config", None)
    return by_name


def make_parser(verb: Callable[..., Any], prog: str) -> ArgumentParser:
    config = _config_of(verb)
    if config is not None:
        parser = ArgumentParser(prog=prog, description=config.__doc__)
        parser.add_argument("--config", action="config", help="YAML file with these settings.")
        parser.add_class_arguments(config, as_group=False)
        return parser
    documented, hints = docstring_parser.parse(verb.__doc__ or ""), get_type_hints(verb)
    parser = ArgumentParser(prog=prog, description=_text(documented))
    loose = _loose(verb)
    for name, parameter in loose.items():
        about = next((one.description for one in documented.params if one.arg_name.lstrip("*") == name), None)
        many = parameter.kind == parameter.VAR_POSITIONAL
        number = "+" if many else "?" if parameter.default is None else None
        parser.add_argument(name, type=hints[name], help=about, nargs=number)
    parser.add_function_arguments(verb, as_group=False, skip=set(loose))
    return parser


def _config_of(verb: Callable[..., Any]) -> Any:
    """The dataclass that is the only parameter of `verb`, or None."""
    hints, parameters = get_type_hints(verb), inspect.signature(verb).parameters
    [only] = parameters if len(parameters) == 1 else [None]
    return hints[only] if only is not None and is_dataclass(hints[only]) else None


def _loose(verb: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Its positional-only parameters."""
    return {name: one for name, one in inspect.signature(verb).parameters.items() if one.kind in _POSITIONAL}


def join_words(types: Mapping[str, Any], args: Sequence[str]) -> list[str]:
    """The words with `--names a b` and `--names a,b` as `--names [a,b]`, and `--flag` as `--flag true`.

    types: by option name; lists are options whose type is a tuple or has one, flags those of type bool."""
    lists = {
        f"--{name}" for name, hint in types.items() if any(get_origin(one) is tuple for one in (hint, *get_args(hint)))
    }
    flags = {f"--{name}" for name, hint in types.items() if hint is bool}
    words = [part for arg in args for part in (arg.split("=", 1) if arg.split("=", 1)[0] in lists | flags else [arg])]
    joined: list[str] = []
    while words:
        joined.append(words.pop(0))
        if joined[-1] in lists:
            values = []
            while words and not words[0].startswith("--"):
                values.append(words.pop(0).strip("[]"))
            joined.append(f"[{','.join(values)}]")
        elif joined[-1] in flags and (not words or words[0].lower() not in ("true", "false", "yes", "no")):
            joined.append("true")
    return joined


def _text(documented: docstring_parser.Docstring) -> str:
    return "\n\n".join(text for text in (documented.short_description, documented.long_description) if text)
