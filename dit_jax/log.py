"""What people read on standard error while a job works: the logger "dit_jax", its lines, and how far the work has come.

Lines are as they are said; `logging.getLogger("dit_jax").setLevel(logging.WARNING)` leaves warnings and errors only. Where several
processes work on one job, the lines of all but process 0 begin with "[process 1] ".
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

LOGGER = logging.getLogger("dit_jax")


class _ToPeople(logging.Handler):
    """Writes to what standard error is at that moment: a notebook, a test or a progress bar may have put another in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


if not LOGGER.handlers:
    LOGGER.addHandler(_ToPeople())
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = (
        False  # absl and notebooks have handlers of their own at the root: they would print each line again
    )


def name_process(index: int) -> None:
    """Say in each line from which of several processes it comes; process 0 is the one that people read."""
    for handler in LOGGER.handlers:
        handler.setFormatter(logging.Formatter(f"[process {index}] %(message)s" if index else None))


def say(message: str) -> None:
    """One line of information: standard output is for results."""
    LOGGER.info(message)


def notice(message: str) -> None:
    """A line on what is left out or tidied up, with the same result."""
    LOGGER.warning(f"notice: {message}")


def warn(message: str) -> None:
    """A line on what is wrong, while the job goes on."""
    LOGGER.warning(f"warning: {message}")


def complain(message: str) -> None:
    """A line on what failed."""
    LOGGER.error(f"error: {message}")


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    seconds = max(round(seconds), 0)
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def pace(total: float, done: float = 0.0) -> Callable[[float], tuple[float, str]]:
    """A function of the amount done that returns (amount a second since `pace` was called, "ETA m:ss")."""
    since = time.perf_counter()

    def report(now: float) -> tuple[float, str]:
        rate = (now - done) / max(time.perf_counter() - since, 1e-9)
        return rate, f"ETA {clock((total - now) / rate) if rate > 0 else '?'}"

    return report


def progress(
    first: int, last: int, images_per_step: int, flops_per_step: float, peak: float
) -> Callable[[int, dict], dict]:
    """A function of (step, scalars) that prints "step, loss, images/s, MFU, ETA" and returns the rates since its last call.

    Its first call is told from the others: the time up to there is mostly compilation, so it gives no rate and no ETA.
    """
    began, current = time.perf_counter(), None

    def report(step: int, scalars: dict) -> dict:
        nonlocal current
        line, before = f"step {step:>7}/{last}  loss {scalars['loss']:.4f}  ", current
        rate, eta = before(step) if before else (0.0, "")
        current = pace(last, step)
        if not before:
            say(f"{line}{time.perf_counter() - began:.1f} s with compilation")
            return {}
        rates = {"images_per_second": rate * images_per_step, "mfu": rate * flops_per_step / peak}
        say(f"{line}{rates['images_per_second']:,.0f} images/s  MFU {rates['mfu']:.1%}  {eta}")
        return rates

    return report


def drawing_progress(first: int, num: int) -> Callable[[int], None]:
    """A function of the images drawn so far that says so, with rate and ETA, at most once in two seconds."""
    if first:
        say(f"  {first}/{num} were drawn before")
    current, last = None, 0.0  # from the end of the first batch, which compiles

    def report(done: int) -> None:
        nonlocal current, last
        now = time.monotonic()
        if not current:
            current, last = pace(num, done), now
        elif now - last > 2:
            rate, eta = current(done)
            last = now
            say(f"  {done}/{num}  {rate:,.1f} images/s  {eta}")

    return report


@contextlib.contextmanager
def bar(name: str, total: float) -> Iterator[Callable[[float], str]]:
    """A bar on a terminal, below the lines that are said meanwhile; a function that moves it and returns "ETA m:ss"."""
    from rich.console import Console  # here: commands that draw no bar start faster
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[eta]}"), TimeElapsedColumn())
    console, current = Console(stderr=True), pace(total)
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        task = shown.add_task(name, total=total, eta="")

        def move(done: float) -> str:
            _, eta = current(done)
            shown.update(task, completed=done, eta=eta)
            return eta

        yield move


def table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print rows of text to standard output: a rich table on a terminal, aligned plain text elsewhere."""
    lines = [head, *rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        ruled = Table(title=Text(title), title_justify="left")
        for i, name in enumerate(head):
            ruled.add_column(Text(name), justify="right" if i else "left")
        for row in lines[1:]:
            ruled.add_row(*map(Text, row))
        Console().print(ruled)
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if title:
        print(title)
    for line in lines:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  " + "  ".join(cells).rstrip())
    print()
