"""Talk to a finished run on a page of this machine: `python src/chat.py run=outputs/runs/STAMP`."""

from vlmtune.cli.main import run

if __name__ == "__main__":
    run("chat")
