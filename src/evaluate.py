"""Score a finished run on rows with answers: `python src/evaluate.py run=... data.test=...`."""

from vlmtune import cli

if __name__ == "__main__":
    cli.main("evaluate", cli.evaluate)
