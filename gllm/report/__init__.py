"""What a run did: measures, tables, pages and timelines, equal for simulated and measured runs."""
