"""`python -m int8kit`: the command line."""

from int8kit.cli.main import main

if __name__ == "__main__":
    main()
