"""Workers: processes that are started, watched, and started again when they die."""
