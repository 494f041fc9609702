"""Console entry points: `pelt`, `pelt-compile`, `python -m peltc`."""

import sys

from peltc.spec.diagnostics import PeltError
from peltc.spec.packages import needing


def main() -> None:
    """`pelt VERB ...`"""
    _run()


def compile_main() -> None:
    """`pelt-compile SPEC MODEL -o OUT`: the verb `compile` by its own name."""
    _run("pelt-compile", "compile")


def _run(*names: str) -> None:
    """Run the command line, whose own packages may be missing where the rest was installed by hand."""
    try:
        with needing("the command line"):
            from peltc.runtime.commands.cli import run
    except PeltError as error:
        sys.exit(str(error))
    sys.exit(run(sys.argv[1:], *names))


if __name__ == "__main__":
    main()
