"""The commands this package gives `dualvla`: one module each, importing nothing heavy before it runs."""
