"""Answer the rows of a CSV file with a finished run: `python src/predict.py run=... data.test=... output=...`."""

from vlmtune.cli.main import run

if __name__ == "__main__":
    run("predict")
