"""The `mapo-fast` program, to which the other files of this folder add their commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mapo_fast.util import extensions
from mapo_fast.util.errors import UserError, printable
from mapo_fast.util.signals import exit_code, interruptible

try:
    import typer
    import typer.core
except ImportError as missing:
    raise SystemExit(
        f"mapo-fast: {missing.name} is not installed; the command line needs pip install 'mapo_fast[train]'"
    ) from None


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the command; an unhandled signal ends it with exit code 128 + the signal's number.

        This includes Ctrl-C, for which click's exit code would be 1.
        """
        try:
            with interruptible():
                return super().invoke(ctx)
        except KeyboardInterrupt as signal:
            typer.echo(str(signal) or "interrupted", err=True)
            raise typer.Exit(exit_code(getattr(signal, "number", None))) from None


class Configured(typer.core.TyperCommand):
    """A command that reads a config: its help ends with all settings, and it knows them typed as options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The usual parsing; a setting, ours or another trainer's, that is typed as an option is named."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if (option := getattr(error, "option_name", None)) is None:  # typer does not export this error
                raise
            from mapo_fast.settings.mistakes import meant
            from mapo_fast.settings.schema import Config

            if hint := meant(option, Config):
                text = f"no option {option}; settings are given by --set section.key=value ({hint})"
                raise UserError(text) from None
            raise

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The usual help, then a line for each setting."""
        from mapo_fast.settings.page import help_text

        super().format_help(ctx, formatter)
        formatter.write(f"\n{help_text()}")


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help takes longer than everything else in --help
    help="Preference fine-tuning of Stable Diffusion XL with MaPO on one GPU.",
)


def allow(code: list[str] | None, config: Path | None) -> None:
    """Call the functions that `--allow-code` names."""
    for one in code or []:
        extensions.allow(one, lambda line: typer.echo(printable(line), err=True), config)


def is_main() -> bool:
    """Whether this is the process of a launch that writes output."""
    return os.environ.get("RANK", "0") == "0"
