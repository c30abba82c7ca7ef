"""A child process in which modules cannot be imported, as on a system that lacks them.

python hidden.py triton,torch '[["db", "check"], ["tune"]]'      one JSON list on the last line: [status, out, err]
"""

import contextlib
import io
import json
import sys


class Hidden:
    """A meta path finder that has none of these modules."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main():
    sys.meta_path.insert(0, Hidden(sys.argv[1].split(",")))
    from int8kit.cli.main import main as int8kit

    results = []
    for call in json.loads(sys.argv[2]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                int8kit(call)
            except SystemExit as ended:
                status = ended.code
        results.append([status, out.getvalue(), err.getvalue()])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
