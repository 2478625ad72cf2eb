"""Fine-tune a vision-language model: `python src/train.py model=... adapter=... data=...`."""

from vlmtune.cli import main as cli

if __name__ == "__main__":
    cli.main("train", cli.train)
