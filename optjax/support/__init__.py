"""What every room uses: errors, console, files, fingerprints, provenance."""
