"""Functions as commands: the signature gives the options, the docstring the help. The one parser is jsonargparse;
`Spoken` is how it talks: help without Python's types, one line for a mistake, with the nearest name."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a string below a dataclass field is its help
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


_WIDTH, _INDENT = 100, 28
_METAVARS: dict[Any, str] = {
    int: "N",
    float: "X",
    Path: "PATH",
    str: "NAME",
    bool: "[true|false]",
    dict: "'{KEY: VALUE}'",
}
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    Path: "a path",
    str: "a text",
    bool: "true or false",
}
_WORDS |= {dict: "a mapping such as '{key: value}'", type(None): "null"}


class Spoken:
    """Mixed into a parser of jsonargparse: options are spelled out, help and mistakes are in plain words."""

    prog: str
    usage: str | None
    description: str | None
    _actions: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def shown(self) -> list[tuple[str, list[Any]]]:
        """Titles and what is listed below them in the help."""
        return [("options:", [action for action in self._actions if action.option_strings])]

    def format_help(self) -> str:
        """Of a fixed width and own form, so that it is the same text under every Python and in every terminal."""
        positional = [action for action in self._actions if not action.option_strings]
        needed = [f"{_long(action)} {metavar(hint_of(action))}" for action in self._actions if _is_needed(action)]
        words = [*(action.dest.upper() for action in positional), *needed, "[options]"]
        lines = [f"usage: {self.usage or ' '.join([self.prog, *words])}", ""]
        lines += [line for part in (self.description or "").split("\n\n") for line in (*_wrap(part, 0), "")]
        sections = [("arguments:", positional)] if positional else []
        for title, actions in [*sections, *self.shown()]:
            lines += [title, *(line for action in actions for line in _lines_of(action)), ""]
        return "\n".join(lines)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        names = [name for action in self._actions for name in action.option_strings]
        hints = {action.dest: hint_of(action) for action in self._actions}
        print(f"error: {in_words(message, names, hints)} (all options: {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


class Parser(Spoken, ArgumentParser):  # type: ignore[misc]  # format_help: stubs name more arguments
    """The parser of every verb but those of training."""


def hint_of(action: Any) -> Any:
    """The type of an option, None where it has none."""
    return getattr(action, "_typehint", None) or action.type


def metavar(hint: Any) -> str:
    """What stands for the value in the help."""
    for one in _alternatives(hint):
        if get_origin(one) is Literal:
            return "|".join(map(str, get_args(one)))
        if get_origin(one) in (tuple, list) or one in (tuple, list):
            return "A,B,..."
        if (name := _METAVARS.get(get_origin(one) or one)) is not None:
            return name
    return "VALUE"


def type_words(hint: Any) -> str:
    """What is accepted, as one says it."""
    words = []
    for one in _alternatives(hint):
        if get_origin(one) is Literal:
            words.append(f"one of {', '.join(map(str, get_args(one)))}")
        elif get_origin(one) in (tuple, list):
            inside = [part for part in get_args(one) if part is not Ellipsis]
            words.append(f"a list of {' and '.join(dict.fromkeys(map(type_words, inside)))}")
        else:
            words.append(_WORDS.get(get_origin(one) or one, "a value"))
    return ", or ".join(dict.fromkeys(words))


def _alternatives(hint: Any) -> list[Any]:
    if get_origin(hint) not in (Union, types.UnionType):
        return [hint]
    return [one for part in get_args(hint) for one in _alternatives(part)]


def in_words(message: str, names: Sequence[str], hints: Mapping[str, Any]) -> str:
    """A message of the parser as one line: what came, what was expected, and the nearest known name.

    names: of all options, with their dashes. hints: types by name without them."""
    if match := re.match(r"unrecognized arguments?: (.*)", message, re.DOTALL):
        given = match[1].split()
        option = next((word.partition("=")[0] for word in given if word.startswith("-")), given[0])
        if not option.startswith("-"):
            return f"{option!r} is one word too many; values with spaces need quotes, lists commas or brackets"
        return f"unknown option {option}{nearest(option, names)}"
    if match := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return _unknown_key(f"{match[1]}.{match[2]}", hints)
    if match := re.search(r"Option '([\w.]+)' is not accepted", message):
        return _unknown_key(match[1], hints)
    line = " ".join(message.split())
    if match := re.search(r"(?:Parser k|k)ey \"([\w.]+)\":? ?(.*)", line, re.IGNORECASE):
        given = re.search(r"(?:Got value|[Vv]alue|got): ?(.*?)(?: - Expected| Given|\. |$)", match[2])
        if given is not None and hints.get(match[1]) is not None:
            return f"--{match[1]}: expected {type_words(hints[match[1]])}, got {given[1]}"
        return f"--{match[1]}: {match[2]}"
    return line


def _unknown_key(key: str, hints: Mapping[str, Any]) -> str:
    return f"unknown setting {key}{nearest(key, list(hints))}"


def nearest(name: str, names: Sequence[str]) -> str:
    """ "; did you mean X?" where a known name comes near, also one of another group; else nothing."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    if not close:
        last = name.lstrip("-").rpartition(".")[2]
        ends = {one.lstrip("-").rpartition(".")[2]: one for one in names}
        close = [ends[end] for end in difflib.get_close_matches(last, list(ends), n=1, cutoff=0.85)]
    return f"; did you mean {close[0]}?" if close else ""


def _long(action: Any) -> str:
    name: str = max(action.option_strings, key=len)
    return name if not name.endswith("+") else name[:-1]


def _is_needed(action: Any) -> bool:
    return bool(action.option_strings and action.required)


def _lines_of(action: Any) -> list[str]:
    """An option in the help: its name, then what it does."""
    if action.help == "==SUPPRESS==" or action.dest.endswith(".help") or action.dest == "print_config":
        return []
    if action.help == "Path to a configuration file.":  # of a group whose settings stand below
        return []
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", " ".join((action.help or "").split()))  # Sphinx's roles
    if action.dest == "help":
        return _beside("--help", "Show this.")
    head = (
        f"{_long(action)} {action.metavar or metavar(hint_of(action))}"
        if action.option_strings
        else action.dest.upper()
    )
    default = action.default
    if _is_needed(action):
        text += " (required)"
    elif default not in (None, (), [], {}, "==SUPPRESS==") and action.option_strings:
        values = default if isinstance(default, tuple | list) else (default,)
        words = ["true" if one is True else "false" if one is False else str(one) for one in values]
        text += f" (default: {', '.join(words)})"
    return _beside(head, text.strip())


def _beside(head: str, text: str) -> list[str]:
    lines = _wrap(text, _INDENT)
    if len(head) + 4 <= _INDENT and lines:
        return [f"  {head}".ljust(_INDENT) + lines[0].lstrip(), *lines[1:]]
    return [f"  {head}", *lines]


def _wrap(text: str, indent: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(
        " ".join(text.split()), _WIDTH, initial_indent=space, subsequent_indent=space, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


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
    values = parser.parse_args(join_words(hints, _without_aliases(hints, args)))
    if config is None:
        values = parser.instantiate_classes(values)
    by_name: dict[str, Any] = values.as_dict()
    by_name.pop("config", None)
    return by_name


_ALIASES = {"model_name_or_path": "model", "output_dir": "out", "per_device_eval_batch_size": "batch_size"}
"""Names of other frameworks -> ours, in verbs that have ours and not theirs. `stts fit` has more of them."""


def _without_aliases(hints: Mapping[str, Any], args: Sequence[str]) -> list[str]:
    words = []
    for arg in args:
        name, equals, value = arg.partition("=")
        own = _ALIASES.get(name[2:].replace("-", "_")) if name.startswith("--") else None
        words.append(f"--{own}{equals}{value}" if own in hints else arg)
    return words


def make_parser(verb: Callable[..., Any], prog: str) -> Parser:
    config = _config_of(verb)
    if config is not None:
        parser = Parser(prog=prog, description=config.__doc__)
        parser.add_argument("--config", action="config", help="YAML file with these settings.")
        parser.add_class_arguments(config, as_group=False)
        return parser
    documented, hints = docstring_parser.parse(verb.__doc__ or ""), get_type_hints(verb)
    parser = Parser(prog=prog, description=_text(documented))
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
