"""Answer the rows of a CSV file with a finished run: `python src/predict.py run=... data.test=... output=...`."""

from vlmtune.cli import main as cli

if __name__ == "__main__":
    cli.main("predict", cli.predict)
