"""Merge the adapter of a run into its base model: `python src/merge.py run=... output=FOLDER`."""

from vlmtune.cli.main import run

if __name__ == "__main__":
    run("merge")
