"""Fixtures of the tests of the command line."""

from command_line import here, weights_folder

__all__ = ["here", "weights_folder"]
