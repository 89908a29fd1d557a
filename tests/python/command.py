"""A `ggml-tq` command under test."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from ggml_tq.cli import app


class Command:
    """A command with some arguments given; `types` and others come with each call."""

    def args(self, types: str, *more: object) -> list[str]:
        raise NotImplementedError

    def invoke(self, types: str, *more: object) -> Result:
        return CliRunner().invoke(app, self.args(types, *more))

    def succeed(self, types: str, *more: object) -> Result:
        result = self.invoke(types, *more)
        assert result.exit_code == 0, result.output
        return result

    def refuses(self, message: str, types: str, *more: object) -> None:
        """Ends with status 1 and, last, a line of error with the message in it."""
        result = self.invoke(types, *more)
        assert result.exit_code == 1, result.output
        error = result.stderr.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
