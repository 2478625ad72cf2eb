"""Fine-tune a vision-language model: `python src/train.py model=... adapter=... data=...`."""

from vlmtune.cli.main import run

if __name__ == "__main__":
    run("train")
