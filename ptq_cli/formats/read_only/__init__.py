"""Layouts of other tools that are read as sources and never written: one file each."""
