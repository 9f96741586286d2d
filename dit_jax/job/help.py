"""What a job answers to `--help`: what it does, its flags, and the keys of the config that `--config.a.b=v` overrides."""

import sys
import textwrap
from collections.abc import Mapping

from absl import flags

from dit_jax.config import template

WIDTH = 110
KINDS = {"string": "TEXT", "int": "INT", "float": "FLOAT", "string enum": "WORD"}
ASKED = ("--help", "-h", "-help", "--helpfull", "--helpshort")


def asked(arguments: list[str]) -> bool:
    """Whether a command line asks for help."""
    return any(argument in ASKED for argument in arguments)


def own_flags() -> list[str]:
    """Names of the flags that the job and this package define, and not those of the libraries it imports."""
    ours = (sys.argv[0], "__main__")
    modules = {m: f for m, f in flags.FLAGS.flags_by_module_dict().items() if m in ours or m.startswith("dit_jax")}
    return [flag.name for found in modules.values() for flag in found]


def text(doc: str, config: str) -> str:
    """The help of a job with this docstring; `config` as in `command.launch`."""
    parts = [doc.strip(), "flags:\n" + "\n".join(_flag(flags.FLAGS[name]) for name in own_flags())]
    if config in ("file", "optional"):
        parts[-1] += "\n" + _entry("--config=FILE[:ARG]", "a file of configs/, with :ARG where it takes one")
    if config:
        groups = "\n".join(_group(name, values) for name, values in template().to_dict().items())
        parts.append("keys of the config, overridden by --config.GROUP.KEY=VALUE, with their defaults:\n" + groups)
    return "\n\n".join(parts)


def _flag(flag) -> str:
    value = "" if flag.boolean else f"={KINDS.get(flag.flag_type(), 'LIST')}"
    said = " ".join((flag.help or "").split())
    if any(
        "other than None" in validator.message for validator in flag.validators
    ):  # so absl says that a flag is required
        said += " (required)"
    elif flag.default not in (None, "", [], False):
        said += " (default: {})".format(flag.default_as_str.strip("'"))
    return _entry(f"--{flag.name}{value}", said)


def _entry(name: str, said: str) -> str:
    lines = textwrap.wrap(said, WIDTH - 26) or [""]
    first = f"  {name:<24}" if len(name) <= 22 else f"  {name}\n{'':26}"
    return (first + f"\n{'':26}".join(lines)).rstrip()


def _group(name: str, values: Mapping) -> str:
    return textwrap.fill(
        " ".join(f"{key}={_plain(value)}" for key, value in values.items()),
        WIDTH,
        initial_indent=f"  {name + '.':<24}",
        subsequent_indent=" " * 26,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _plain(value) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}={_plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value)) or "()"
    return str(value) if str(value) else '""'
