"""Task-level mixture-of-experts transformers in JAX/Flax."""

import signal
import sys

__version__ = "0.1.0"


def end_silently() -> None:
    """Lets Ctrl-C end this process without a traceback, as commands do that still import."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# While Python looks for `python -m moe_jax.COMMAND`, this is the first argument.
if sys.argv[:1] == ["-m"] and f"-m {__name__}" in " ".join(sys.orig_argv):
    end_silently()
