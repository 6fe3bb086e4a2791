"""Programs beside the package; the shell commands at the top of this folder are for everybody."""
