"""Post-training quantization of language models, without torch and without a GPU."""

from ptq_cli._version import __version__

__all__ = ["__version__"]
