"""Errors people are meant to read: one line that names the field, the value and the remedy."""

import importlib
from types import ModuleType


class Error(Exception):
    """Base of every error Herdling raises on purpose. The command line prints it without a trace."""


class ConfigError(Error):
    """A setting is unknown, out of range, or contradicts another."""


class CheckpointError(Error):
    """A model or run folder is missing, truncated, or does not hold what its config says."""


class DataError(Error):
    """A data file or record cannot be used; the message names file and line."""


class InputError(Error):
    """A prompt, message, image or video cannot be used as given."""


class MissingExtra(Error):
    """An optional library is not installed."""


def at_least(settings: object, section: str = "", **least: int) -> None:
    """Raise ConfigError for a field of `settings` that is below what is given as its least.

    `section` stands before the field's name, with a dot, where settings are part of others.
    """
    for name, bound in least.items():
        if (value := getattr(settings, name)) < bound:
            raise ConfigError(f"{section}{name} is {value}; it must be at least {bound}")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{module} is not installed; remedy: pip install 'herdling[{extra}]'"
        ) from error
