"""Tools of every room: errors, console, files, cache, fingerprints, provenance."""
