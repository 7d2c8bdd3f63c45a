"""The subcommands of ``symbiotic``, a module each."""
