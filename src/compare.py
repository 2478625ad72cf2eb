"""Compare finished runs: `python src/compare.py outputs/sweeps/NAME/STAMP [RUN ...]`."""

from vlmtune.cli.main import run

if __name__ == "__main__":
    run("compare")
