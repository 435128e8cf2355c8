"""The demo: a tiny but complete SDXL pipeline, its rule-scored preference set, and a report."""
