"""Score a finished run on rows with answers: `python src/evaluate.py run=... data.test=...`."""

from vlmtune.cli import main as cli

if __name__ == "__main__":
    cli.main("evaluate", cli.evaluate)
