from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""Working folder of child processes: `python -m` imports from there before all other folders."""
