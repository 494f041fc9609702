"""Console entry points: `pelt`, `pelt-compile`, `python -m peltc`."""

import sys


def main() -> None:
    """`pelt VERB ...`"""
    from peltc.runtime.commands.cli import run

    sys.exit(run(sys.argv[1:]))


def compile_main() -> None:
    """`pelt-compile SPEC MODEL -o OUT`: the verb `compile` by its own name."""
    from peltc.runtime.commands.cli import run

    sys.exit(run(sys.argv[1:], "pelt-compile", "compile"))


if __name__ == "__main__":
    main()
