"""The `--help` of a job: its docstring, its flags, and every key of the config with the comment beside it in `config`."""

import ast
import dataclasses
import functools
import inspect
import io
import sys
import textwrap
import tokenize

from absl import flags

from dit_jax import config as configs

WIDTH = 120
KINDS = {"string": "TEXT", "int": "INT", "float": "FLOAT", "string enum": "WORD"}
ASKED = ("--help", "-h", "-help", "--helpfull", "--helpshort")


def asked(arguments: list[str]) -> bool:
    """Return whether a command line asks for help."""
    return any(argument in ASKED for argument in arguments)


def own_flags() -> list[str]:
    """Names of the flags that the job and this package define, without flags of imported libraries."""
    ours = (sys.argv[0], "__main__")
    modules = {m: f for m, f in flags.FLAGS.flags_by_module_dict().items() if m in ours or m.startswith("dit_jax")}
    return [flag.name for found in modules.values() for flag in found]


def text(doc: str, config: str) -> str:
    """Return the help of a job with this docstring; `config` as in `dit_jax.job.launch.launch`."""
    parts = [doc.strip(), "flags:\n" + "\n".join(_flag(flags.FLAGS[name]) for name in own_flags())]
    if config in ("file", "optional"):
        parts[-1] += "\n" + _entry("--config=FILE[:ARG]", "a file of configs/, with :ARG where it takes one")
    if config:
        groups = [_group(f.name, getattr(configs.Config(), f.name)) for f in dataclasses.fields(configs.Config)]
        parts.append("keys of the config, with their defaults:")
        parts += groups
    return "\n\n".join(parts)


def _flag(flag) -> str:
    value = "" if flag.boolean else f"={KINDS.get(flag.flag_type(), 'LIST')}"
    said = " ".join((flag.help or "").split())
    if any("other than None" in validator.message for validator in flag.validators):  # absl's mark of a required flag
        said += " (required)"
    elif flag.default not in (None, "", [], False):
        said += " (default: {})".format(flag.default_as_str.strip("'"))
    return _entry(f"--{flag.name}{value}", said)


def _entry(name: str, said: str, column: int = 26) -> str:
    lines = textwrap.wrap(said, WIDTH - column) or [""]
    first = f"  {name:<{column - 2}}" if len(name) <= column - 4 else f"  {name}\n{'':{column}}"
    return (first + f"\n{'':{column}}".join(lines)).rstrip()


def _group(name: str, values) -> str:
    said, kind = comments(), type(values).__name__
    keys = [(f"--config.{name}.{key}={_plain(value)}", said[kind][key]) for key, value in vars(values).items()]
    title = f"{name}: {' '.join(type(values).__doc__.split())}"
    return "\n".join([*textwrap.wrap(title, WIDTH), *(_entry(key, text, 43) for key, text in keys)])


@functools.cache
def comments() -> dict[str, dict[str, str]]:
    """Map config class -> field -> the comment beside it in its file of `config`, or ""."""
    found = {}
    for kind in (type(getattr(configs.Config(), f.name)) for f in dataclasses.fields(configs.Config)):
        source = inspect.getsource(kind)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        beside = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
        found[kind.__name__] = {field.target.id: beside.get(field.end_lineno, "") for field in fields}
    return found


def _plain(value) -> str:
    """Format a value as one would type it."""
    return f"'{value}'" if isinstance(value, tuple) else str(value)
