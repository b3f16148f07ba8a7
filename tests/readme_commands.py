"""Commands that begin with `python`, one after the other in one process: each would load PyTorch for seconds.

Usage: readme_commands.py < JSON list of lists of words. Ends at the first command that fails.
"""
import json
import runpy
import sys

import click


def run(words: list[str]) -> int | str | None:
    """What the command would end with."""
    sys.argv = words[1:] if words[0] == "-m" else words
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


def main() -> int:
    sys.path[0] = ""            # As for `python -m`; the folder of this file has packages of the same names.
    for words in json.load(sys.stdin):
        click.echo(f"$ python {' '.join(words)}", err=True)
        if code := run(words):
            click.echo(f"failed with {code}: {' '.join(words)}", err=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
