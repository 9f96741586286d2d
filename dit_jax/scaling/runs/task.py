"""The task of a record: what its model draws from. It stands in the protocols that are compared, so that labels and words do not mix."""

import functools
import os
import re

from dit_jax.error import UsageError, shown
from dit_jax.files import LARGEST, is_file, parse_json, read, remote

TASKS = ("labels", "text", "unconditional")
FACTOR = re.compile(r", superres [0-9]+\Z")  # of super-resolution, behind the task
OBJECT = re.compile(
    r"(?:(.*)/)?eval/records(?:\.jsonl|/[^/]+\.json)"
)  # a file of records, and in group 1 the run's folder


def task_of(record: dict, where: str) -> str:
    """One of TASKS, of super-resolution with its factor behind, such as "labels, superres 2".

    A record that does not state it, of an earlier version, follows the config of its run, if that is on a disk and no request to a
    bucket; else it is of labels.
    """
    found = record.get("task") or _of_config(where.rpartition(":")[0])
    if not (isinstance(found, str) and FACTOR.sub("", found) in TASKS):
        known = f"{', '.join(TASKS)}, or one of these with ', superres N' behind"
        raise UsageError(f"{where}: task is {shown(found)}, expected one of {known}")
    return found


@functools.lru_cache(maxsize=64)
def _of_config(file: str) -> str:
    match = OBJECT.fullmatch(file)
    config = os.path.join(match[1] or "", "config.json") if match else ""
    try:
        model = (
            parse_json(read(config, LARGEST), LARGEST)["model"]
            if match and not remote(config) and is_file(config)
            else {}
        )
        return "text" if model.get("text") else "labels" if model.get("classes", 1) else "unconditional"
    except (ValueError, KeyError, AttributeError, TypeError):
        return "labels"  # a config that is damaged is not what is asked about
