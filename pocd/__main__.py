"""`python -m pocd`, the same as the command `pocd`."""

from pocd.cli.main import main

if __name__ == "__main__":
    main()
