"""The report as a page: self-contained HTML with charts, for people (`--html`, `ptq report`)."""
