"""What people read on standard error while a job works."""

import sys
import time
from collections.abc import Callable


def say(message: str) -> None:
    """One line on standard error: standard output is for results."""
    print(message, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    seconds = max(round(seconds), 0)
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress(
    first: int, last: int, images_per_step: int, flops_per_step: float, peak: float
) -> Callable[[int, dict], dict]:
    """A function of (step, scalars) that prints "step, loss, images/s, MFU, ETA" and returns the rates.

    Its first call is told from the others: the time up to there is mostly compilation, so it gives no rate and no ETA.
    """
    then = [time.perf_counter(), first]
    compiled = []

    def report(step: int, scalars: dict) -> dict:
        now = time.perf_counter()
        seconds, steps = now - then[0], step - then[1]
        then[:] = now, step
        line = f"step {step:>7}/{last}  loss {scalars['loss']:.4f}  "
        if not compiled:
            compiled.append(step)
            say(f"{line}{seconds:.1f} s with compilation")
            return {}
        rate = steps / max(seconds, 1e-9)
        rates = {"images_per_second": rate * images_per_step, "mfu": rate * flops_per_step / peak}
        say(
            f"{line}{rates['images_per_second']:,.0f} images/s  MFU {rates['mfu']:.1%}  ETA {clock((last - step) / rate)}"
        )
        return rates

    return report


def drawing_progress(first: int, num: int) -> Callable[[int], None]:
    """A function of the images drawn so far that says so, with rate and ETA, at most once in two seconds."""
    if first:
        say(f"  {first}/{num} were drawn before")
    then: list = []  # the end of the first batch, which compiles: (time, images); and when it last said something

    def report(done: int) -> None:
        now = time.monotonic()
        if not then:
            then.extend([(now, done), now])
        elif now - then[1] > 2:
            then[1] = now
            rate = (done - then[0][1]) / (now - then[0][0])
            say(f"  {done}/{num}  {rate:,.1f} images/s  ETA {clock((num - done) / rate)}")

    return report
