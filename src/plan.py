"""How much memory a run needs, before anything is downloaded: `python src/plan.py model=... quantization=...`."""

from vlmtune.cli.main import run

if __name__ == "__main__":
    run("plan")
