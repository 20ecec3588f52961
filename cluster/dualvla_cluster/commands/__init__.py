"""One module a command; imported by `dualvla` alone."""
