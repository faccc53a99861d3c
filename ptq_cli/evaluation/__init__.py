"""Measuring finished outputs."""
