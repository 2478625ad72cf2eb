"""Score a finished run on rows with answers: `python src/evaluate.py run=... data.test=...`."""

from vlmtune.cli.main import run

if __name__ == "__main__":
    run("evaluate")
