"""Large numbers, times and memory as a reader takes them in: few digits and a unit."""

MINUTE, HOUR, DAY = 60, 3600, 86400
GIB = 2**30


def count_text(number: float) -> str:
    """ "230K", "1.25M" or "50.3B"; small whole numbers as they are."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= 0.9995 * size:
            return _three_digits(number / size) + unit
    return _three_digits(number)


def operations_text(number: float) -> str:
    """ "2.4e18"."""
    return f"{number:.1e}".replace("e+", "e") if number else "0"


def time_text(seconds: float) -> str:
    """ "0.4 s", "12 min", "3.1 h" or "2,500 days"; two digits, as times are not more exact than that."""
    number, unit = seconds, "s"
    for least, size, name in ((2 * DAY, DAY, "days"), (HOUR, HOUR, "h"), (MINUTE, MINUTE, "min")):
        if seconds >= least:
            number, unit = seconds / size, name
            break
    if number >= 100:
        number = float(f"{number:.2g}")
    return f"{number:,.{0 if number >= 9.95 else 1}f} {unit}"


def memory_text(size: float) -> str:
    """Bytes as "107 GiB" or "3.2 MiB"."""
    for unit, name in ((2**40, "TiB"), (GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= 0.9995 * unit:
            return f"{_three_digits(size / unit)} {name}"
    return f"{size:.0f} B"


def _three_digits(number: float) -> str:
    digits = 0 if number >= 99.95 or number == int(number) else 1 if number >= 9.995 else 2
    return f"{number:,.{digits}f}"
