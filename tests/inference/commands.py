"""Commands as a user types them, in this process and on the CPU."""
from click.testing import CliRunner


def invoke(command, *args):
    """How it ended."""
    return CliRunner().invoke(command, [str(a) for a in args] + ["--device=cpu"])


def made(command, *args) -> str:
    """What it said; it must end well."""
    result = invoke(command, *args)
    assert result.exit_code == 0, result.output
    return result.output
