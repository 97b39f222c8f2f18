"""Subcommands of ``lplb-bench``: each module adds its parser and runs its command."""
