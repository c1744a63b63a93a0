"""``python -m conceptkit.core.cli``, where the script ``conceptkit`` is not installed."""

from . import main

main()
