"""The commands of `afbs`, a module each with `run(args) -> exit code`."""
