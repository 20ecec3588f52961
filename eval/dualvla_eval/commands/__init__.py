"""The commands of this package, one module each; nothing heavy is imported before a command runs."""
