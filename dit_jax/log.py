"""Messages and progress on standard error, through the logger "dit_jax"; tables on standard output.

`logging.getLogger("dit_jax").setLevel(logging.WARNING)` leaves warnings and errors only. In a job of several processes,
process 0 speaks for all: the others log warnings and errors only, which begin with "[process 1] ".
"""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

LOGGER = logging.getLogger("dit_jax")


class _ToPeople(logging.Handler):
    """Writes to the current `sys.stderr`, which a notebook, a test or a progress bar may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


if not LOGGER.handlers:
    LOGGER.addHandler(_ToPeople())
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # handlers of absl and notebooks at the root would print each line again


def name_process(index: int) -> None:
    """Begin each line with the number of this process and log warnings and errors only, unless it is 0."""
    LOGGER.setLevel(logging.WARNING if index else logging.INFO)
    for handler in LOGGER.handlers:
        handler.setFormatter(logging.Formatter(f"[process {index}] %(message)s" if index else None))


def say(message: str) -> None:
    """Log a line of information; standard output is for results."""
    LOGGER.info(message)


def notice(message: str) -> None:
    """Log something left out or tidied up without changing the result."""
    LOGGER.warning(f"notice: {message}")


def warn(message: str) -> None:
    """Log a problem after which the job goes on."""
    LOGGER.warning(f"warning: {message}")


def complain(message: str) -> None:
    """Log a failure."""
    LOGGER.error(f"error: {message}")


def clock(seconds: float) -> str:
    """Format seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def pace(total: float, done: float = 0.0, apart: Callable = float) -> Callable[[float], tuple[float, str]]:
    """Return a function: amount done -> (amount a second since `pace` was called, "ETA m:ss"), without the seconds `apart()` so far."""
    since = time.perf_counter() - apart()

    def report(now: float) -> tuple[float, str]:
        rate = (now - done) / max(time.perf_counter() - apart() - since, 1e-9)
        return rate, f"ETA {clock((total - now) / rate) if rate > 0 else '?'}"

    return report


def progress(
    last: int, images_per_step: int, flops_until: Callable[[int], float], peak: float, apart: Callable = float
) -> Callable[[int, dict], dict]:
    """Return a function of (step, scalars) that logs "step, loss, images/s, MFU, ETA" and returns the rates.

    `flops_until(step)`: FLOPs of all steps up to one. Rates are since its last call, without the seconds `apart()` so far. The first
    gives none and no ETA, because the time before it is mostly compilation.
    """
    began, current, reported = time.perf_counter(), None, 0

    def report(step: int, scalars: dict) -> dict:
        nonlocal current, reported
        line, before = f"step {step:>7}/{last}  loss {scalars['loss']:.4f}  ", current
        rate, eta = before(step) if before else (0.0, "")
        per_step = (flops_until(step) - flops_until(reported)) / max(step - reported, 1)
        current, reported = pace(last, step, apart), step
        if not before:
            say(f"{line}{time.perf_counter() - began:.1f} s with compilation")
            return {}
        rates = {"images_per_second": rate * images_per_step, "mfu": rate * per_step / peak}
        say(f"{line}{rates['images_per_second']:,.0f} images/s  MFU {rates['mfu']:.1%}  {eta}")
        return rates

    return report


def drawing_progress(first: int, num: int) -> Callable[[int], None]:
    """Return a function of the images drawn so far that logs them, with rate and ETA, at most every two seconds."""
    if first:
        say(f"  {first}/{num} were drawn before")
    current, last = None, 0.0  # timed from the end of the first batch, which compiles

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
def waiting(what: str, every: float = 15.0) -> Iterator[None]:
    """Log that `what` is under way, with the time that it has taken, every so many seconds until the block ends."""
    done, since = threading.Event(), time.perf_counter()

    def tell() -> None:
        while not done.wait(every):
            say(f"  {what}: {clock(time.perf_counter() - since)} so far")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def bar(name: str, total: float) -> Iterator[Callable[[float], str]]:
    """Draw a progress bar below the log, on terminals only; yields a function that moves it and returns "ETA m:ss"."""
    from rich.console import Console  # here so that commands without a bar start faster
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
    """Print rows of text to standard output: a ruled table on a terminal, aligned plain text elsewhere."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    shape = {"box": box.HEAVY_HEAD} if terminal else {"box": None, "padding": (0, 0, 0, 2)}
    shown = Table(**shape)
    for i, name in enumerate(head):
        shown.add_column(Text(name), justify="right" if i else "left")
    for row in rows:
        shown.add_row(*map(Text, row))
    console = Console(force_terminal=terminal, force_jupyter=False, width=None if terminal else 10_000)
    with console.capture() as text:
        console.print(shown)
    for line in [title] * bool(title) + text.get().splitlines() + [""] * (not terminal):
        print(line.rstrip())
