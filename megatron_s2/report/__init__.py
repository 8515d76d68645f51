"""Every table and every picture: startup table, pattern, plans, timelines, losses."""
