"""What can be said of logs afterwards: lines (runlog), one run (run), groups and score (results), checks, page (report)."""
