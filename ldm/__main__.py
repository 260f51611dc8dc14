"""`python -m ldm`, the `ldm` command of the interpreter at hand."""

from ldm.cli import main

if __name__ == "__main__":
    main()
