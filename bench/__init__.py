from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""Where child processes start: `python -m` imports from the folder it is started in before all others."""
