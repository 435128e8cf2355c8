"""`python -m mapo_fast` is the `mapo-fast` command, for machines without make or scripts on the path."""

from mapo_fast.cli import main

if __name__ == "__main__":
    main()
