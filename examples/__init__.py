"""Gallery, benchmarks and studies; run them as modules, ``python -m examples.gallery.quickstart``."""
