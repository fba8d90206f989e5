"""The command line: every verb parses, calls the library, prints.

Text that a verb makes goes to stdout, what it says about itself to stderr; with `--json` the last line of stdout is one
JSON object. Every error is one line on stderr, `dipper: ...`, and exit code 1; Ctrl-C is 130. Nothing heavy is imported
before the verb that needs it runs: `dipper --help` knows neither numpy nor the engine.
"""

from importlib import import_module

from dipper.cli.app import app, main

__all__ = ["app", "main"]

for _verbs in ("bundles", "run", "evaluate", "train", "measure", "simulate", "experiments"):  # as `--help` lists them
    import_module(f"dipper.cli.{_verbs}")
