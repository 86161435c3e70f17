"""Numbers as people read them: with a suffix, in GiB, as a length of time."""


def short(number: float) -> str:
    """1.3e9 -> 1.3B."""
    for size, mark in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{mark}"
    return f"{number:.3g}"


def gib(number: float) -> str:
    """Bytes as GiB, small numbers as MiB."""
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds in the largest unit of which there are at least two."""
    for size, unit in ((365.25 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.3g} seconds"
