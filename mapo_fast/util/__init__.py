"""Tools for every other package, which import none of them: errors, files, console, signals, tensor files."""
