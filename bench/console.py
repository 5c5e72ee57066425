"""Progress lines and tables."""
import sys
import time


def progress(items, label=str, total=None):
    """Yield ``items``, and print on stderr which one is under way and about how much time is left.

    On a terminal the line overwrites itself. ``total`` is the number of items; needed where ``items`` has no length.
    """
    total, start, terminal = len(items) if total is None else total, time.monotonic(), sys.stderr.isatty()
    before, after = ("\r\x1b[K", "") if terminal else ("", "\n")
    try:
        for done, item in enumerate(items):
            left = (time.monotonic() - start) / done * (total - done) if done else None
            text = f"[{done + 1}/{total}] {label(item)}" + (f", {left:.0f} s left" if done else "")
            print(before + text, end=after, file=sys.stderr, flush=True)
            yield item
    finally:
        print(before, end="", file=sys.stderr, flush=True)


def markdown(header, rows):
    """A Markdown table that is also aligned as plain text: the first column to the left, the others to the right."""
    rows = [list(header)] + [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    line = lambda row: "| " + " | ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])])
    return "\n".join(line(row) + " |" for row in rows)
