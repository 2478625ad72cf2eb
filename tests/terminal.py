"""A terminal: a program runs in it, and what a person sees is read off its lines."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

KIND = "xterm-256color"
CONTROL = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])")


def run(code: str, *arguments: str, width: int, height: int) -> list[str]:
    """Run Python code with a terminal as its standard error; what the terminal shows in the end, with what scrolled
    out of it.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment = plain | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": KIND}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stdin=its, stderr=its)
    os.close(its)
    written = b""
    while chunk := _read(ours):
        written += chunk
    os.close(ours)
    assert process.wait(timeout=60) == 0, written.decode()
    return shown(written.decode(), width, height)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux says so that nobody holds the other end any more
        return b""


def shown(text: str, width: int, height: int) -> list[str]:
    """The lines after `text`: with line feeds, moves upward and erased lines, as rich writes them."""
    lines, row, column, at = [""], 0, 0, 0
    while at < len(text):
        if control := CONTROL.match(text, at):
            at = control.end()
            if control[2] == "A":
                row = max(row - int(control[1] or 1), len(lines) - height, 0)
            elif control[2] == "K":
                lines[row] = ""
            else:
                assert control[2] in "mhl", f"what does {control[0]!r} do?"
            continue
        letter, at = text[at], at + 1
        if letter == "\r":
            column = 0
            continue
        if letter == "\n" or column == width:
            row, column = row + 1, 0 if letter != "\n" else column
            lines += [""] * (row == len(lines))
        if letter != "\n":
            lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
