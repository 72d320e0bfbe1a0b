"""Jinja2 sources of the generated kernels: one kernel family a file, shared pieces by include."""
