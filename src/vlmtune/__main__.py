"""`python -m vlmtune train ...`, which is also what a launcher starts: `torchrun -m vlmtune train ...`."""

from vlmtune.cli.main import main

if __name__ == "__main__":
    main()
