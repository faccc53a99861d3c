"""The commands as functions: settings, plan, run, report."""
