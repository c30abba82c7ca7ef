"""`python -m int8kit`, and the entry point of the program `int8kit`: the command line."""

import os
import sys


def main() -> None:
    """Run the command line. An interrupt while it is imported ends the program without a traceback."""
    try:
        from int8kit import interrupt

        interrupt.install()
        from int8kit.cli.main import main as run

        sys.unraisablehook = lambda _: None  # what a library's destructors raise when a connection fails
        run()
    except KeyboardInterrupt:
        sys.stderr.write("int8kit: interrupted\n")
        sys.stderr.flush()
        os._exit(130)


if __name__ == "__main__":
    main()
