"""The static HTML report: gather what folders hold, draw it, write one site that opens from disk."""
