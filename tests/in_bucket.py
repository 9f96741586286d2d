"""Jobs whose run folder is in a bucket, on the strict server (tests/bucket.py; the fixture `server` is in conftest.py)."""

import json
import shutil

from bucket import environment
from job import Job, run

W = "gs://test/runs/a"


def there(server, prefix=""):
    return sorted(name for name in server.buckets["test"] if name.startswith(prefix))


def begun(server, job, *arguments, cache_dir):
    """A running job, led to the server."""
    return Job(job, *arguments, cache_dir=cache_dir, environment=environment(server.address))


def ended(server, job, *arguments, cache_dir):
    return run(job, *arguments, cache_dir=cache_dir, environment=environment(server.address))


def on_disk(server, tmp_path, name="runs/a"):
    """A copy on disk of what is in the bucket under `name`."""
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    server.dump(tmp_path / "copy")
    return tmp_path / "copy" / name


def elsewhere(token="1"):
    """The lease of a process of another machine."""
    return json.dumps({"host": "other", "boot": "1", "process": 7, "started": "3", "token": token})
